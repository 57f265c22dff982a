"""How fast does a model run on a device? What attempts measured, and where none did, what the device's own speed allows.

B rows run together. A pass is one forward pass for one new token of each of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import cbrt
from types import MappingProxyType
from typing import Any

from ollm_service.core.capabilities import Device
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.packing import PACKED_MODELS
from ollm_service.core.profile import ModelProfile

# What a whole model reaches of a device's speed. The CPU's probe multiplies matrices as a model does, but reads what lies in its
# cache, which weights do not, and matrix products of a few rows pack all weights anew in each pass. Those are measured; of an
# accelerator's rates, which may be its data sheet's, models are said to reach about so much.
ARITHMETIC_EFFICIENCY: Mapping[str, float] = MappingProxyType({"cpu": 0.75, "cuda": 0.5, "mps": 0.5})
MEMORY_EFFICIENCY: Mapping[str, float] = MappingProxyType({"cpu": 0.12, "cuda": 0.6, "mps": 0.6})
# How often a pass goes over a KV cache in memory. In packs attention reads it, in more places than a bandwidth counts. Side by
# side it is read, written anew with one token more, and read by attention; where its tensors have mappings of their own
# (`give_back_what_is_freed`) new pages come on top.
KV_TRAFFIC: Mapping[str, int] = MappingProxyType({"cpu": 4, "cuda": 3, "mps": 3})
PACKED_KV_TRAFFIC: Mapping[str, int] = MappingProxyType({"cpu": 2, "cuda": 2, "mps": 2})
# What Python and starting operations take, whatever the device: for a layer, for its experts, for a pass around the layers;
# for a row's text to tokens and back; for a plan from its claim to its record; for a model's modules before its weights are read.
# Measured on a CPU with models of the smallest width.
LAYER_SECONDS, EXPERTS_SECONDS, PASS_SECONDS = 5e-4, 5e-4, 1e-3
ROW_SECONDS, PLAN_SECONDS, LOAD_SECONDS = 1.5e-4, 0.05, 0.4
# Bytes a second from host memory to an accelerator: PCIe 4 of 16 lanes moves about so much. Not measured.
LINK_RATE = 20e9
# Sorting one logit of a row that samples among the likeliest (top_p); it is done on the CPU.
SORT_SECONDS = 1.7e-7
# What a quote from probed speed may be wrong by, either way. What was measured varies less, the less the more attempts there are.
PROBED_SPREAD, MEASURED_SPREAD, SPREAD_OF_ONE, MOST_SPREAD = 2.5, 1.25, 1.75, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredAttempt:
    """What one attempt that succeeded has measured: the columns of its record."""

    placement: Mapping[str, Any]
    measured: Mapping[str, Any]

    def number(self, name: str) -> float:
        """A measured figure; 0 where it is missing or no number."""
        value = self.measured.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast one model runs on one device in one tier.

    `prefill` is prompt tokens per second. A pass over `rows` rows takes `pass_seconds`. Besides, each row takes `row_seconds` and
    each plan `plan_seconds`. `spread` is the factor by which the truth for as many rows may lie above or below. `attempts` counts
    what it was measured on; 0 means that it follows from the device's speed.
    """

    prefill: float
    pass_seconds: float
    rows: float
    load_seconds: float
    spread: float
    attempts: int = 0
    row_seconds: float = 0.0
    plan_seconds: float = 0.0

    def pass_seconds_of(self, rows: int, *, is_pessimistic: bool) -> float:
        """A pass over another number of rows costs the same while reading weights decides, and grows while arithmetic does."""
        more = rows / self.rows
        return self.pass_seconds * (max(1.0, more) if is_pessimistic else max(1.0, more**0.5))

    def spread_of(self, rows: int) -> float:
        """The factor for another number of rows, the larger the further it is from what the rate was measured on."""
        further = max(rows / self.rows, self.rows / rows)
        return max(self.spread, min(MOST_SPREAD, self.spread * cbrt(further)))


def measured_rate(attempts: Iterable[MeasuredAttempt], *, device_name: str, tier: str, backend_id: str) -> Rate | None:
    """The rate over the attempts on such a device, in this tier and on this backend; None where there is none."""
    alike = [
        attempt
        for attempt in attempts
        if attempt.measured.get("device") == device_name
        and attempt.placement.get("tier") == tier
        and attempt.measured.get("backend") == backend_id
        and attempt.number("prefill_seconds") > 0
    ]
    if not alike:
        return None

    def total(name: str) -> float:
        return sum(attempt.number(name) for attempt in alike)

    loads = [seconds for attempt in alike if (seconds := attempt.number("load_seconds")) > 0]
    prefill = total("prefill_tokens") / total("prefill_seconds")
    passes = total("decode_passes")
    rows = total("decode_tokens") / passes if passes else 1.0
    # Without a second token nobody has seen a pass of one token; it costs no more than the prompt's pass did.
    pass_seconds = total("decode_seconds") / passes if passes else total("prefill_seconds") / len(alike)
    # What generating took besides the passes: text to tokens and back. Older attempts do not say how long all of it was.
    beside = sum(_beside_the_passes(attempt) for attempt in alike)
    return Rate(
        prefill=prefill,
        pass_seconds=max(pass_seconds, 1e-9),
        rows=max(rows, 1.0),
        load_seconds=max(loads, default=0.0),
        spread=MEASURED_SPREAD + (SPREAD_OF_ONE - MEASURED_SPREAD) / len(alike),
        attempts=len(alike),
        plan_seconds=PLAN_SECONDS + beside / len(alike),
    )


