"""How fast does a model run, by what attempts measured and by what its device is capable of?"""

from dataclasses import replace
from typing import Any

import pytest

from ollm_service.core.capabilities import Device
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.profile import ModelProfile
from ollm_service.core.rates import (
    ARITHMETIC_EFFICIENCY,
    EXPERTS_SECONDS,
    KV_TRAFFIC,
    LAYER_SECONDS,
    LINK_RATE,
    LOAD_SECONDS,
    MEMORY_EFFICIENCY,
    MOST_SPREAD,
    PACKED_KV_TRAFFIC,
    PASS_SECONDS,
    PLAN_SECONDS,
    SORT_SECONDS,
    MeasuredAttempt,
    Rate,
    Run,
    measured_rate,
    probed_rate,
)
from tests.unit.core.samples import profile

LAYERS, WORDS = 4, 1000
# 100 million parameters in float32: 80 million in the layers, 10 million each in embedding and head.
MODEL = profile(
    weight_bytes=400_000_000,
    layer_bytes=(80_000_000,) * LAYERS,
    embedding_bytes=40_000_000,
    head_bytes=40_000_000,
    vocabulary_size=WORDS,
    kv_bytes_per_token=1_000,
)
CPU = Device(device_id="cpu", name="a CPU", memory_bytes=2**34, memory_rate=50e9, arithmetic={"float32": 100e9})
READ, COMPUTED = 50e9 * MEMORY_EFFICIENCY["cpu"], 100e9 * ARITHMETIC_EFFICIENCY["cpu"]
AROUND = LAYERS * LAYER_SECONDS + PASS_SECONDS
MEASURED = MeasuredAttempt(
    placement={"tier": "KV cache in files"},
    measured={
        "device": "a CPU",
        "backend": "optimized-native",
        "prefill_tokens": 1_000,
        "prefill_seconds": 2.0,
        "decode_tokens": 800,
        "decode_passes": 100,
        "decode_seconds": 10.0,
        "load_seconds": 3.0,
    },
)


def probed(model: ModelProfile = MODEL, device: Device = CPU, **changes: Any) -> Rate:
    """A rate from the device's speed."""
    disk_rate = changes.pop("disk_rate", None)
    rate = probed_rate(model, device, Run(**{"rows": 1, **changes}), disk_rate=disk_rate)
    assert rate is not None
    return rate


def test_measured_attempts_are_summed_over_the_same_device_tier_and_backend() -> None:
    """Rates are totals over totals; another device, tier or backend does not count."""
    others = [
        replace(MEASURED, measured={**MEASURED.measured, "device": "another"}),
        replace(MEASURED, placement={"tier": "all on device"}),
        replace(MEASURED, measured={**MEASURED.measured, "backend": "transformers-generic"}),
        replace(MEASURED, measured={"device": "a CPU", "backend": "optimized-native"}),
    ]
    rate = measured_rate(
        [MEASURED, MEASURED, *others], device_name="a CPU", tier="KV cache in files", backend_id="optimized-native"
    )
    assert rate is not None
    assert (rate.prefill, rate.pass_seconds, rate.rows, rate.load_seconds, rate.attempts) == (500, 0.1, 8, 3.0, 2)
    assert measured_rate(others, device_name="a CPU", tier="layers streamed", backend_id="optimized-native") is None


def test_a_rate_is_the_surer_the_more_attempts_there_are_and_the_nearer_they_are() -> None:
    """One attempt says less than many, and of a micro-batch of another size less, either way, up to a bound."""

    def rate(count: int) -> Rate:
        found = measured_rate([MEASURED] * count, device_name="a CPU", tier="KV cache in files", backend_id="optimized-native")
        assert found is not None
        return found

    assert [rate(count).spread_of(8) for count in (1, 2, 50)] == pytest.approx([1.75, 1.5, 1.26])
    assert rate(50).spread_of(64) == rate(50).spread_of(1) == pytest.approx(2 * 1.26)
    assert rate(1).spread_of(800) == MOST_SPREAD


def test_what_lies_around_the_passes_is_measured_too() -> None:
    """A plan costs what the service takes for it and what its attempts took besides their passes, where they say so."""

    def plan_seconds(**measured: float) -> float:
        attempts = [replace(MEASURED, measured={**MEASURED.measured, **measured})]
        rate = measured_rate(attempts, device_name="a CPU", tier="KV cache in files", backend_id="optimized-native")
        assert rate is not None
        return rate.plan_seconds

    assert plan_seconds() == PLAN_SECONDS
    assert plan_seconds(generate_seconds=12.5) == pytest.approx(PLAN_SECONDS + 0.5)


def test_what_was_not_measured_follows_from_the_device() -> None:
    """A pass reads layers and head once and computes with them for each row; a prompt computes with the layers alone."""
    for rows in (1, 64):
        expected = 360e6 / READ + rows * 2 * 90e6 / COMPUTED + AROUND
        assert probed(rows=rows).pass_seconds == pytest.approx(expected)
        assert probed(rows=rows).prefill == pytest.approx(COMPUTED / (2 * 80e6))
    assert (probed().load_seconds, probed(disk_rate=1e9).load_seconds) == pytest.approx((LOAD_SECONDS, LOAD_SECONDS + 0.4))
    assert probed().spread > 1


