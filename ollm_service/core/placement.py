"""How would this worker run a plan right now: on which device, with which KV strategy, how many rows at a time?

The ladder of tiers, best first: everything on the device; the KV cache in files. Each refused tier says why, in bytes.

Memory estimates (bytes; T = tokens of the longest row with its output, B = rows of a micro-batch, w = bytes of an element):
  weights      the tensors of the checkpoint
  kv           B · kv_bytes(T); with the cache in files one layer of it at a time, twice (what is read and its copy)
  activations  B · T · (4·hidden + 3·intermediate) · w for one layer at prefill, and B · T² for a left-padded mask
  logits       B · vocabulary · 8, the last position in float32 and a copy that sampling sorts
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ollm_service.core.capabilities import Capabilities, Device, LiveState
from ollm_service.core.kv_selector import KVChoice, select_kv_strategy
from ollm_service.core.matching import able_devices
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements

WORKSPACE_BYTES = 64 * 1024**2
USABLE_FRACTION = 0.9
MOST_ROWS = 64
_ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a placement is expected to need, in bytes: `device_bytes` is the sum of the first five."""

    weights: int
    kv: int
    activations: int
    logits: int
    workspace: int
    disk: int

    @property
    def device_bytes(self) -> int:
        """What has to be free on the device."""
        return self.weights + self.kv + self.activations + self.logits + self.workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedTier:
    """A tier that does not fit, with the bytes that it needs for one row and those that are free."""

    tier: str
    device_id: str
    reason: str
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The concrete choice on one worker. `micro_batch` is the most rows at a time, `kv_details` say how the KV was chosen.

    It holds for rows of up to `longest_row_tokens`, prompt and output together; a longer row is left unanswered here.
    """

    device_id: str
    tier: str
    kv_cache_strategy: KVCacheStrategy
    micro_batch: int
    estimate: MemoryEstimate
    kv_details: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[RefusedTier, ...] = ()
    longest_row_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaceable:
    """No tier fits this worker at present."""

    refused: tuple[RefusedTier, ...]

    @property
    def reason(self) -> str:
        """Every refusal in one line."""
        return "; ".join(f"{tier.device_id}, {tier.tier}: {tier.reason}" for tier in self.refused)


def place(  # noqa: PLR0913 - everything that a placement weighs
    plan: RuntimePlan,
    profile: ModelProfile,
    config: RuntimeConfig,
    requirements: Requirements,
    capabilities: Capabilities,
    live: LiveState,
    *,
    longest_row_tokens: int,
    shortest_row_tokens: int | None = None,
    micro_batch_limit: int | None = None,
) -> Placement | Unplaceable:
    """The best tier that holds at least one row of `longest_row_tokens` (prompt and output together).

    Where none does and `shortest_row_tokens` is given, the best for half as many tokens, and so on down to the shortest row: a
    few long rows must not block the rest, and the bound of a row's tokens is far above what most have.
    """
    tokens = min(longest_row_tokens, profile.max_context_tokens or longest_row_tokens)
    refused: tuple[RefusedTier, ...] = ()
    while True:
        found = _place_rows(plan, profile, config, requirements, capabilities, live, tokens, micro_batch_limit)
        if isinstance(found, Placement):
            return replace(found, refused=refused + found.refused)
        refused = refused or found.refused
        if shortest_row_tokens is None or tokens <= shortest_row_tokens:
            return Unplaceable(refused=refused)
        tokens = max(shortest_row_tokens, tokens // 2)


def _place_rows(
    plan: RuntimePlan,
    profile: ModelProfile,
    config: RuntimeConfig,
    requirements: Requirements,
    capabilities: Capabilities,
    live: LiveState,
    tokens: int,
    micro_batch_limit: int | None,
) -> Placement | Unplaceable:
    refused: list[RefusedTier] = []
    most_rows = MOST_ROWS if micro_batch_limit is None else min(MOST_ROWS, micro_batch_limit)
    for device in able_devices(requirements, capabilities):
        choice = select_kv_strategy(plan, config, capabilities, device)
        spilled = _spilled_strategy(plan, config, capabilities)
        wanted = [choice.strategy]
        if choice.strategy is not KVCacheStrategy.RESIDENT and config.demanded_kv_strategy is None:
            wanted.append(KVCacheStrategy.RESIDENT)
        elif choice.strategy is KVCacheStrategy.RESIDENT and spilled is not None:
            wanted.append(spilled)
        for strategy in wanted:
            found = _try_tier(profile, device, live, strategy, tokens, most_rows)
            if isinstance(found, RefusedTier):
                refused.append(found)
                continue
            rows, estimate = found
            return Placement(
                device_id=device.device_id,
                tier=_tier_name(strategy),
                kv_cache_strategy=strategy,
                micro_batch=rows,
                estimate=estimate,
                kv_details=_kv_details(choice, strategy),
                refused=tuple(refused),
                longest_row_tokens=tokens,
            )
    return Unplaceable(refused=tuple(refused))


def estimate_memory(profile: ModelProfile, strategy: KVCacheStrategy, *, rows: int, tokens: int) -> MemoryEstimate:
    """What `rows` rows of `tokens` tokens need; see the formulae above."""
    element = _ELEMENT_BYTES.get(profile.dtype or "", 4)
    history = rows * profile.kv_bytes(tokens)
    resident = strategy is KVCacheStrategy.RESIDENT
    width = 4 * profile.hidden_size + 3 * profile.intermediate_size
    return MemoryEstimate(
        weights=profile.weight_bytes,
        kv=history if resident else 2 * history // max(1, profile.layer_count),
        activations=rows * tokens * (width * element + tokens),
        logits=rows * profile.vocabulary_size * 8,
        workspace=WORKSPACE_BYTES,
        disk=0 if resident else history,
    )


def _try_tier(
    profile: ModelProfile, device: Device, live: LiveState, strategy: KVCacheStrategy, tokens: int, most_rows: int
) -> tuple[int, MemoryEstimate] | RefusedTier:
    free = int(live.device_free_bytes.get(device.device_id, 0) * USABLE_FRACTION)
    for rows in _halvings(most_rows):
        estimate = estimate_memory(profile, strategy, rows=rows, tokens=tokens)
        if estimate.device_bytes <= free and estimate.disk <= live.cache_free_bytes:
            return rows, estimate
    short_on_disk = estimate.device_bytes <= free
    needed, there = (estimate.disk, live.cache_free_bytes) if short_on_disk else (estimate.device_bytes, free)
    what = "cache disk" if short_on_disk else "memory"
    return RefusedTier(
        tier=_tier_name(strategy),
        device_id=device.device_id,
        reason=f"{what}: {needed:,} bytes needed for one row of {tokens:,} tokens, {there:,} free",
        needed_bytes=needed,
        free_bytes=there,
    )


def _halvings(most: int) -> list[int]:
    sizes = [max(1, most)]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _spilled_strategy(plan: RuntimePlan, config: RuntimeConfig, capabilities: Capabilities) -> KVCacheStrategy | None:
    able = plan.supports_disk_cache and capabilities.passes.get(PassId.DISK_CACHE, "not known") is None
    able = able and capabilities.kv_strategies.get(KVCacheStrategy.PAGED, "not known") is None
    return KVCacheStrategy.PAGED if able and config.demanded_kv_strategy is None else None


def _tier_name(strategy: KVCacheStrategy) -> str:
    return "all on device" if strategy is KVCacheStrategy.RESIDENT else "KV cache in files"


def _kv_details(choice: KVChoice, strategy: KVCacheStrategy) -> dict[str, str]:
    return {**choice.details, "strategy_selector_applied_kv_cache_strategy": strategy.value}
