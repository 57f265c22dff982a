"""Which of a plan's demands cannot all hold on this fleet, and what would giving each of them up bring?

A plan fits a worker that offers what it requires and has room for its longest row. Where it fits none:

  1. Every demand that its user made is given up alone. Those with which it then fits somewhere are the conflict: they cannot all
     hold, and giving up any one of them is a way out.
  2. Where none suffices alone, a smallest set of demands is sought that does when all of it is given up. Sets of more than
     `MOST_TOGETHER` are not tried one by one: then demands are taken back from all of them for as long as the plan still fits.
  3. Where that does not help either, there is no way out: the model itself is too much for these machines.

To give up an option means its default; to give up long rows, that only those which still fit are run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations

from ollm_service.core.errors import InvalidOption
from ollm_service.core.matching import NoMatch, match
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.placement import Placement, RowBounds, place
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.planning import plan_resolved
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quote import Candidate
from ollm_service.core.requirements import Requirements, requirements_of

MOST_TOGETHER = 3
SHORTEST_ROW_TOKENS = 128  # below that, nobody is told to give up longer rows: there would be none left


class DemandKind(StrEnum):
    """What a user can demand, and give up."""

    LABELS = "labels"
    KV_CACHE = "kv-cache"
    NO_CACHE_FILES = "no-cache-files"
    DEVICE = "device"
    BACKEND = "backend"
    NO_SPECIALIZATION = "no-specialization"
    ADAPTER = "adapter"
    MULTIMODAL = "multimodal"
    CHUNK_ROWS = "chunk-rows"
    OFFLOAD_CPU = "offload-cpu"
    OFFLOAD_GPU = "offload-gpu"
    MODEL = "model"
    LONG_ROWS = "long-rows"


OPTIONS: Mapping[DemandKind, tuple[str, ...]] = {
    DemandKind.KV_CACHE: (
        "kv_cache_strategy",
        "kv_cache_window_tokens",
        "strategy_selector_profile",
        "kv_cache_lifecycle",
    ),
    DemandKind.NO_CACHE_FILES: ("use_cache",),
    DemandKind.DEVICE: ("device",),
    DemandKind.BACKEND: ("backend",),
    DemandKind.NO_SPECIALIZATION: ("use_specialization",),
    DemandKind.ADAPTER: ("adapter_dir",),
    DemandKind.MULTIMODAL: ("multimodal",),
    DemandKind.CHUNK_ROWS: ("dense_projection_chunk_rows",),
    DemandKind.OFFLOAD_CPU: ("offload_cpu_layers", "offload_cpu_policy"),
    DemandKind.OFFLOAD_GPU: ("offload_gpu_layers",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One thing that was asked for, as a person would say it. `options` are the fields of RuntimeConfig that ask for it."""

    kind: DemandKind
    words: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An executable plan with its longest row; no profile where no worker has the model.

    `longest_prompt_tokens` bounds the prompts alone, as a worker does; without it all of a row may be prompt.
    """

    plan: RuntimePlan
    profile: ModelProfile | None
    config: RuntimeConfig
    requirements: Requirements
    longest_row_tokens: int
    longest_prompt_tokens: int | None = None

    @property
    def rows(self) -> RowBounds:
        """What is to be placed."""
        prompt, longest = self.longest_prompt_tokens, self.longest_row_tokens
        return RowBounds(longest=longest, longest_prompt=None if prompt is None else min(prompt, longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A worker that has room for an ask, and how it would run there; no placement where nothing is known of the model yet."""

    worker: str
    placement: Placement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WayOut:
    """What giving up these demands brings: the ask as it then is, and the worker that could take it.

    Where long rows are given up, `ask.longest_row_tokens` is the longest row that is still run.
    """

    demands: tuple[Demand, ...]
    ask: Ask
    fit: Fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflicts:
    """The ways out of what cannot hold: one demand each, or one way of several demands, or none at all."""

    ways: tuple[WayOut, ...]

    @property
    def is_joint(self) -> bool:
        """Whether several demands must be given up together."""
        return any(len(way.demands) > 1 for way in self.ways)


def demands_of(ask: Ask) -> tuple[Demand, ...]:
    """Everything that was demanded of a worker and could be given up."""
    config, requirements = ask.config, ask.requirements
    changed = config.as_dict()
    found = [Demand(kind=DemandKind.LABELS, words=requirements.where)] if requirements.where is not None else []
    for kind, names in OPTIONS.items():
        options = tuple(name for name in names if name in changed)
        if options and (kind is not DemandKind.KV_CACHE or config.demanded_kv_strategy is not None):
            found.append(Demand(kind=kind, words=_words(kind, config), options=options))
    name = requirements.download or ask.plan.resolved_model.normalized_name
    found.append(Demand(kind=DemandKind.MODEL, words=f"model {name}"))
    if ask.profile is not None:
        found.append(Demand(kind=DemandKind.LONG_ROWS, words="rows this long"))
    return tuple(found)


