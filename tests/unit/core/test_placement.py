"""Is a placement the best tier that fits, and are refused ones explained in bytes?"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.estimates import RUNTIME_BYTES, estimate_memory
from ollm_service.core.known_devices import hypothetical
from ollm_service.core.laying_out import extents_bytes, joining_host_bytes, laying_out_bytes
from ollm_service.core.layout import Layout
from ollm_service.core.leaving import offloaded_layers
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passing import DEVICE_SLOTS, EXPERT_SLOTS, HOST_SLOTS, passing_experts
from ollm_service.core.placement import (
    MOST_ROWS,
    USABLE_FRACTION,
    Placement,
    RowBounds,
    Tier,
    Unplaceable,
    place,
)
from ollm_service.core.plan import NativeFamily, PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import requirements_of
from tests.unit.core.samples import GIB, MIB, capabilities, cpu, cuda, gpt2, live, planned, profile

RESIDENT, PAGED = KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED


def placed(
    config: RuntimeConfig | None = None,
    *,
    model: ModelProfile | None = None,
    tokens: int = 100,
    shortest: int | None = None,
    limit: int | None = None,
    count: int | None = None,
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
        RowBounds(longest=tokens, shortest=shortest, count=count),
        micro_batch_limit=limit,
    )


def needed(model: ModelProfile, strategy: KVCacheStrategy, *, rows: int, tokens: int) -> int:
    """The bytes that have to be free on a processor before a runner is started, without margin."""
    layout = Layout(kv=strategy, mlp_rows=16_384, is_packed=True)
    return estimate_memory(model, layout, rows=rows, tokens=tokens).device_bytes + RUNTIME_BYTES["cpu"]


def just_enough(size: int) -> int:
    """The free memory that leaves this much usable."""
    return int(size / USABLE_FRACTION) + 1


def test_an_undemanding_plan_gets_the_preferred_tier_and_a_full_batch() -> None:
    """With room for everything the selector's choice stands, with as many rows as are ever run at a time."""
    found = placed()
    assert isinstance(found, Placement)
    assert (found.device_id, found.tier, found.kv_cache_strategy) == ("cpu", "KV cache in files", PAGED)
    assert (found.micro_batch, found.refused) == (MOST_ROWS, ())
    assert found.kv_details["strategy_selector_applied_kv_cache_strategy"] == "paged"
    assert found.kv_details["strategy_selector_rule_id"] == "balanced-paged-default"


@pytest.mark.parametrize("limit", [1, 2, 5, 255, 256, 1000])
def test_what_crashes_have_taught_is_kept_to(limit: int) -> None:
    """The micro-batch never exceeds the limit, nor the most that is ever run."""
    found = placed(limit=limit)
    assert isinstance(found, Placement)
    assert found.micro_batch == min(limit, MOST_ROWS)


def test_the_batch_shrinks_to_what_is_free() -> None:
    """As many rows as fit into nine tenths of the free memory, less what the runner takes, are run at a time."""
    config = RuntimeConfig(kv_cache_strategy="resident")
    for rows in (255, 32, 5, 1):
        free = just_enough(needed(profile(), RESIDENT, rows=rows, tokens=2048))
        found = placed(config, tokens=2048, free=live({"cpu": free}))
        assert isinstance(found, Placement)
        assert found.micro_batch == rows


