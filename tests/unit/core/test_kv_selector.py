"""Does each row of the KV strategy table choose what it should, and does it say why?"""

from typing import Any

import pytest

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.kv_selector import KVChoice, select_kv_strategy
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import CapabilityProfile, ModelModality, PassId, SupportLevel
from tests.unit.core.samples import GIB, capabilities, cpu, cuda, planned, profile, resolved, runtime_plan

ALL = dict.fromkeys(KVCacheStrategy)


def choose(
    config: RuntimeConfig | None = None,
    *,
    name: str = "llama-8B",
    modalities: tuple[ModelModality, ...] = (ModelModality.TEXT,),
    worker: Capabilities | None = None,
    **changes: Any,
) -> KVChoice:
    """The choice for a plan of a model with this name on a worker that offers every strategy."""
    level = CapabilityProfile(support_level=SupportLevel.OPTIMIZED, modalities=modalities)
    plan = runtime_plan(resolved_model=resolved(reference=name, normalized_name=name, capabilities=level), **changes)
    worker = worker or capabilities(kv_strategies=ALL)
    return select_kv_strategy(plan, config or RuntimeConfig(), worker, worker.main_device)


MULTIMODAL = (ModelModality.TEXT, ModelModality.IMAGE)
LARGE_HOST = capabilities(kv_strategies=ALL, host_memory_bytes=64 * GIB)
LARGE_CARD = capabilities(cpu(), cuda(0, 24 * GIB), kv_strategies=ALL, host_memory_bytes=8 * GIB)
LATENCY = RuntimeConfig(strategy_selector_profile="latency")
CAPACITY = RuntimeConfig(strategy_selector_profile="capacity")


@pytest.mark.parametrize(
    ("found", "rule", "strategy"),
    [
        (choose(RuntimeConfig(kv_cache_strategy="resident")), "explicit-override", "resident"),
        (choose(RuntimeConfig(kv_cache_strategy="paged")), "explicit-override", "paged"),
        (
            choose(RuntimeConfig(kv_cache_strategy="paged", strategy_selector_profile="bounded-window")),
            "explicit-override",
            "paged",
        ),
        (
            choose(RuntimeConfig(strategy_selector_profile="bounded-window")),
            "bounded-window-profile",
            "sliding-window-ring-buffer",
        ),
        (choose(RuntimeConfig(kv_cache_window_tokens=9)), "explicit-window-budget", "sliding-window-ring-buffer"),
        (choose(supports_disk_cache=False), "no-disk-cache-support", "resident"),
        (choose(CAPACITY, supports_disk_cache=False), "no-disk-cache-support", "resident"),
        (
            choose(CAPACITY, worker=capabilities(passes={PassId.DISK_CACHE: "no folder"})),
            "no-disk-cache-support",
            "resident",
        ),
        (choose(CAPACITY), "capacity-text-full-history", "quantized-cold-tier"),
        (choose(CAPACITY, modalities=MULTIMODAL), "capacity-multimodal-conservative", "paged"),
        (choose(LATENCY, worker=LARGE_HOST), "latency-high-headroom-resident", "resident"),
        (choose(LATENCY, worker=LARGE_HOST, name="m-4B"), "latency-high-headroom-resident", "resident"),
        (choose(LATENCY, worker=LARGE_HOST, name="m-17B"), "latency-conservative-paged", "paged"),
        (choose(LATENCY, worker=LARGE_HOST, name="m"), "latency-conservative-paged", "paged"),
        (choose(LATENCY, worker=LARGE_HOST, modalities=MULTIMODAL), "latency-conservative-paged", "paged"),
        (choose(LATENCY, worker=LARGE_CARD), "latency-conservative-paged", "paged"),
        (choose(name="m-1B", worker=LARGE_HOST), "balanced-small-model-resident", "resident"),
        (choose(name="m-1B", worker=LARGE_CARD), "balanced-small-model-resident", "resident"),
        (choose(name="m-1B"), "balanced-paged-default", "paged"),
        (choose(name="m-8B", worker=LARGE_HOST), "balanced-paged-default", "paged"),
        (choose(name="m-1B", worker=LARGE_HOST, modalities=MULTIMODAL), "balanced-paged-default", "paged"),
    ],
)
def test_the_first_rule_that_holds_decides(found: KVChoice, rule: str, strategy: str) -> None:
    """The selector's table, row by row."""
    assert (found.rule_id, found.strategy.value) == (rule, strategy)
    assert found.details["strategy_selector_rule_id"] == rule
    assert found.details["strategy_selector_selected_kv_cache_strategy"] == strategy
    assert found.reason


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("llama3-1B-chat", "small"),
        ("m-4b", "small"),
        ("m-4.1b", "medium"),
        ("Qwen2.5-0.5B-Instruct", "small"),
        ("m-16B", "medium"),
        ("Qwen3-30B-A3B", "large"),
        ("gemma-3-12b-it", "medium"),
        ("m-4bit", "unknown"),
        ("tiny", "unknown"),
    ],
)
def test_sizes_are_read_from_names(name: str, tier: str) -> None:
    """The first `<n>b` in the name counts: up to 4 small, up to 16 medium, above large."""
    assert choose(name=name).details["strategy_selector_model_size_tier"] == tier