def without(ask: Ask, demands: Collection[Demand]) -> Ask | None:
    """The ask with these demands given up, long rows aside; None where no backend could run it then."""
    options = {option for demand in demands for option in demand.options}
    kinds = {demand.kind for demand in demands}
    plan, config = ask.plan, ask.config
    where = None if DemandKind.LABELS in kinds else ask.requirements.where
    if options:
        config = RuntimeConfig(**{name: value for name, value in config.as_dict().items() if name not in options})
        try:
            plan = plan_resolved(plan.resolved_model, config)
        except InvalidOption:
            return None
        if not plan.is_executable():
            return None
    requirements = requirements_of(plan, ask.profile, config, where=where) if options else replace(ask.requirements, where=where)
    if DemandKind.MODEL in kinds:
        requirements = replace(requirements, model_digest=None, download=None)
    return replace(ask, plan=plan, config=config, requirements=requirements)


def fit(ask: Ask, worker: Candidate) -> Fit | None:
    """How a worker would run the ask as it is now; None where it cannot."""
    if isinstance(match(ask.requirements, worker.capabilities), NoMatch):
        return None
    if ask.profile is None:
        return Fit(worker=worker.name, placement=None)
    found = place(
        ask.plan,
        ask.profile,
        ask.config,
        ask.requirements,
        worker.capabilities,
        worker.live,
        ask.rows,
    )
    return Fit(worker=worker.name, placement=found) if isinstance(found, Placement) else None


def longest_fitting(ask: Ask, workers: Iterable[Candidate]) -> int:
    """The tokens of the longest row, up to the ask's own longest, that some worker has room for; 0 where none takes any."""
    best = 0
    for worker in workers:
        if best < ask.longest_row_tokens and fit(replace(ask, longest_row_tokens=best + 1), worker):
            best = _bisect(ask, worker, best + 1)
    return best


def find_conflicts(ask: Ask, workers: Sequence[Candidate]) -> Conflicts | None:
    """What stands in the way of a plan that fits no worker; None where it fits one."""
    if any(fit(ask, worker) for worker in workers):
        return None
    demands = demands_of(ask)
    single = [way for demand in demands if (way := _way_out(ask, (demand,), workers))]
    if single or not workers:
        return Conflicts(ways=tuple(single))
    for size in range(2, MOST_TOGETHER + 1):
        for chosen in combinations(demands, size):
            if way := _way_out(ask, chosen, workers):
                return Conflicts(ways=(way,))
    joint = _fewest(ask, demands, workers)
    return Conflicts(ways=(joint,) if joint else ())


def _fewest(ask: Ask, demands: tuple[Demand, ...], workers: Sequence[Candidate]) -> WayOut | None:
    """Give up everything, then take back whatever leaves it a way out."""
    best = _way_out(ask, demands, workers)
    for demand in demands if best else ():
        fewer = tuple(other for other in demands if other is not demand)
        if way := _way_out(ask, fewer, workers):
            best, demands = way, fewer
    return best


def _way_out(ask: Ask, demands: tuple[Demand, ...], workers: Sequence[Candidate]) -> WayOut | None:
    eased = without(ask, demands)
    if eased is None:
        return None
    if any(demand.kind is DemandKind.LONG_ROWS for demand in demands):
        longest = longest_fitting(eased, workers)
        if longest < min(SHORTEST_ROW_TOKENS, ask.longest_row_tokens):
            return None
        eased = replace(eased, longest_row_tokens=longest)
        demands = tuple(_with_length(demand, longest) for demand in demands)
    found = [there for worker in workers if (there := fit(eased, worker))]
    return WayOut(demands=demands, ask=eased, fit=max(found, key=_merit)) if found else None


def _with_length(demand: Demand, longest: int) -> Demand:
    return replace(demand, words=f"rows over {longest:,} tokens") if demand.kind is DemandKind.LONG_ROWS else demand


def _merit(found: Fit) -> tuple[bool, int]:
    """Which of several workers to name: an accelerator before a processor, then the one that takes most rows at a time."""
    placement = found.placement
    return (False, 0) if placement is None else (placement.device_id != "cpu", placement.micro_batch)


def _bisect(ask: Ask, worker: Candidate, fits: int) -> int:
    """The longest row that a worker has room for, given one that it has."""
    low, high = fits, ask.longest_row_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if fit(replace(ask, longest_row_tokens=middle), worker):
            low = middle
        else:
            high = middle - 1
    return low


def _words(kind: DemandKind, config: RuntimeConfig) -> str:
    words = {
        DemandKind.KV_CACHE: f"KV cache {config.demanded_kv_strategy}",
        DemandKind.NO_CACHE_FILES: "no KV cache in files",
        DemandKind.DEVICE: f"device {config.device}",
        DemandKind.BACKEND: f"backend {config.backend}",
        DemandKind.NO_SPECIALIZATION: "no specialization",
        DemandKind.ADAPTER: f"adapter {config.adapter_dir}",
        DemandKind.MULTIMODAL: "images and sounds",
        DemandKind.CHUNK_ROWS: f"MLP in chunks of {config.dense_projection_chunk_rows} rows",
        DemandKind.OFFLOAD_CPU: f"{config.offload_cpu_layers} layers in host memory",
        DemandKind.OFFLOAD_GPU: f"{config.offload_gpu_layers} layers pinned on the GPU",
    }
    return words[kind]