def test_a_refused_tier_says_how_many_bytes_are_short() -> None:
    """Without room for one row, each tier of each device is refused with what it needs and what is usable."""
    nearly_nothing = live({"cpu": just_enough(RUNTIME_BYTES["cpu"] + MIB), "cuda:0": just_enough(RUNTIME_BYTES["cuda"] + MIB)})
    found = placed(worker=capabilities(cpu(), cuda()), free=nearly_nothing, tokens=10)
    assert isinstance(found, Unplaceable)
    usable = {"cuda:0": MIB, "cpu": MIB}
    tiers = [Tier.KV_IN_FILES, Tier.ALL_ON_DEVICE, Tier.LAYERS_IN_HOST, Tier.LAYERS_FROM_DISK]
    there = [("cuda:0", tier) for tier in tiers] + [("cpu", tier) for tier in tiers if tier is not Tier.LAYERS_IN_HOST]
    assert [(tier.device_id, tier.tier) for tier in found.refused] == there
    for tier in found.refused:
        assert tier.free_bytes == pytest.approx(usable[tier.device_id], abs=1)
        assert tier.needed_bytes > 4_000_000
        assert tier.estimate is not None
        assert tier.reason in found.reason
        if tier.tier in tiers[:2]:
            assert tier.short_of == "memory"
            assert f"{tier.needed_bytes:,} bytes needed for one row of 10 tokens, {tier.free_bytes:,} usable" in tier.reason
    reasons = {tier.reason for tier in found.refused if tier.short_of is None}
    assert reasons == {"cpu-offload: not known to this worker"}


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
    asked, *others = found.refused
    assert (asked.tier, asked.short_of) == (Tier.KV_IN_FILES, "cache disk")
    assert all(tier.short_of is None for tier in others)


def test_demanded_resident_kv_is_never_spilled() -> None:
    """Too little memory for it declines the plan though the disk is empty."""
    model = profile(layer_count=16, kv_bytes_per_token=2 * 16 * 1024 * 4)
    free = live({"cpu": just_enough(needed(model, PAGED, rows=1, tokens=2048))})
    assert isinstance(placed(RuntimeConfig(kv_cache_strategy="resident"), model=model, tokens=2048, free=free), Unplaceable)
    assert isinstance(placed(model=model, tokens=2048, free=free), Placement)


def test_preferred_resident_kv_spills_where_it_must() -> None:
    """A small model on a roomy host prefers memory; with little of it free the KV cache goes to files."""
    model = profile(name="m-1B", max_context_tokens=100_000, layer_count=16, kv_bytes_per_token=2 * 16 * 1024 * 4)
    worker = capabilities(host_memory_bytes=64 * GIB)
    roomy = placed(model=model, worker=worker)
    assert isinstance(roomy, Placement)
    assert roomy.kv_cache_strategy is RESIDENT
    tight = just_enough(needed(model, PAGED, rows=1, tokens=9000))
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
    free = live({"cpu": just_enough(needed(model, RESIDENT, rows=1, tokens=1_000))}, cache_free_bytes=0)
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


# ---------------------------------------------------------------------------------------- layers that leave the device

LAYERS = 8
OFFLOADING = dict.fromkeys((PassId.DISK_CACHE, PassId.MLP_CHUNKING, PassId.CPU_OFFLOAD, PassId.GPU_OFFLOAD))


def deep(**changes: Any) -> ModelProfile:
    """A Llama of eight layers of 100 MiB, and 200 MiB besides."""
    facts = {"layer_count": LAYERS, "weight_bytes": 1000 * MIB, "layer_bytes": (100 * MIB,) * LAYERS}
    return profile(**(facts | changes))


def offloaded(
    gpu_bytes: int,
    *,
    host_bytes: int = 8 * GIB,
    options: dict[str, Any] | None = None,
    model: ModelProfile | None = None,
    rows: int = 1,
) -> Placement | Unplaceable:
    """Place `rows` rows on a card with so much usable, after what the runner takes, beside so much usable host memory."""
    config = RuntimeConfig(kv_cache_strategy="resident", device="cuda", **(options or {}))
    free = live(
        {"cuda:0": just_enough(gpu_bytes + RUNTIME_BYTES["cuda"])}, host_free_bytes=just_enough(host_bytes + RUNTIME_BYTES["cpu"])
    )
    worker = capabilities(cpu(), cuda(memory_bytes=80 * GIB), passes=OFFLOADING)
    return placed(config, model=model or deep(), worker=worker, free=free, limit=rows)


