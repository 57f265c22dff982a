"""Is it said which demands cannot all hold, and what giving each of them up would bring?"""

from dataclasses import replace
from typing import Any

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.conflicts import (
    Ask,
    Conflicts,
    DemandKind,
    demands_of,
    find_conflicts,
    fit,
    longest_fitting,
    without,
)
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quote import Candidate
from ollm_service.core.requirements import requirements_of
from tests.unit.core.samples import GIB, capabilities, cuda, live, planned, profile


def ask(*, where: str | None = None, tokens: int = 1_000, model: ModelProfile | None = None, **options: Any) -> Ask:
    """A plan of the small model with these options."""
    model, config = model or profile(), RuntimeConfig(**options)
    plan = planned(config, model)
    requirements = requirements_of(plan, model, config, where=where)
    return Ask(plan=plan, profile=model, config=config, requirements=requirements, longest_row_tokens=tokens)


def worker(name: str, free: LiveState | None = None, offers: Capabilities | None = None, **changes: Any) -> Candidate:
    """A worker that can do everything, but for the changes."""
    return Candidate(name=name, capabilities=offers or capabilities(node=name, **changes), live=free or live())


def kinds(found: Conflicts | None) -> list[set[DemandKind]]:
    """Which demands each way out gives up."""
    assert found is not None
    return [{demand.kind for demand in way.demands} for way in found.ways]


def test_a_plan_that_fits_somewhere_has_no_conflict() -> None:
    """One worker is enough."""
    assert find_conflicts(ask(where='zone == "home"'), [worker("a"), worker("b", labels={"zone": "home"})]) is None


def test_an_answer_is_not_taken_for_a_prompt() -> None:
    """A long answer to a short prompt needs less than as long a prompt: what a worker would run is not said to fit nobody."""
    all_prompt = ask(tokens=4_000)
    asked = replace(all_prompt, longest_prompt_tokens=100)
    placed = fit(asked, worker("large"))
    assert placed is not None
    assert placed.placement is not None
    assert placed.placement.estimate.activations > 0
    sizes = [size * 2**20 for size in range(300, 8_000, 20)]
    fits = {size: bool(fit(asked, worker("w", live({"cpu": size})))) for size in sizes}
    whole = {size: bool(fit(all_prompt, worker("w", live({"cpu": size})))) for size in sizes}
    assert all(fits[size] >= whole[size] for size in sizes)
    assert any(fits[size] and not whole[size] for size in sizes)


def test_any_one_of_the_demands_that_cannot_all_hold_may_go() -> None:
    """The labelled worker lacks the strategy, the able one has no label: either may be given up, and nothing else helps."""
    home = worker("home", labels={"zone": "home"}, kv_strategies={"resident": None, "paged": "no cache disk"})
    asked = ask(where='zone == "home"', kv_cache_strategy="paged", device="cpu")
    found = find_conflicts(asked, [home, worker("away")])
    assert kinds(found) == [{DemandKind.LABELS}, {DemandKind.KV_CACHE}]
    assert found is not None
    assert not found.is_joint
    labels, strategy = found.ways
    assert ([demand.words for demand in labels.demands], labels.fit.worker) == (['zone == "home"'], "away")
    assert ([demand.words for demand in strategy.demands], strategy.fit.worker) == (["KV cache paged"], "home")
    assert labels.fit.placement is not None
    assert labels.fit.placement.kv_cache_strategy is KVCacheStrategy.PAGED
    assert strategy.ask.config.kv_cache_strategy is None
    assert strategy.ask.requirements.where == 'zone == "home"'


def test_what_must_go_together_is_said_as_one_way() -> None:
    """Where no single demand helps, a smallest set of them is named."""
    asked = ask(where='zone == "home"', device="cuda", dense_projection_chunk_rows=64)
    found = find_conflicts(asked, [worker("a")])
    assert kinds(found) == [{DemandKind.LABELS, DemandKind.DEVICE}]
    assert found is not None
    assert found.is_joint