@pytest.mark.parametrize(
    ("host", "card", "tiers"),
    [
        (16 * GIB - 1, None, ("small", "none")),
        (16 * GIB, 8 * GIB - 1, ("medium", "small")),
        (64 * GIB - 1, 8 * GIB, ("medium", "medium")),
        (64 * GIB, 24 * GIB, ("large", "large")),
    ],
)
def test_memory_tiers_have_their_borders(host: int, card: int | None, tiers: tuple[str, str]) -> None:
    """Host memory: 16 and 64 GiB; accelerator memory: 8 and 24 GiB, `none` on a processor."""
    devices = (cpu(),) if card is None else (cpu(), cuda(0, card))
    details = choose(worker=capabilities(*devices, host_memory_bytes=host, kv_strategies=ALL)).details
    assert (details["strategy_selector_host_ram_tier"], details["strategy_selector_accelerator_memory_tier"]) == tiers
    assert details["strategy_selector_accelerator_kind"] == ("cpu" if card is None else "cuda")


def test_a_preferred_strategy_that_is_lacking_becomes_the_nearest() -> None:
    """A preference gives way to what the worker has, and the reason says so."""
    paged_only = choose(CAPACITY, worker=capabilities())
    assert paged_only.strategy is KVCacheStrategy.PAGED
    assert "lacks `quantized-cold-tier`, so `paged`" in paged_only.reason
    none = choose(CAPACITY, worker=capabilities(kv_strategies={}))
    assert none.strategy is KVCacheStrategy.RESIDENT


def test_a_demanded_strategy_is_never_swapped() -> None:
    """Neither a named strategy nor a bounded window gives way: matching keeps such plans from workers that lack it."""
    worker = capabilities(kv_strategies={})
    for config, strategy in (
        (RuntimeConfig(kv_cache_strategy="paged"), KVCacheStrategy.PAGED),
        (RuntimeConfig(kv_cache_window_tokens=9), KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER),
        (RuntimeConfig(strategy_selector_profile="bounded-window"), KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER),
    ):
        assert choose(config, worker=worker).strategy is strategy


def test_resident_needs_no_offer() -> None:
    """Every worker can keep the KV cache in memory, whatever it lists."""
    worker = capabilities(kv_strategies={KVCacheStrategy.PAGED: None}, passes={PassId.DISK_CACHE: "no folder"})
    assert choose(worker=worker).strategy is KVCacheStrategy.RESIDENT


def test_a_real_plan_says_what_was_asked() -> None:
    """The details name the profile and the override, `auto` where there was none."""
    worker = capabilities()
    found = select_kv_strategy(planned(model=profile(name="m-1B")), RuntimeConfig(), worker, worker.main_device)
    assert found.details["strategy_selector_requested_override"] == "auto"
    assert found.details["strategy_selector_profile"] == "balanced"
    assert found.details["strategy_selector_modality_bucket"] == "text"