def working_bytes(rows: int = 1) -> int:
    """What rows of 100 tokens need beside the layers, on a card."""
    layout = Layout(device_kind="cuda", mlp_rows=16_384, is_packed=True)
    return estimate_memory(deep(), layout, rows=rows, tokens=100).device_bytes - LAYERS * 100 * MIB


@pytest.mark.parametrize("leaving", [3, 4, 5, 6, 7, 8])
def test_as_many_layers_stay_on_the_card_as_fit(leaving: int) -> None:
    """Those in the middle go first; beside the ones that stay there is room for two that pass through."""
    room = (LAYERS - leaving + DEVICE_SLOTS) * 100 * MIB
    found = offloaded(working_bytes() + room)
    assert isinstance(found, Placement)
    assert found.tier is Tier.LAYERS_IN_HOST
    assert (found.layers_on_device, found.layers_in_host, found.layers_on_disk) == (LAYERS - leaving, leaving, 0)
    assert found.host_layers == tuple(range((LAYERS - leaving) // 2, (LAYERS - leaving) // 2 + leaving))
    assert found.estimate.weights == 200 * MIB + room
    assert found.estimate.host >= leaving * 100 * MIB
    assert [(tier.tier, tier.short_of) for tier in found.refused] == [
        (Tier.ALL_ON_DEVICE, "memory"),
        (Tier.KV_IN_FILES, None),
    ]


def test_a_card_without_room_for_two_layers_is_refused() -> None:
    """One that computes and one that arrives have to be there."""
    found = offloaded(working_bytes() + DEVICE_SLOTS * 100 * MIB - 1)
    assert isinstance(found, Unplaceable)
    short = [tier for tier in found.refused if tier.short_of == "memory"]
    assert [tier.tier for tier in short] == [Tier.ALL_ON_DEVICE, Tier.LAYERS_IN_HOST, Tier.LAYERS_FROM_DISK]
    assert [tier.needed_bytes - tier.free_bytes for tier in short[1:]] == pytest.approx([1, 1], abs=1)


def test_what_host_memory_does_not_hold_comes_from_disk() -> None:
    """Of the layers that leave the card as many as fit are kept in host memory beside the slots for reading."""
    beside = offloaded(working_bytes() + 4 * 100 * MIB, host_bytes=64 * MIB)
    assert isinstance(beside, Unplaceable)
    assert {tier.short_of for tier in beside.refused[2:]} == {"host memory"}
    small = estimate_memory(deep(), Layout(device_kind="cuda"), rows=1, tokens=100).host
    found = offloaded(working_bytes() + 4 * 100 * MIB, host_bytes=small + (HOST_SLOTS + 2) * 100 * MIB)
    assert isinstance(found, Placement)
    assert found.tier is Tier.LAYERS_FROM_DISK
    assert (found.layers_on_device, found.layers_in_host, found.layers_on_disk) == (2, 2, 4)
    assert (found.host_layers, found.disk_layers) == ((1, 2), (3, 4, 5, 6))
    assert found.estimate.host == small + (HOST_SLOTS + 2) * 100 * MIB
    assert found.refused[-1].short_of == "host memory"


def test_rows_go_before_layers() -> None:
    """A micro-batch of all rows is worth more than a layer that stays: the layers that leave make room for it."""
    room = working_bytes(rows=40) + (DEVICE_SLOTS + 1) * 100 * MIB
    many, one = offloaded(room, rows=40), offloaded(room, rows=1)
    assert isinstance(many, Placement)
    assert isinstance(one, Placement)
    assert (many.micro_batch, many.layers_on_device) == (40, 1)
    assert (one.micro_batch, one.layers_on_device) == (1, 1)
    assert working_bytes(rows=40) - working_bytes(rows=1) < 100 * MIB


@pytest.mark.parametrize(
    ("policy", "indices"), [("prefix", (0, 1, 2)), ("suffix", (5, 6, 7)), ("middle-band", (2, 3, 4)), ("auto", (2, 3, 4))]
)
def test_layers_that_were_asked_for_leave_exactly(policy: str, indices: tuple[int, ...]) -> None:
    """The number and the policy decide, though the whole model would fit; other tiers are declined."""
    found = offloaded(4 * GIB, options={"offload_cpu_layers": 3, "offload_cpu_policy": policy})
    assert isinstance(found, Placement)
    assert (found.tier, found.host_layers) == (Tier.LAYERS_IN_HOST, indices)
    assert {tier.reason for tier in found.refused} == {"layers in host memory were asked for"}
    tight = offloaded(working_bytes() + 4 * 100 * MIB, options={"offload_cpu_layers": 3, "offload_cpu_policy": policy})
    assert isinstance(tight, Unplaceable)


def test_layers_that_were_named_leave_exactly() -> None:
    """They need not lie together; their weights leave the card, and of the largest of them two pass through."""
    sizes = tuple((100 + number) * MIB for number in range(LAYERS))
    model = deep(layer_bytes=sizes, weight_bytes=sum(sizes) + 200 * MIB)
    found = offloaded(4 * GIB, model=model, options={"offload_cpu_policy": "exact:0,3,5-6"})
    assert isinstance(found, Placement)
    assert (found.tier, found.host_layers, found.layers_on_device) == (Tier.LAYERS_IN_HOST, (0, 3, 5, 6), 4)
    gone = sum(sizes[layer] for layer in (0, 3, 5, 6))
    assert found.estimate.weights == model.weight_bytes - gone + DEVICE_SLOTS * sizes[6]
    least = found.estimate.device_bytes
    assert isinstance(offloaded(least, model=model, options={"offload_cpu_policy": "exact:0,3,5-6"}), Placement)
    assert isinstance(offloaded(least - 1, model=model, options={"offload_cpu_policy": "exact:0,3,5-6"}), Unplaceable)


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    """The reason says how many there are."""
    found = offloaded(4 * GIB, options={"offload_cpu_policy": "exact:7-8"})
    assert isinstance(found, Unplaceable)
    assert "layer 8 was asked for, and the model has 8, from 0" in found.reason


def test_layers_that_were_pinned_to_the_card_stay_there() -> None:
    """gpu-offload fills the card from the first layer, then host memory; the rest streams. Enough for all: all on the device."""
    model = deep(
        family=NativeFamily.QWEN3_NEXT,
        architecture="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        layer_bytes=(100 * MIB,) * LAYERS,
    )
    found = offloaded(4 * GIB, model=model, options={"offload_gpu_layers": 6})
    assert isinstance(found, Placement)
    assert (found.tier, found.host_layers, found.layers_on_device) == (Tier.LAYERS_IN_HOST, (6, 7), 6)
    from_disk = offloaded(4 * GIB, host_bytes=500 * MIB, model=model, options={"offload_gpu_layers": 2})
    assert isinstance(from_disk, Placement)
    assert (from_disk.tier, from_disk.layers_on_device) == (Tier.LAYERS_FROM_DISK, 2)
    assert from_disk.layers_in_host > 0
    assert (*from_disk.host_layers, *from_disk.disk_layers) == (2, 3, 4, 5, 6, 7)
    whole = offloaded(4 * GIB, model=model, options={"offload_gpu_layers": LAYERS})
    assert isinstance(whole, Placement)
    assert (whole.tier, whole.layers_on_device) == (Tier.ALL_ON_DEVICE, LAYERS)


def test_a_processor_streams_from_disk() -> None:
    """Where memory does not hold the model, the processor reads the layers that are short, two of them in memory at a time."""
    layout = Layout(mlp_rows=16_384, is_packed=True)
    working = estimate_memory(deep(), layout, rows=1, tokens=100).device_bytes - LAYERS * 100 * MIB
    free = live({"cpu": just_enough(working + (DEVICE_SLOTS + 3) * 100 * MIB + RUNTIME_BYTES["cpu"])})
    config = RuntimeConfig(kv_cache_strategy="resident")
    found = placed(config, model=deep(), worker=capabilities(passes=OFFLOADING), free=free, limit=1)
    assert isinstance(found, Placement)
    assert (found.tier, found.disk_layers, found.host_layers) == (Tier.LAYERS_FROM_DISK, (1, 2, 3, 4, 5), ())
    unable = placed(config, model=deep(), free=free, limit=1)
    assert isinstance(unable, Unplaceable)
    assert unable.refused[-1].reason == "cpu-offload: not known to this worker"
    untold = placed(config, model=deep(layer_bytes=()), worker=capabilities(passes=OFFLOADING), free=free, limit=1)
    assert isinstance(untold, Unplaceable)
    assert untold.refused[-1].reason == "the model's layers cannot be told apart"


GB = 10**9


def huge(**changes: Any) -> ModelProfile:
    """A Llama of 80 layers, 140 GB, of which the layers have 128."""
    return deep(**({"layer_count": 80, "weight_bytes": 140 * GB, "layer_bytes": (16 * GB // 10,) * 80} | changes))


def streamed_beside(
    cache_bytes: int, *, model: ModelProfile | None = None, strategy: str = "resident", **has: Any
) -> Placement | Unplaceable:
    """Place one row on a processor with 64 GB and so much of its cache disk free."""
    free = live({"cpu": 64 * GB}, cache_free_bytes=cache_bytes, **has)
    config = RuntimeConfig(kv_cache_strategy=strategy)
    worker = capabilities(passes={**OFFLOADING, PassId.DISK_CACHE: None})
    return placed(config, model=model or huge(), worker=worker, free=free, limit=1)


def test_weights_are_streamed_only_where_the_disk_holds_them() -> None:
    """A worker that has not laid the model out yet needs the room for it; the refusal says how much, as any other does."""
    found = streamed_beside(100 * GB)
    assert isinstance(found, Unplaceable)
    refused, needed = found.refused[-1], extents_bytes(huge())
    assert 140 * GB < needed < 141 * GB
    assert (refused.tier, refused.short_of) == (Tier.LAYERS_FROM_DISK, "cache disk")
    assert (refused.needed_bytes, refused.free_bytes) == (needed, 100 * GB)
    words = "bytes needed for the weights by layers and one row of 100 tokens, 100,000,000,000 usable"
    assert refused.reason == f"cache disk: {needed:,} {words}"
    assert isinstance(streamed_beside(needed - 1), Unplaceable)
    fits = streamed_beside(needed)
    assert isinstance(fits, Placement)
    assert (fits.tier, fits.estimate.extents, fits.estimate.disk) == (Tier.LAYERS_FROM_DISK, needed, 0)


@pytest.mark.parametrize("strategy", [None, "resident"])
def test_what_only_the_disk_stands_in_the_way_of_says_so(strategy: str | None) -> None:
    """Keeping the vocabulary or the KV cache in memory would take less than the weights on disk, and would not help."""
    model = huge(**VOCABULARY)
    layout = Layout(mlp_rows=16_384, disk_layers=tuple(range(80)), vocabulary_on_disk=True, is_packed=True)
    room = estimate_memory(model, layout, rows=1, tokens=100).device_bytes + RUNTIME_BYTES["cpu"]
    free = live({"cpu": just_enough(room)}, cache_free_bytes=100 * GB)
    worker = capabilities(passes={**OFFLOADING, PassId.DISK_CACHE: None})
    found = placed(RuntimeConfig(kv_cache_strategy=strategy), model=model, worker=worker, free=free)
    assert isinstance(found, Unplaceable)
    assert found.refused[-1].short_of == "cache disk"
    free = replace(free, cache_free_bytes=200 * GB)
    assert isinstance(placed(RuntimeConfig(kv_cache_strategy=strategy), model=model, worker=worker, free=free), Placement)


def test_weights_that_are_laid_out_need_no_room() -> None:
    """The worker says which models it has; what another runner has begun counts as room, and of another model nothing does."""
    there = streamed_beside(0, laid_out=frozenset({huge().digest}))
    assert isinstance(there, Placement)
    assert there.estimate.disk_bytes == 0
    assert isinstance(streamed_beside(0, laid_out=frozenset({"e" * 64})), Unplaceable)
    assert isinstance(streamed_beside(41 * GB, begun_bytes={huge().digest: 100 * GB}), Placement)
    assert isinstance(streamed_beside(41 * GB, begun_bytes={"e" * 64: 100 * GB}), Unplaceable)


def test_an_imagined_machine_has_nothing_laid_out() -> None:
    """Its disk has to hold what it streams."""
    for size, tier in ((900 * GB, Tier.LAYERS_FROM_DISK), (1_100 * GB, None)):
        model = huge(weight_bytes=size, layer_count=400, layer_bytes=(size // 402,) * 400)
        _, offered, free = hypothetical("h200", [model])
        found = placed(RuntimeConfig(device="cuda"), model=model, worker=offered, free=free, limit=1)
        assert (found.tier if isinstance(found, Placement) else None) == tier
        assert tier is not None or found.refused[-1].short_of == "cache disk"


def test_layers_in_host_memory_come_from_extents_too() -> None:
    """Whatever leaves the device is read from there."""
    free = live({"cuda:0": 80 * GB}, host_free_bytes=200 * GB, cache_free_bytes=100 * GB)
    worker = capabilities(cpu(), cuda(memory_bytes=80 * GB), passes=OFFLOADING)
    config = RuntimeConfig(kv_cache_strategy="resident", device="cuda")
    short = placed(config, model=huge(), worker=worker, free=free, limit=1)
    assert isinstance(short, Unplaceable)
    assert [(tier.tier, tier.short_of) for tier in short.refused[2:]] == [
        (Tier.LAYERS_IN_HOST, "cache disk"),
        (Tier.LAYERS_FROM_DISK, "cache disk"),
    ]
    found = placed(config, model=huge(), worker=worker, free=replace(free, cache_free_bytes=200 * GB), limit=1)
    assert isinstance(found, Placement)
    assert found.tier is Tier.LAYERS_IN_HOST


def test_joined_experts_lie_beside_the_extents_until_the_rows_begin() -> None:
    """They are gone when the KV cache comes, so that the larger of the two counts. Where that is not known all are joined."""
    experts = {"expert_bytes": 100 * GB, "expert_count": 8, "layer_expert_bytes": (100 * GB // 80,) * 80}
    model = huge(joined_bytes=90 * GB, **experts)
    whole = extents_bytes(model)
    assert laying_out_bytes(model) == whole + 90 * GB
    assert laying_out_bytes(huge(**experts)) == whole + 100 * GB
    assert laying_out_bytes(huge(joined_bytes=0, **experts)) == whole
    assert isinstance(streamed_beside(whole + 90 * GB - 1, model=model, strategy="paged"), Unplaceable)
    found = streamed_beside(whole + 90 * GB, model=model, strategy="paged")
    assert isinstance(found, Placement)
    assert 0 < found.estimate.disk < found.estimate.joined == 90 * GB
    assert found.estimate.disk_bytes == whole + 90 * GB


def test_a_raw_export_needs_no_room_on_the_cache_disk() -> None:
    """It is in the model's own folder."""
    exported = huge(
        architecture="GptOssForCausalLM", model_type="gpt_oss", family=NativeFamily.GPT_OSS, has_gds_export=True, joined_bytes=0
    )
    worker = capabilities(passes=dict.fromkeys(PassId))
    free = live({"cpu": 64 * GB}, cache_free_bytes=0)
    found = placed(RuntimeConfig(kv_cache_strategy="resident"), model=exported, worker=worker, free=free, limit=1)
    assert isinstance(found, Placement)
    assert (found.tier, found.estimate.disk_bytes) == (Tier.LAYERS_FROM_DISK, 0)


VOCABULARY = {"vocabulary_size": 50_000, "hidden_size": 512, "embedding_bytes": 102_400_000, "head_bytes": 102_400_000}


def streamed(
    usable_bytes: int, *, model: ModelProfile, rows: int = 1, no_routing: str | None = "not here", **has: Any
) -> Placement | Unplaceable:
    """Place rows of 100 tokens on a processor with so much usable, after what the runner takes."""
    free = live({"cpu": just_enough(usable_bytes + RUNTIME_BYTES["cpu"])}, **has)
    worker = capabilities(passes={**OFFLOADING, PassId.MOE_ROUTING: no_routing})
    return placed(RuntimeConfig(kv_cache_strategy="resident"), model=model, worker=worker, free=free, limit=rows)


def streamed_bytes(model: ModelProfile, rows: int, *, on_disk: bool, is_routed: bool = False) -> int:
    """What rows of 100 tokens need where all layers come from disk."""
    layout = Layout(
        mlp_rows=None if is_routed else 16_384,
        disk_layers=tuple(range(LAYERS)),
        vocabulary_on_disk=on_disk,
        is_routed=is_routed,
        is_packed=True,
    )
    return estimate_memory(model, layout, rows=rows, tokens=100).device_bytes


def test_the_vocabulary_goes_to_disk_where_only_so_the_model_fits() -> None:
    """With room for embedding and head they stay; a byte less and they are read from disk; without them there is a least, too."""
    model = deep(**VOCABULARY)
    kept, gone = (streamed_bytes(model, 1, on_disk=on_disk) for on_disk in (False, True))
    assert gone < kept
    for usable, on_disk in ((kept, False), (kept - 1, True), (gone, True)):
        found = streamed(usable, model=model)
        assert isinstance(found, Placement)
        assert (found.tier, found.vocabulary_on_disk) == (Tier.LAYERS_FROM_DISK, on_disk)
        assert found.estimate.device_bytes <= usable
    refused = streamed(gone - 1, model=model)
    assert isinstance(refused, Unplaceable)
    assert refused.refused[-1].needed_bytes == gone


def test_the_vocabulary_goes_to_disk_where_that_gives_more_rows() -> None:
    """Its room is worth rows, each of which divides what a pass reads; where all rows fit beside it, it stays."""
    model = deep(**VOCABULARY)
    usable = streamed_bytes(model, 8, on_disk=False)
    some_rows, all_rows = streamed(usable, model=model, rows=64), streamed(usable, model=model, rows=8)
    assert isinstance(some_rows, Placement)
    assert isinstance(all_rows, Placement)
    assert some_rows.vocabulary_on_disk
    assert some_rows.micro_batch > 8
    assert (all_rows.vocabulary_on_disk, all_rows.micro_batch) == (False, 8)


def test_a_vocabulary_that_cannot_be_told_apart_stays() -> None:
    """A profile that knows no vocabulary matrix never sends one to disk."""
    model = deep(**{**VOCABULARY, "embedding_bytes": 0})
    least = streamed_bytes(model, 1, on_disk=False)
    assert isinstance(streamed(least - 1, model=model), Unplaceable)
    assert isinstance(streamed(least, model=model), Placement)


def test_experts_that_come_one_by_one_need_less_room() -> None:
    """Where the plan and the worker have moe-routing, layers pass without their experts; where the worker has not, whole."""
    model = deep(
        family=NativeFamily.QWEN3_NEXT,
        architecture="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        expert_count=10,
        experts_per_token=1,
        expert_bytes=LAYERS * 80 * MIB,
        layer_expert_bytes=(80 * MIB,) * LAYERS,
    )
    whole, routed = (streamed_bytes(model, 1, on_disk=False, is_routed=is_routed) for is_routed in (False, True))
    expert = passing_experts(model, is_routed=True)[0]
    assert whole - routed == DEVICE_SLOTS * 80 * MIB - EXPERT_SLOTS * expert
    found = streamed(routed, model=model, no_routing=None)
    assert isinstance(found, Placement)
    assert found.layers_on_disk == LAYERS
    assert found.estimate.device_bytes == routed
    assert isinstance(streamed(routed, model=model), Unplaceable)
    half = replace(model, dtype="bfloat16")
    least = streamed_bytes(half, 1, on_disk=False, is_routed=True)
    assert isinstance(streamed(least, model=half, no_routing=None), Placement)
    assert isinstance(streamed(least - 1, model=half, no_routing=None), Unplaceable)


def test_joining_experts_takes_memory_before_anything_else() -> None:
    """More than later, where they come one by one. Once the weights are laid out nothing of it is needed."""
    experts = {"expert_count": 96, "expert_bytes": LAYERS * 96 * MIB, "layer_expert_bytes": (96 * MIB,) * LAYERS}
    qwen = {"family": NativeFamily.QWEN3_NEXT, "architecture": "Qwen3NextForCausalLM", "model_type": "qwen3_next"}
    model = deep(weight_bytes=(LAYERS * 100 + 10) * MIB, joined_bytes=LAYERS * 96 * MIB, experts_per_token=1, **experts, **qwen)
    loading = estimate_memory(model, Layout(lays_out=True), rows=1, tokens=100).loading
    assert joining_host_bytes(model) == 160 * MIB < loading < 200 * MIB
    assert joining_host_bytes(replace(model, joined_bytes=0)) == 0
    assert streamed_bytes(model, 1, on_disk=False, is_routed=True) < loading
    short = streamed(loading - 1, model=model, no_routing=None)
    assert isinstance(short, Unplaceable)
    assert (short.refused[-1].short_of, short.refused[-1].needed_bytes) == ("memory", loading)
    assert short.refused[-1].reason.startswith(f"memory: {loading:,} bytes needed for the experts that are joined while")
    found = streamed(loading, model=model, no_routing=None)
    assert isinstance(found, Placement)
    assert found.process_bytes == max(loading, found.estimate.device_bytes) + RUNTIME_BYTES["cpu"]
    there = streamed(loading - 1, model=model, no_routing=None, laid_out=frozenset({model.digest}))
    assert isinstance(there, Placement)
    assert there.estimate.loading == 0
    beside = offloaded(4 * GIB, host_bytes=loading - 1, options={"offload_cpu_layers": 1}, model=model)
    assert isinstance(beside, Unplaceable)
    by_tier = {tier.tier: tier for tier in beside.refused}
    assert by_tier[Tier.LAYERS_IN_HOST].short_of == "host memory"
    assert by_tier[Tier.LAYERS_IN_HOST].needed_bytes == loading
    assert isinstance(offloaded(4 * GIB, host_bytes=loading, options={"offload_cpu_layers": 1}, model=model), Placement)


def test_no_more_rows_than_there_are() -> None:
    """A plan of three rows gets memory for three."""
    found = placed(count=3)
    assert isinstance(found, Placement)
    assert found.micro_batch == 3


@pytest.mark.parametrize("policy", ["auto", "middle-band", "prefix", "suffix"])
@pytest.mark.parametrize("total", [1, 2, 7, 8])
def test_more_layers_keep_those_of_fewer(policy: str, total: int) -> None:
    """Each policy's layers grow by one at a time, from none to all, and never beyond."""
    bands = [set(offloaded_layers(total, count, policy)) for count in range(total + 2)]
    assert [len(band) for band in bands] == [*range(total + 1), total]
    assert all(few <= more for few, more in pairwise(bands))
    assert bands[-1] == set(range(total))
