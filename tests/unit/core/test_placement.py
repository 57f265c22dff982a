"""Is a placement the best tier that fits, and are refused ones explained in bytes?"""

import pytest

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.placement import (
    MOST_ROWS,
    USABLE_FRACTION,
    WORKSPACE_BYTES,
    MemoryEstimate,
    Placement,
    Unplaceable,
    estimate_memory,
    place,
)
from ollm_service.core.plan import PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import requirements_of
from tests.unit.core.samples import GIB, capabilities, cpu, cuda, gpt2, live, planned, profile

RESIDENT, PAGED = KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED


def placed(
    config: RuntimeConfig | None = None,
    *,
    model: ModelProfile | None = None,
    tokens: int = 100,
    shortest: int | None = None,
    limit: int | None = None,
    worker: Capabilities | None = None,
    free: LiveState | None = None,
) -> Placement | Unplaceable:
    """Place a model on a worker with everything free unless told otherwise."""
    config, model = config or RuntimeConfig(), model or profile()
    plan = planned(config, model)
    return place(
        plan,
        model,
        config,
        requirements_of(plan, model, config),
        worker or capabilities(),
        free or live(),
        longest_row_tokens=tokens,
        shortest_row_tokens=shortest,
        micro_batch_limit=limit,
    )


def test_the_estimate_is_the_sum_of_documented_parts() -> None:
    """Each component by its formula: 3 rows of 10 tokens of a model in float32."""
    model = profile()
    resident = estimate_memory(model, RESIDENT, rows=3, tokens=10)
    assert resident == MemoryEstimate(
        weights=4_000_000,
        kv=3 * 10 * model.kv_bytes_per_token,
        activations=3 * 10 * (4 * 64 + 3 * 256) * 4 + 3 * 10 * 10,
        logits=3 * 1000 * 8,
        workspace=WORKSPACE_BYTES,
        disk=0,
    )
    assert resident.device_bytes == (resident.weights + resident.kv + resident.activations + resident.logits + resident.workspace)
    paged = estimate_memory(model, PAGED, rows=3, tokens=10)
    assert (paged.kv, paged.disk) == (2 * resident.kv // 4, resident.kv)
    assert estimate_memory(profile(dtype="bfloat16"), RESIDENT, rows=1, tokens=1).activations == (4 * 64 + 3 * 256) * 2 + 1


def test_an_undemanding_plan_gets_the_preferred_tier_and_a_full_batch() -> None:
    """With room for everything the selector's choice stands, with as many rows as are ever run at a time."""
    found = placed()
    assert isinstance(found, Placement)
    assert (found.device_id, found.tier, found.kv_cache_strategy) == ("cpu", "KV cache in files", PAGED)
    assert (found.micro_batch, found.refused) == (MOST_ROWS, ())
    assert found.kv_details["strategy_selector_applied_kv_cache_strategy"] == "paged"
    assert found.kv_details["strategy_selector_rule_id"] == "balanced-paged-default"


@pytest.mark.parametrize("limit", [1, 2, 5, 63, 64, 1000])
def test_what_crashes_have_taught_is_kept_to(limit: int) -> None:
    """The micro-batch never exceeds the limit, nor the most that is ever run."""
    found = placed(limit=limit)
    assert isinstance(found, Placement)
    assert found.micro_batch == min(limit, MOST_ROWS)


def test_the_batch_shrinks_to_what_is_free() -> None:
    """The largest halving that fits into nine tenths of the free memory is taken."""
    needed = {rows: estimate_memory(profile(), RESIDENT, rows=rows, tokens=2048).device_bytes for rows in (64, 32, 16)}
    config = RuntimeConfig(kv_cache_strategy="resident")
    for rows in (64, 32, 16):
        free = int(needed[rows] / USABLE_FRACTION) + 1
        found = placed(config, tokens=2048, free=live({"cpu": free}))
        assert isinstance(found, Placement)
        assert found.micro_batch == rows


def test_a_refused_tier_says_how_many_bytes_are_short() -> None:
    """Without room for one row, each tier of each device is refused with what it needs and what is free."""
    found = placed(worker=capabilities(cpu(), cuda()), free=live({"cpu": 1000, "cuda:0": 2000}), tokens=10)
    assert isinstance(found, Unplaceable)
    assert [(tier.device_id, tier.tier, tier.free_bytes) for tier in found.refused] == [
        ("cuda:0", "KV cache in files", 1800),
        ("cuda:0", "all on device", 1800),
        ("cpu", "KV cache in files", 900),
        ("cpu", "all on device", 900),
    ]
    for tier in found.refused:
        assert tier.needed_bytes > 4_000_000
        assert f"{tier.needed_bytes:,} bytes needed for one row of 10 tokens" in tier.reason
        assert tier.reason in found.reason


def test_a_full_card_leaves_the_plan_to_the_processor() -> None:
    """The next device is tried, and the placement keeps why the first was refused."""
    found = placed(worker=capabilities(cpu(), cuda()), free=live({"cpu": GIB, "cuda:0": 0}))
    assert isinstance(found, Placement)
    assert found.device_id == "cpu"
    assert {tier.device_id for tier in found.refused} == {"cuda:0"}


def test_a_pinned_device_is_the_only_one_tried() -> None:
    """A plan that was pinned to a full card does not slip to the processor."""
    found = placed(RuntimeConfig(device="cuda"), worker=capabilities(cpu(), cuda()), free=live({"cpu": 32 * GIB, "cuda:0": 0}))
    assert isinstance(found, Unplaceable)
    assert {tier.device_id for tier in found.refused} == {"cuda:0"}


def test_a_device_that_does_not_compute_the_dtype_is_not_used() -> None:
    """The card that lacks the model's dtype is passed over."""
    worker = capabilities(cpu(dtypes=("float32",)), cuda(dtypes=("float16",)))
    found = placed(worker=worker, free=live({"cpu": GIB, "cuda:0": 8 * GIB}))
    assert isinstance(found, Placement)
    assert found.device_id == "cpu"


def test_a_full_cache_disk_keeps_the_kv_cache_resident() -> None:
    """A preferred disk tier gives way, and its refusal speaks of the disk."""
    found = placed(free=live(cache_free_bytes=1000))
    assert isinstance(found, Placement)
    assert found.kv_cache_strategy is RESIDENT
    assert found.refused[0].reason.startswith("cache disk: ")
    assert found.refused[0].free_bytes == 1000
    assert found.kv_details["strategy_selector_applied_kv_cache_strategy"] == "resident"


@pytest.mark.parametrize("config", [RuntimeConfig(kv_cache_strategy="paged"), RuntimeConfig(kv_cache_window_tokens=64)])
def test_a_demanded_disk_tier_never_gives_way(config: RuntimeConfig) -> None:
    """Where it does not fit, the plan is declined."""
    found = placed(config, free=live(cache_free_bytes=0))
    assert isinstance(found, Unplaceable)
    assert [tier.tier for tier in found.refused] == ["KV cache in files"]


def test_demanded_resident_kv_is_never_spilled() -> None:
    """Too little memory for it declines the plan though the disk is empty."""
    tight = estimate_memory(profile(), PAGED, rows=1, tokens=2048).device_bytes
    free = live({"cpu": int(tight / USABLE_FRACTION) + 1})
    assert isinstance(placed(RuntimeConfig(kv_cache_strategy="resident"), tokens=2048, free=free), Unplaceable)
    assert isinstance(placed(tokens=2048, free=free), Placement)


def test_preferred_resident_kv_spills_where_it_must() -> None:
    """A small model on a roomy host prefers memory; with little of it free the KV cache goes to files."""
    model = profile(name="m-1B", max_context_tokens=100_000)
    worker = capabilities(host_memory_bytes=64 * GIB)
    roomy = placed(model=model, worker=worker)
    assert isinstance(roomy, Placement)
    assert roomy.kv_cache_strategy is RESIDENT
    tight = int(estimate_memory(model, PAGED, rows=1, tokens=9000).device_bytes / USABLE_FRACTION) + 1
    spilled = placed(model=model, worker=worker, tokens=9000, free=live({"cpu": tight}))
    assert isinstance(spilled, Placement)
    assert (spilled.kv_cache_strategy, spilled.micro_batch) == (PAGED, 1)
    assert spilled.refused[0].tier == "all on device"
    without = capabilities(host_memory_bytes=64 * GIB, passes={PassId.DISK_CACHE: "no folder"})
    assert isinstance(placed(model=model, worker=without, tokens=9000, free=live({"cpu": tight})), Unplaceable)
    unpaged = capabilities(host_memory_bytes=64 * GIB, kv_strategies={RESIDENT: None})
    assert isinstance(placed(model=model, worker=unpaged, tokens=9000, free=live({"cpu": tight})), Unplaceable)


def test_a_row_is_never_longer_than_the_context() -> None:
    """A bound beyond the model's context is cut to it; without a known context it stands."""
    free = live({"cpu": GIB})
    config = RuntimeConfig(kv_cache_strategy="resident")
    assert placed(config, tokens=10**9, free=free) == placed(config, tokens=2048, free=free)
    assert isinstance(placed(config, model=profile(max_context_tokens=None), tokens=10**9, free=free), Unplaceable)


def test_a_few_long_rows_do_not_keep_the_others_away() -> None:
    """Where the longest row does not fit, the placement holds for the longest halving that does, and says what was refused."""
    model = profile(max_context_tokens=None)
    one_row = estimate_memory(model, RESIDENT, rows=1, tokens=1_000).device_bytes
    free = live({"cpu": int(one_row / USABLE_FRACTION) + 1}, cache_free_bytes=0)
    worker = capabilities(cpu())
    assert isinstance(placed(model=model, tokens=16_000, worker=worker, free=free), Unplaceable)
    found = placed(model=model, tokens=16_000, shortest=10, worker=worker, free=free)
    assert isinstance(found, Placement)
    assert (found.longest_row_tokens, found.micro_batch) == (1_000, 1)
    assert "16,000 tokens" in found.refused[0].reason
    assert isinstance(placed(model=model, tokens=16_000, shortest=2_000, worker=worker, free=free), Unplaceable)


def test_a_generic_plan_keeps_its_kv_cache_resident() -> None:
    """Without the disk-cache pass there is one tier."""
    found = placed(model=gpt2())
    assert isinstance(found, Placement)
    assert (found.tier, found.estimate.disk) == ("all on device", 0)


def test_a_device_without_a_reading_counts_as_full() -> None:
    """What is free must have been measured."""
    assert isinstance(placed(free=live({"cuda:7": GIB})), Unplaceable)