def _beside_the_passes(attempt: MeasuredAttempt) -> float:
    passes = attempt.number("prefill_seconds") + attempt.number("decode_seconds")
    return max(0.0, attempt.number("generate_seconds") - passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the speed of a model on a device depends on besides both.

    `rows` run together, each of `prompt_tokens` and half-way through its answer of `tokens`. Of the layers `host_bytes` come from
    host memory in every pass, and `disk_bytes` from disk; `routed_bytes` of those are experts, which come if a token is sent to
    them.
    """

    rows: int
    prompt_tokens: int = 0
    tokens: int = 0
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT
    is_sampled: bool = False
    host_bytes: int = 0
    disk_bytes: int = 0
    routed_bytes: int = 0


def probed_rate(profile: ModelProfile, device: Device, run: Run, *, disk_rate: float | None) -> Rate | None:
    """What the device's probed speed allows; None where it was not probed.

    A prompt costs 2 operations for each token and parameter of the layers. A pass reads the layers and the head, goes over every
    row's KV cache, and costs those operations for each row; the two overlap little. Of a mixture of experts a token computes with
    those that it is routed to, and B rows read those that any of them meets: E·(1 - (1 - k/E)^B) of E, where one meets k. A KV
    cache in files goes through the disk, too: a prompt's once, and all of it in each pass. Layers that are not kept come while
    others compute: a pass takes at least as long as they do. Loading reads the weights.
    """
    kind = device.kind
    arithmetic = device.arithmetic.get(profile.dtype or "", 0.0) * ARITHMETIC_EFFICIENCY.get(kind, 0.0)
    memory_rate = (device.memory_rate or 0.0) * MEMORY_EFFICIENCY.get(kind, 0.0)
    if not arithmetic or not memory_rate or not profile.weight_bytes:
        return None
    disk_seconds = 1 / disk_rate if disk_rate else 0.0  # a byte's
    element = profile.element_bytes
    routed = profile.experts_per_token / profile.expert_count if profile.expert_count else 0.0
    dense = max(0, _layer_bytes(profile) - profile.expert_bytes)
    head = profile.head_bytes or profile.embedding_bytes
    rows = run.rows
    traffic = PACKED_KV_TRAFFIC if profile.model_type in PACKED_MODELS else KV_TRAFFIC
    met = 1 - (1 - routed) ** rows
    in_files = 0 if run.kv is KVCacheStrategy.RESIDENT else profile.kv_bytes_per_token
    prompt_seconds = 2 * (dense + profile.expert_bytes * routed) / element / arithmetic + in_files * disk_seconds
    pass_seconds = (
        (dense + profile.expert_bytes * met + head) / memory_rate
        + rows * 2 * (dense + profile.expert_bytes * routed + head) / element / arithmetic
        + rows * (profile.kv_bytes(run.tokens) * traffic[kind] / memory_rate + run.tokens * in_files * disk_seconds)
        + profile.layer_count * (LAYER_SECONDS + EXPERTS_SECONDS * (profile.expert_count > 0))
        + rows * profile.vocabulary_size * SORT_SECONDS * run.is_sampled
        + PASS_SECONDS
    )
    whole_seconds = max(run.host_bytes / LINK_RATE, run.disk_bytes * disk_seconds)
    prompt_seconds = max(prompt_seconds, whole_seconds / (rows * max(1, run.prompt_tokens)))  # prompts meet all experts
    brought_seconds = max(run.host_bytes / LINK_RATE, (run.disk_bytes - run.routed_bytes * (1 - met)) * disk_seconds)
    return Rate(
        prefill=1 / prompt_seconds if prompt_seconds else float("inf"),
        pass_seconds=max(pass_seconds, brought_seconds),
        rows=float(rows),
        load_seconds=LOAD_SECONDS + profile.weight_bytes * disk_seconds,
        spread=PROBED_SPREAD,
        row_seconds=ROW_SECONDS,
        plan_seconds=PLAN_SECONDS,
    )


def _layer_bytes(profile: ModelProfile) -> int:
    """The weights that a token goes through before the head: the decoder layers, or all that is not known to be other."""
    return sum(profile.layer_bytes) or profile.weight_bytes - profile.embedding_bytes - profile.head_bytes


def tokens_per_byte(attempts: Iterable[MeasuredAttempt], profile: ModelProfile) -> float:
    """How many tokens a byte of prompt becomes: as measured for this model, else as is usual for its size of vocabulary."""
    given = tokens = 0.0
    for attempt in attempts:
        given += attempt.number("prompt_bytes")
        tokens += attempt.number("prompt_tokens")
    if given and tokens:
        return tokens / given
    return 1.0 if 0 < profile.vocabulary_size < SMALLEST_SUBWORD_VOCABULARY else USUAL_TOKENS_PER_BYTE


# Vocabularies below this hold characters or bytes. Subword vocabularies make a token of about four bytes of English prose.
SMALLEST_SUBWORD_VOCABULARY = 1_000
USUAL_TOKENS_PER_BYTE = 0.25


def output_share(attempts: Iterable[MeasuredAttempt]) -> float | None:
    """Which part of the tokens that were allowed rows really made; None where nobody has measured it."""
    made = allowed = 0.0
    for attempt in attempts:
        if attempt.number("allowed_tokens"):
            made += attempt.number("completion_tokens")
            allowed += attempt.number("allowed_tokens")
    return min(1.0, made / allowed) if allowed else None