def test_many_demands_that_must_go_together_are_found_too() -> None:
    """Above three, too, nothing is given up that could have stayed."""
    bare = worker("bare", models=(), kv_strategies={"resident": None}, passes={})
    asked = ask(where="rack > 1", device="cuda", kv_cache_strategy="paged", dense_projection_chunk_rows=64)
    given_up = {DemandKind.LABELS, DemandKind.DEVICE, DemandKind.KV_CACHE, DemandKind.CHUNK_ROWS, DemandKind.MODEL}
    assert kinds(find_conflicts(asked, [bare])) == [given_up]


def test_long_rows_may_go() -> None:
    """The longest row that still fits is told to the token: one more, and no worker has room."""
    model = profile(max_context_tokens=None)
    asked = ask(tokens=1_000_000, model=model, use_cache=False)
    small = worker("small", free=live({"cpu": GIB}))
    found = find_conflicts(asked, [small])
    assert kinds(found) == [{DemandKind.LONG_ROWS}]
    assert found is not None
    longest = found.ways[0].ask.longest_row_tokens
    assert [demand.words for demand in found.ways[0].demands] == [f"rows over {longest:,} tokens"]
    assert fit(replace(asked, longest_row_tokens=longest), small)
    assert not fit(replace(asked, longest_row_tokens=longest + 1), small)
    assert longest_fitting(asked, [small, worker("smaller", free=live({"cpu": GIB // 2}))]) == longest


def test_an_accelerator_is_named_before_a_processor() -> None:
    """Of all workers that could take it then, the one is named that would do it best."""
    card = capabilities(cuda(), node="card")
    found = find_conflicts(
        ask(where="rack > 1"), [worker("a"), worker("card", offers=card, free=live({"cuda:0": 8 * GIB})), worker("b")]
    )
    assert found is not None
    assert [way.fit.worker for way in found.ways] == ["card"]


def test_a_model_that_nobody_has_is_the_conflict() -> None:
    """With the model there, the first worker could run it."""
    assert kinds(find_conflicts(ask(), [worker("a", models=())])) == [{DemandKind.MODEL}]


def test_a_model_that_nobody_knows_yet_is_matched_only() -> None:
    """Before a worker has it, no placement can be promised."""
    requirements = replace(ask().requirements, model_digest=None, download="org/name", memory_bytes=0, where="rack > 1")
    found = find_conflicts(replace(ask(), profile=None, requirements=requirements), [worker("a", may_download=True)])
    assert kinds(found) == [{DemandKind.LABELS}]
    assert found is not None
    assert found.ways[0].fit.placement is None


def test_where_the_model_itself_is_too_much_there_is_no_way_out() -> None:
    """Neither without workers nor where giving up everything would not make it fit."""
    huge = profile(weight_bytes=100 * GIB)
    assert find_conflicts(ask(model=huge, device="cpu"), [worker("a")]) == Conflicts(ways=())
    assert find_conflicts(ask(where="rack > 1"), []) == Conflicts(ways=())


def test_a_demand_that_makes_a_plan_possible_is_not_given_up() -> None:
    """A worker without the specialized backend takes the plan only as long as no specialization is demanded."""
    plain = worker("plain", backends={"transformers-generic": None, "optimized-native": "not installed"})
    found = find_conflicts(ask(where="rack > 1", use_specialization=False), [plain])
    assert kinds(found) == [{DemandKind.LABELS}]


def test_every_demand_has_words_and_goes_back_to_its_default() -> None:
    """Each option that limits the workers is one demand; given up, its fields are as if never set."""
    asked = ask(
        where="rack > 1", device="cpu", backend="optimized-native", kv_cache_window_tokens=8, dense_projection_chunk_rows=64
    )
    words = [demand.words for demand in demands_of(asked)]
    assert words == [
        "rack > 1",
        "KV cache sliding-window-ring-buffer",
        "device cpu",
        "backend optimized-native",
        "MLP in chunks of 64 rows",
        "model tiny-llama",
        "rows this long",
    ]
    eased = without(asked, demands_of(asked))
    assert eased is not None
    assert (eased.config, eased.requirements.where, eased.requirements.model_digest) == (RuntimeConfig(), None, None)