def test_a_device_that_was_not_probed_has_no_rate() -> None:
    """Neither without a rate of its memory nor for a kind of number that it was not probed with."""
    assert probed_rate(MODEL, replace(CPU, memory_rate=None), Run(rows=1), disk_rate=None) is None
    assert probed_rate(replace(MODEL, dtype="float16"), CPU, Run(rows=1), disk_rate=None) is None


def test_layers_that_are_not_kept_bound_a_pass() -> None:
    """From disk or over the link, they come while others compute: what is slower decides, for a prompt's pass, too."""
    kept = probed(rows=4, prompt_tokens=10, disk_rate=1e9)
    hidden = probed(rows=4, prompt_tokens=10, disk_rate=1e9, disk_bytes=1_000)
    assert hidden == kept
    streamed = probed(rows=4, prompt_tokens=10, disk_rate=1e9, disk_bytes=320_000_000)
    assert streamed.pass_seconds == pytest.approx(0.32)
    assert streamed.prefill == pytest.approx(4 * 10 / 0.32)
    offloaded = probed(rows=4, host_bytes=20_000_000_000)
    assert offloaded.pass_seconds == pytest.approx(20e9 / LINK_RATE)


def test_experts_from_disk_come_if_a_row_meets_them() -> None:
    """A pass of one row brings 2 of 8 experts, a prompt brings all of them."""
    mixture = replace(MODEL, expert_bytes=160_000_000, expert_count=8, experts_per_token=2)
    found = probed(mixture, prompt_tokens=10, disk_rate=1e8, disk_bytes=320_000_000, routed_bytes=160_000_000)
    assert found.pass_seconds == pytest.approx((160e6 + 160e6 * 2 / 8) / 1e8)
    assert found.prefill == pytest.approx(10 / 3.2)


def test_a_model_whose_layers_are_not_known_counts_all_but_its_embeddings() -> None:
    """The same weights, told apart or not, have the same rate."""
    assert probed(replace(MODEL, layer_bytes=())) == probed()


def test_a_mixture_of_experts_reads_those_that_its_rows_meet() -> None:
    """A row meets 2 of 8 experts, two rows 3.5 of them on the average; each computes with its own 2."""
    mixture = replace(MODEL, expert_bytes=160_000_000, expert_count=8, experts_per_token=2)
    dense, around = 200e6, AROUND + LAYERS * EXPERTS_SECONDS
    for rows, met in ((1, 2 / 8), (2, 3.5 / 8)):
        expected = (dense + 160e6 * met) / READ + rows * 2 * (50e6 + 10e6) / COMPUTED + around
        assert probed(mixture, rows=rows).pass_seconds == pytest.approx(expected)
    assert probed(mixture).prefill == pytest.approx(COMPUTED / (2 * (40e6 + 10e6)))


def test_a_pass_goes_over_the_kv_cache() -> None:
    """It grows with the rows' tokens; in files all of it comes from the disk besides, and a prompt's is written there."""
    rows, tokens, disk = 8, 500, 1e9
    kept = rows * tokens * 1_000
    empty, resident = probed(rows=rows, disk_rate=disk), probed(rows=rows, disk_rate=disk, tokens=tokens)
    paged = probed(rows=rows, disk_rate=disk, tokens=tokens, kv=KVCacheStrategy.PAGED)
    assert resident.pass_seconds - empty.pass_seconds == pytest.approx(kept * PACKED_KV_TRAFFIC["cpu"] / READ)
    padded = replace(MODEL, model_type="bloom")
    gone_over = probed(padded, rows=rows, tokens=tokens).pass_seconds - probed(padded, rows=rows).pass_seconds
    assert gone_over == pytest.approx(kept * KV_TRAFFIC["cpu"] / READ)
    assert paged.pass_seconds - resident.pass_seconds == pytest.approx(kept / disk)
    assert 1 / paged.prefill - 1 / resident.prefill == pytest.approx(1_000 / disk)


def test_rows_that_sample_sort_their_logits() -> None:
    """Once for each row and pass, over the whole vocabulary."""
    greedy, sampled = probed(rows=8), probed(rows=8, is_sampled=True)
    assert sampled.pass_seconds - greedy.pass_seconds == pytest.approx(8 * WORDS * SORT_SECONDS)


def test_a_tiny_model_is_bound_by_the_program_around_it() -> None:
    """No layer and no pass takes less than starting its operations does, however fast the device."""
    tiny = replace(MODEL, weight_bytes=4_000, layer_bytes=(1_000,) * LAYERS, embedding_bytes=0, head_bytes=0)
    fast = replace(CPU, memory_rate=1e15, arithmetic={"float32": 1e18})
    assert probed(tiny, fast).pass_seconds == pytest.approx(AROUND, rel=1e-3)
    assert probed(tiny, fast).plan_seconds > 0
