"""How would this worker run a plan right now: on which device, which layers where, with which KV cache, how many rows at a time?

The ladder of tiers, best first, on each device in turn, accelerators before the CPU:

  1. all on device
  2. KV cache in files
  3. layers in host memory       on an accelerator: some layers pass through it for every token
  4. layers streamed from disk   as 3, and what host memory does not hold comes from disk; a CPU has 4 without 3

  - The first tier that holds one row is taken, with the most rows that fit: at most `MOST_ROWS`, or as many as there are, or as
    crashes have left. Each tier before it is recorded with the bytes that it is short of, or with why it was not tried.
  - A KV strategy that was asked for is the only one. Otherwise the strategy selector says whether 1 or 2 comes first; tiers 3 and
    4 try what it chose, then what is left.
  - Tiers are offered by a plan's passes and by the worker: 2 by disk-cache, 3 and 4 by cpu-offload, layers pinned to a GPU by
    gpu-offload. Layers that were asked for by number are kept in host memory exactly so, or the worker refuses the plan.
  - In 3 and 4 rows go before layers. Where k of n layers of l bytes stay on the device, a token of each of B rows costs a
    transfer of (n - k)·l / B bytes; with room F for both and r bytes a row B is (F - k·l) / r, and (n - k) / (F - k·l) grows with
    k wherever not all layers fit (F < n·l). So as many rows as can be, then as many layers as still fit beside them.
  - In 4 embedding and head stay on disk, too, where only so one row fits, or more rows than otherwise: each pass then reads the
    head besides. With moe-routing layers pass without their experts.
  - 3 and 4 read weights that were laid out by layers on the cache disk. Where this model's are not, room is needed for that, too:
    `core/laying_out.py`. A plan that takes a raw export needs none.
  - What is usable is `USABLE_FRACTION` of what is free now, less what a runner takes before it has a model. The rest is for
    allocators that cut their memory into pieces, for other programs, and for what the estimate may be wrong by.

`core/estimates.py` says what is needed. More free memory never gives a worse tier, and within a tier never fewer rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.estimates import RUNTIME_BYTES, MemoryEstimate, estimate_memory
from ollm_service.core.kv_selector import KVChoice, select_kv_strategy
from ollm_service.core.laying_out import takes_export
from ollm_service.core.layout import USUAL_WINDOW_TOKENS, Layout
from ollm_service.core.leaving import LeavingLayers, has_demanded_layers, is_routed
from ollm_service.core.matching import able_devices
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.packing import runs_in_packs
from ollm_service.core.passing import vocabulary_bytes
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements

USABLE_FRACTION = 0.9
MOST_ROWS = 256
MLP_CHUNK_ROWS = 16_384  # what mlp-chunking computes at a time unless told otherwise


class Tier(StrEnum):
    """How far a model has to leave its device. The order is the ladder's."""

    ALL_ON_DEVICE = "all on device"
    KV_IN_FILES = "KV cache in files"
    LAYERS_IN_HOST = "layers in host memory"
    LAYERS_FROM_DISK = "layers streamed from disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBounds:
    """How long the rows are that are to be placed, in tokens, and how many.

    `longest` is a bound of prompt and answer together, `longest_prompt` of the prompts alone; without it all may be prompt. Where
    the longest do not fit and `shortest` is given, the placement may be one for shorter rows. `are_sampled`: some may draw their
    tokens, which takes more memory than taking the best.
    """

    longest: int
    longest_prompt: int | None = None
    shortest: int | None = None
    count: int | None = None
    are_sampled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedTier:
    """A tier that was not taken. `short_of` is what it lacks, with the bytes that one row needs and those that are usable.

    `short_of` is None where no bytes decided: then `reason` says what did. `estimate` is that of one row.
    """

    tier: Tier
    device_id: str
    reason: str
    needed_bytes: int
    free_bytes: int
    short_of: str | None = None
    estimate: MemoryEstimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The concrete choice on one worker. `micro_batch` is the most rows at a time, `kv_details` say how the KV was chosen.

    It holds for rows of up to `longest_row_tokens`, prompt and output together; a longer row is left unanswered here. The numbers
    of layers add up to the model's; `host_layers` and `disk_layers` name those that pass through the device, from 0.
    `vocabulary_on_disk`: the rows of the input embedding and the output head are read from disk for each pass, too.
    """

    device_id: str
    tier: Tier
    kv_cache_strategy: KVCacheStrategy
    micro_batch: int
    estimate: MemoryEstimate
    kv_details: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[RefusedTier, ...] = ()
    longest_row_tokens: int | None = None
    layers_on_device: int = 0
    layers_in_host: int = 0
    layers_on_disk: int = 0
    host_layers: tuple[int, ...] = ()
    disk_layers: tuple[int, ...] = ()
    vocabulary_on_disk: bool = False

    @property
    def process_bytes(self) -> int:
        """What the runner's process takes of the device at most, its libraries included."""
        kind = self.device_id.partition(":")[0]
        at_first = self.estimate.loading if kind == "cpu" else 0
        return max(self.estimate.device_bytes, at_first) + RUNTIME_BYTES.get(kind, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaceable:
    """No tier fits this worker at present."""

    refused: tuple[RefusedTier, ...]

    @property
    def reason(self) -> str:
        """Every refusal in one line."""
        return "; ".join(f"{tier.device_id}, {tier.tier}: {tier.reason}" for tier in self.refused)


def place(
    plan: RuntimePlan,
    profile: ModelProfile,
    config: RuntimeConfig,
    requirements: Requirements,
    capabilities: Capabilities,
    live: LiveState,
    rows: RowBounds,
    micro_batch_limit: int | None = None,
) -> Placement | Unplaceable:
    """The best tier that holds at least one of the longest rows.

    Where none does and `rows.shortest` is given, the best for half as many tokens, and so on down to the shortest row: a few long
    rows must not block the rest, and the bound of a row's tokens is far above what most have.
    """
    tokens = min(rows.longest, profile.most_row_tokens or rows.longest)
    most_rows = max(1, min(MOST_ROWS, micro_batch_limit or MOST_ROWS, rows.count or MOST_ROWS))
    refused: tuple[RefusedTier, ...] = ()
    while True:
        request = _Request(plan, profile, config, capabilities, live, tokens, rows, most_rows)
        found = _first_that_fits(request, able_devices(requirements, capabilities))
        if isinstance(found, Placement):
            return replace(found, refused=refused + found.refused)
        refused = refused or found.refused
        if rows.shortest is None or tokens <= rows.shortest:
            return Unplaceable(refused=refused)
        tokens = max(rows.shortest, tokens // 2)


def usable_bytes(live: LiveState, device: Device) -> int:
    """What a model and its work may take of a device now."""
    free = live.device_free_bytes.get(device.device_id, 0)
    return max(0, int(free * USABLE_FRACTION) - RUNTIME_BYTES.get(device.kind, 0))


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of every device: rows of up to `tokens` tokens, at most `most_rows` at a time."""

    plan: RuntimePlan
    profile: ModelProfile
    config: RuntimeConfig
    capabilities: Capabilities
    live: LiveState
    tokens: int
    rows: RowBounds
    most_rows: int

    @property
    def lays_out(self) -> bool:
        """Whether weights have to be laid out before layers can leave."""
        return not takes_export(self.plan) and self.profile.digest not in self.live.laid_out

    @property
    def has_demanded_layers(self) -> bool:
        """Whether layers leave the device because the user said so."""
        return has_demanded_layers(self.profile, self.config)

    def layout(self, device: Device) -> Layout:
        """How the model runs in the first tier."""
        mlp_rows = None
        if PassId.MLP_CHUNKING in self.plan.specialization_pass_ids:
            mlp_rows = self.config.dense_projection_chunk_rows or MLP_CHUNK_ROWS
        return Layout(
            device_kind=device.kind,
            window_tokens=self.config.kv_cache_window_tokens or USUAL_WINDOW_TOKENS,
            mlp_rows=mlp_rows,
            is_sampled=self.rows.are_sampled,
            is_routed=is_routed(self.plan, self.capabilities),
            is_packed=runs_in_packs(self.profile.model_type, self.plan.backend_id),
            may_share=self.rows.count != 1,
        )


@dataclass(frozen=True, slots=True)
class _Need:
    """So many bytes that are needed of something, those that are usable there, and what for."""

    what: str
    needed: int
    there: int
    purpose: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.there


@dataclass(frozen=True, slots=True)
class _Room:
    """One device, and what is usable there: of its own memory, of host memory beside it, and of the cache disk."""

    request: _Request
    device: Device
    device_bytes: int
    host_bytes: int
    disk_bytes: int

    @classmethod
    def on(cls, device: Device, request: _Request) -> "_Room":
        live = request.live
        host = max(0, int(live.host_free_bytes * USABLE_FRACTION) - RUNTIME_BYTES["cpu"])
        return cls(request, device, usable_bytes(live, device), host, live.cache_free_bytes)

    def estimate(self, layout: Layout, rows: int) -> MemoryEstimate:
        return estimate_memory(
            self.request.profile, layout, rows=rows, tokens=self.request.tokens, prompt_tokens=self.request.rows.longest_prompt
        )

    def holds(self, estimate: MemoryEstimate) -> bool:
        return all(need.fits for need in self._needs(estimate))

    def has_disk_and_loads(self, estimate: MemoryEstimate) -> bool:
        """Whether there is room for what does not depend on which layers leave: on the cache disk, and to lay weights out."""
        return all(need.fits for need in self._needs(estimate)[2:])

    def refuse(self, tier: Tier, estimate: MemoryEstimate) -> RefusedTier:
        """Why an estimate of one row does not fit; the first of device, host memory and disk that is short."""
        need = next(need for need in self._needs(estimate) if not need.fits)
        return RefusedTier(
            tier=tier,
            device_id=self.device.device_id,
            reason=f"{need.what}: {need.needed:,} bytes needed for {need.purpose}, {need.there:,} usable",
            needed_bytes=need.needed,
            free_bytes=need.there,
            short_of=need.what,
            estimate=estimate,
        )

    def _needs(self, estimate: MemoryEstimate) -> tuple[_Need, ...]:
        """All that has to be there; the first two depend on which layers leave."""
        row = f"one row of {self.request.tokens:,} tokens"
        joins = "the experts that are joined while the weights are laid out by layers"
        loading = ("memory", self.device_bytes) if self.device.kind == "cpu" else ("host memory", self.host_bytes)
        return (
            _Need("memory", estimate.device_bytes, self.device_bytes, row),
            _Need("host memory", estimate.host, self.host_bytes, row),
            _Need(loading[0], estimate.loading, loading[1], joins),
            _Need(
                "cache disk",
                estimate.disk_bytes,
                self._disk_left(estimate),
                f"the weights by layers and {row}" if estimate.extents else row,
            ),
        )

    def _disk_left(self, estimate: MemoryEstimate) -> int:
        """What is usable of the cache disk; what there is of extents already is not needed again."""
        begun = self.request.live.begun_bytes.get(self.request.profile.digest, 0) if estimate.extents else 0
        return self.disk_bytes + begun

    def decline(self, tier: Tier, reason: str) -> RefusedTier:
        """Not tried, for a reason other than bytes; what one row would need stands beside it."""
        estimate = self.estimate(self.request.layout(self.device), 1)
        return RefusedTier(
            tier=tier,
            device_id=self.device.device_id,
            reason=reason,
            needed_bytes=estimate.device_bytes,
            free_bytes=self.device_bytes,
            estimate=estimate,
        )


_Found = tuple[int, Layout]


def _first_that_fits(request: _Request, devices: Sequence[Device]) -> Placement | Unplaceable:
    refused: list[RefusedTier] = []
    for device in devices:
        choice = select_kv_strategy(request.plan, request.config, request.capabilities, device)
        strategies = _strategies(request, choice)
        for tier, found in _climb(_Room.on(device, request), strategies):
            if isinstance(found, RefusedTier):
                refused.append(found)
            else:
                return _placement(request, device, tier, found, choice, refused)
    return Unplaceable(refused=tuple(refused))


def _strategies(request: _Request, choice: KVChoice) -> list[KVCacheStrategy]:
    """The KV strategies that may be tried, in order: the demanded one alone, else the chosen one and the other place."""
    if request.config.demanded_kv_strategy is not None:
        return [choice.strategy]
    if choice.strategy is not KVCacheStrategy.RESIDENT:
        return [choice.strategy, KVCacheStrategy.RESIDENT]
    return [KVCacheStrategy.RESIDENT] if _no_files_because(request) else [KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED]


def _climb(room: _Room, strategies: Sequence[KVCacheStrategy]) -> Iterator[tuple[Tier, _Found | RefusedTier]]:
    """Every tier of one device, best first, each as it could be run or refused."""
    request = room.request
    by_tier = {_kv_tier(strategy): strategy for strategy in strategies}
    for tier in [*by_tier, *(tier for tier in (Tier.ALL_ON_DEVICE, Tier.KV_IN_FILES) if tier not in by_tier)]:
        if request.has_demanded_layers:
            yield tier, room.decline(tier, "layers in host memory were asked for")
        elif tier in by_tier:
            yield tier, _try_whole(room, tier, by_tier[tier])
        else:
            yield tier, room.decline(tier, _why_not(request))
    is_host = room.device.kind == "cpu"
    for tier in (Tier.LAYERS_FROM_DISK,) if is_host else (Tier.LAYERS_IN_HOST, Tier.LAYERS_FROM_DISK):
        lacking = _no_offload_because(room, tier)
        if lacking is not None:
            yield tier, room.decline(tier, lacking)
        else:
            tries = [_try_offloaded(room, tier, strategy) for strategy in strategies]
            fitting = [found for found in tries if not isinstance(found, RefusedTier)]
            yield tier, fitting[0] if fitting else min(tries, key=_distance)


def _distance(found: _Found | RefusedTier) -> tuple[bool, int]:
    """Of several tries that were refused the least is told, but before it what keeps weights from being laid out in any way."""
    if not isinstance(found, RefusedTier):
        return False, 0
    estimate = found.estimate
    cannot_lay_out = estimate and estimate.extents and found.needed_bytes in (estimate.disk_bytes, estimate.loading)
    return not cannot_lay_out, found.needed_bytes


def _kv_tier(strategy: KVCacheStrategy) -> Tier:
    return Tier.ALL_ON_DEVICE if strategy is KVCacheStrategy.RESIDENT else Tier.KV_IN_FILES


def _why_not(request: _Request) -> str:
    """Why the KV cache does not go to the other place."""
    if request.config.demanded_kv_strategy is not None:
        return f"KV cache strategy `{request.config.demanded_kv_strategy}` was asked for"
    return _no_files_because(request) or "not tried"


def _no_files_because(request: _Request) -> str | None:
    """Why the KV cache cannot go to files here; None where it can."""
    if not request.plan.supports_disk_cache:
        return "the plan has no disk-cache pass"
    capabilities = request.capabilities
    lacking = capabilities.passes.get(PassId.DISK_CACHE, "not known to this worker")
    if lacking is None:
        lacking = capabilities.kv_strategies.get(KVCacheStrategy.PAGED, "not known to this worker")
    return lacking


def _no_offload_because(room: _Room, tier: Tier) -> str | None:
    """Why layers cannot leave this device so; None where they can."""
    request = room.request
    pinned = 0 < request.config.offload_gpu_layers < request.profile.layer_count
    pass_id = PassId.GPU_OFFLOAD if pinned else PassId.CPU_OFFLOAD
    if request.has_demanded_layers and not pinned and tier is Tier.LAYERS_FROM_DISK:
        return "layers in host memory were asked for"
    if pass_id not in request.plan.specialization_pass_ids:
        return f"the plan has no {pass_id} pass"
    lacking = request.capabilities.passes.get(pass_id, "not known to this worker")
    if lacking is not None:
        return f"{pass_id}: {lacking}"
    if not request.profile.layer_bytes:
        return "the model's layers cannot be told apart"
    beyond = [layer for layer in request.config.exact_cpu_layers if layer >= len(request.profile.layer_bytes)]
    return f"layer {beyond[0]} was asked for, and the model has {len(request.profile.layer_bytes)}, from 0" if beyond else None


def _try_whole(room: _Room, tier: Tier, strategy: KVCacheStrategy) -> _Found | RefusedTier:
    """All layers on the device."""
    layout = replace(room.request.layout(room.device), kv=strategy)
    one_row = room.estimate(layout, 1)
    if not room.holds(one_row):
        return room.refuse(tier, one_row)
    low, high = 1, room.request.most_rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if room.holds(room.estimate(layout, middle)) else (low, middle - 1)
    return low, layout


def _try_offloaded(room: _Room, tier: Tier, strategy: KVCacheStrategy) -> _Found | RefusedTier:
    """Some layers pass through the device; the vocabulary, too, where that is the only way or gives more rows."""
    layout = replace(room.request.layout(room.device), kv=strategy, lays_out=room.request.lays_out)
    kept = _try_passing(room, tier, layout)
    is_full = not isinstance(kept, RefusedTier) and kept[0] == room.request.most_rows
    if is_full or tier is not Tier.LAYERS_FROM_DISK or not vocabulary_bytes(room.request.profile):
        return kept
    looked_up = _try_passing(room, tier, replace(layout, vocabulary_on_disk=True))
    return min((kept, looked_up), key=lambda found: (-_rows(found), _distance(found)))


def _rows(found: _Found | RefusedTier) -> int:
    return 0 if isinstance(found, RefusedTier) else found[0]


def _try_passing(room: _Room, tier: Tier, layout: Layout) -> _Found | RefusedTier:
    """First the most rows, then the fewest layers that pass."""
    leaving = LeavingLayers.of(room.request.profile, room.request.config, layout, from_disk=tier is Tier.LAYERS_FROM_DISK)

    def fewest(working: MemoryEstimate) -> int | None:
        if not room.has_disk_and_loads(working):
            return None
        return leaving.fewest(room.device_bytes - working.device_bytes, room.host_bytes - working.host)

    one_row = room.estimate(layout, 1)
    if fewest(one_row) is None:
        nearest = leaving.nearest(room.device_bytes - one_row.device_bytes)
        weights, host = one_row.weights + leaving.device[nearest], one_row.host + leaving.host[nearest]
        return room.refuse(tier, replace(one_row, weights=weights, host=host))
    low, high = 1, room.request.most_rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fewest(room.estimate(layout, middle)) is not None else (low, middle - 1)
    working = room.estimate(layout, low)
    position = fewest(working)
    assert position is not None
    return low, leaving.laid_out(layout, position, room.host_bytes - working.host)


def _placement(
    request: _Request, device: Device, tier: Tier, found: _Found, choice: KVChoice, refused: Sequence[RefusedTier]
) -> Placement:
    rows, layout = found
    estimate = estimate_memory(
        request.profile, layout, rows=rows, tokens=request.tokens, prompt_tokens=request.rows.longest_prompt
    )
    in_host, on_disk = len(layout.host_layers), len(layout.disk_layers)
    return Placement(
        device_id=device.device_id,
        tier=tier,
        kv_cache_strategy=layout.kv,
        micro_batch=rows,
        estimate=estimate,
        kv_details={**choice.details, "strategy_selector_applied_kv_cache_strategy": layout.kv.value},
        refused=tuple(refused),
        longest_row_tokens=request.tokens,
        layers_on_device=request.profile.layer_count - in_host - on_disk,
        layers_in_host=in_host,
        layers_on_disk=on_disk,
        host_layers=layout.host_layers,
        disk_layers=layout.disk_layers,
        vocabulary_on_disk=layout.vocabulary_on_disk,
    )
