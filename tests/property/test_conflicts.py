"""Which laws hold for what is said to stand in the way of a plan, whatever the demands and the fleet?"""

from dataclasses import fields
from itertools import combinations
from typing import Any

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from ollm_service.core.capabilities import CacheDisk, Capabilities, LiveState
from ollm_service.core.conflicts import OPTIONS, Ask, Demand, DemandKind, WayOut, demands_of, find_conflicts
from ollm_service.core.errors import InvalidOption
from ollm_service.core.matching import Match, match
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.placement import Placement, RowBounds, place
from ollm_service.core.plan import BackendId, PassId
from ollm_service.core.planning import plan_resolved
from ollm_service.core.quote import Candidate
from ollm_service.core.requirements import requirements_of
from tests.unit.core.samples import GIB, cpu, cuda, planned, profile

MODEL = profile(weight_bytes=GIB, kv_bytes_per_token=2**16, max_context_tokens=None)


def lacking(*names: str) -> st.SearchStrategy[dict[Any, str | None]]:
    """Each of these offered or not."""
    return st.fixed_dictionaries({name: st.sampled_from([None, None, None, "not here"]) for name in names})


workers = st.builds(
    lambda offers, live: (offers, live),
    st.builds(
        Capabilities,
        node=st.just("node"),
        slots=st.just(1),
        devices=st.sampled_from([(cpu(),), (cuda(), cpu()), (cuda(memory_bytes=2 * GIB),)]),
        host_memory_bytes=st.just(32 * GIB),
        backends=lacking(*BackendId),
        passes=lacking(PassId.DISK_CACHE, PassId.MLP_CHUNKING),
        kv_strategies=lacking("resident", "paged"),
        models=st.sampled_from([(MODEL,), (MODEL,), ()]),
        cache_disk=st.sampled_from([None, CacheDisk(path="/cache", total_bytes=100 * GIB)]),
        labels=st.sampled_from([{}, {"zone": "home"}, {"zone": "away"}]),
    ),
    st.builds(
        LiveState,
        device_free_bytes=st.fixed_dictionaries(
            {"cpu": st.sampled_from([2 * GIB, 4 * GIB, 32 * GIB]), "cuda:0": st.sampled_from([2 * GIB, 8 * GIB])}
        ),
        host_free_bytes=st.just(32 * GIB),
        cache_free_bytes=st.sampled_from([0, 100 * GIB]),
    ),
)
fleets = st.lists(workers, min_size=1, max_size=4).map(
    lambda pairs: [Candidate(name=f"w{n}", capabilities=offers, live=live) for n, (offers, live) in enumerate(pairs)]
)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    """An executable plan of one model with a few demands."""
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "device": st.sampled_from(["cpu", "cuda", "cuda:1"]),
                "backend": st.sampled_from(BackendId),
                "use_specialization": st.just(False),
                "use_cache": st.just(False),
                "kv_cache_strategy": st.sampled_from(["resident", "paged"]),
                "strategy_selector_profile": st.sampled_from(["bounded-window", "capacity"]),
                "dense_projection_chunk_rows": st.just(64),
            },
        )
    )
    try:
        config = RuntimeConfig(**options)
    except InvalidOption:
        config = RuntimeConfig(device=options.get("device"))
    plan = planned(config, MODEL)
    assume(plan.is_executable())
    where = draw(st.none() | st.sampled_from(['zone == "home"', "gpu_memory_gb > 4"]))
    return Ask(
        plan=plan,
        profile=MODEL,
        config=config,
        requirements=requirements_of(plan, MODEL, config, where=where),
        longest_row_tokens=draw(st.sampled_from([1_000, 30_000, 200_000])),
    )


def fits(ask: Ask, demands: tuple[Demand, ...], fleet: list[Candidate], longest: int | None = None) -> bool:
    """Whether some worker matches and has room with these demands given up: planned anew, step by step, from the options left."""
    kinds = {demand.kind for demand in demands}
    dropped = {option for kind in kinds for option in OPTIONS.get(kind, ())}
    kept = {item.name: getattr(ask.config, item.name) for item in fields(RuntimeConfig) if item.name not in dropped}
    config = RuntimeConfig(**kept)
    plan = plan_resolved(ask.plan.resolved_model, config)
    if not plan.is_executable():
        return False
    needs = requirements_of(plan, MODEL, config, where=None if DemandKind.LABELS in kinds else ask.requirements.where).as_dict()
    needs["passes"], needs["modalities"] = tuple(needs["passes"]), tuple(needs["modalities"])
    if DemandKind.MODEL in kinds:
        needs["model_digest"] = None
    requirements = type(ask.requirements)(**needs)
    tokens = 128 if DemandKind.LONG_ROWS in kinds else ask.longest_row_tokens
    return any(
        isinstance(match(requirements, worker.capabilities), Match)
        and isinstance(
            place(plan, MODEL, config, requirements, worker.capabilities, worker.live, RowBounds(longest=longest or tokens)),
            Placement,
        )
        for worker in fleet
    )


def longest_of(way: WayOut) -> int | None:
    """The longest row that a way leaves, where it gives up longer ones."""
    return way.ask.longest_row_tokens if DemandKind.LONG_ROWS in {demand.kind for demand in way.demands} else None


@given(asks(), fleets)
def test_there_is_a_conflict_exactly_where_the_plan_fits_nobody(ask: Ask, fleet: list[Candidate]) -> None:
    """None means that some worker takes it, and the other way round."""
    assert (find_conflicts(ask, fleet) is None) == fits(ask, (), fleet)


@settings(max_examples=200)
@given(asks(), fleets)
def test_giving_up_any_one_of_the_conflict_makes_the_plan_fit(ask: Ask, fleet: list[Candidate]) -> None:
    """Each way out that is named is one, with the worker and the longest row that it names; no demand that is left out is one.

    Where only several together help, giving up one less of them does not.
    """
    found = find_conflicts(ask, fleet)
    ways = found.ways if found else ()
    event(f"{len(ways)} ways of {max((len(way.demands) for way in ways), default=0)}")
    for way in ways:
        assert fits(ask, way.demands, fleet, longest_of(way))
        (worker,) = [candidate for candidate in fleet if candidate.name == way.fit.worker]
        assert fits(ask, way.demands, [worker], longest_of(way))
        for fewer in combinations(way.demands, len(way.demands) - 1):
            assert not fits(ask, fewer, fleet)
    named = {demand.kind for way in ways for demand in way.demands if len(way.demands) == 1}
    if found is not None:
        assert not any(fits(ask, (demand,), fleet) for demand in demands_of(ask) if demand.kind not in named)
