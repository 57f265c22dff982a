"""Which KV cache strategy suits a plan on one worker? The first rule that holds decides."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ollm_service.core.capabilities import Capabilities, Device
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import ModelModality, PassId, RuntimePlan

GIB = 1024**3
_SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVChoice:
    """The chosen strategy, the rule that chose it, and why. `details` go into the finalized plan."""

    strategy: KVCacheStrategy
    rule_id: str
    reason: str
    details: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    model_size: str
    host_memory: str
    accelerator_memory: str
    is_text: bool

    @property
    def has_headroom(self) -> bool:
        return self.host_memory == "large" or self.accelerator_memory == "large"


def select_kv_strategy(plan: RuntimePlan, config: RuntimeConfig, capabilities: Capabilities, device: Device) -> KVChoice:
    """Choose where the KV cache lives. A strategy that was asked for stays; a preferred one that this worker lacks becomes the
    nearest that it has."""
    facts = _facts(plan, capabilities, device)
    strategy, rule_id, reason = _first_rule(plan, config, capabilities, facts)
    is_preference = config.demanded_kv_strategy is None and strategy is not KVCacheStrategy.RESIDENT
    if is_preference and capabilities.kv_strategies.get(strategy, "not known") is not None:
        offered = capabilities.kv_strategies.get(KVCacheStrategy.PAGED, "not known") is None
        nearest = KVCacheStrategy.PAGED if offered else KVCacheStrategy.RESIDENT
        strategy, reason = nearest, f"{reason}; this worker lacks `{strategy}`, so `{nearest}`"
    requested = config.kv_cache_strategy or "auto"
    return KVChoice(
        strategy=strategy,
        rule_id=rule_id,
        reason=reason,
        details={
            "strategy_selector_profile": config.strategy_selector_profile,
            "strategy_selector_rule_id": rule_id,
            "strategy_selector_requested_override": requested,
            "strategy_selector_selected_kv_cache_strategy": strategy.value,
            "strategy_selector_reason": reason,
            "strategy_selector_model_size_tier": facts.model_size,
            "strategy_selector_host_ram_tier": facts.host_memory,
            "strategy_selector_accelerator_memory_tier": facts.accelerator_memory,
            "strategy_selector_accelerator_kind": device.kind,
            "strategy_selector_modality_bucket": "text" if facts.is_text else "multimodal",
        },
    )


def _first_rule(
    plan: RuntimePlan, config: RuntimeConfig, capabilities: Capabilities, facts: _Facts
) -> tuple[KVCacheStrategy, str, str]:
    kv, profile = KVCacheStrategy, config.strategy_selector_profile
    if config.kv_cache_strategy is not None:
        return kv(config.kv_cache_strategy), "explicit-override", "asked for"
    if profile == "bounded-window":
        return kv.SLIDING_WINDOW_RING_BUFFER, "bounded-window-profile", "the profile bounds the window"
    if config.kv_cache_window_tokens is not None:
        return kv.SLIDING_WINDOW_RING_BUFFER, "explicit-window-budget", "a window was asked for"
    if not plan.supports_disk_cache:
        return kv.RESIDENT, "no-disk-cache-support", "the plan has no disk cache"
    lacking = capabilities.passes.get(PassId.DISK_CACHE, "not known to this worker")
    if lacking is not None:
        return kv.RESIDENT, "no-disk-cache-support", f"this worker has no disk cache: {lacking}"
    if profile == "capacity" and facts.is_text:
        return kv.QUANTIZED_COLD_TIER, "capacity-text-full-history", "capacity is wanted and the input is text"
    if profile == "capacity":
        return kv.PAGED, "capacity-multimodal-conservative", "capacity is wanted and the input is not text alone"
    if profile == "latency":
        if facts.is_text and facts.host_memory == "large" and facts.model_size in ("small", "medium"):
            return kv.RESIDENT, "latency-high-headroom-resident", "latency is wanted and memory is plentiful"
        return kv.PAGED, "latency-conservative-paged", "latency is wanted, but memory is not plentiful enough"
    if facts.is_text and facts.model_size == "small" and facts.has_headroom:
        return kv.RESIDENT, "balanced-small-model-resident", "a small model and plenty of memory"
    return kv.PAGED, "balanced-paged-default", "the balanced default"


def _facts(plan: RuntimePlan, capabilities: Capabilities, device: Device) -> _Facts:
    modalities = plan.resolved_model.capabilities.modalities
    accelerator = "none" if device.kind == "cpu" else _tier(device.memory_bytes, 8 * GIB, 24 * GIB)
    return _Facts(
        model_size=_size_tier(plan),
        host_memory=_tier(capabilities.host_memory_bytes, 16 * GIB, 64 * GIB),
        accelerator_memory=accelerator,
        is_text=modalities == (ModelModality.TEXT,),
    )


def _tier(size: int, medium: int, large: int) -> str:
    return "small" if size < medium else "medium" if size < large else "large"


def _size_tier(plan: RuntimePlan) -> str:
    resolved = plan.resolved_model
    for text in (resolved.normalized_name, resolved.reference, resolved.repo_id or ""):
        found = _SIZE_IN_NAME.search(text)
        if found:
            billions = float(found[1])
            return "small" if billions <= 4 else "medium" if billions <= 16 else "large"
    return "unknown"
