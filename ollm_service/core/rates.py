"""How fast does a model run on a device? What attempts measured, and where none did, what the device's own speed allows.

B rows run together. A pass is one forward pass for one new token of each of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ollm_service.core.capabilities import Device
from ollm_service.core.profile import ModelProfile

# How much of a device's probed speed a whole model reaches, from attempts on CPUs: the rest goes into attention, small operations
# and the program around them.
PROBED_EFFICIENCY = 0.5
LAYER_SECONDS = 1e-4  # about ten operations, each some microseconds to start, on any device
# What a quote from probed speed may be wrong by, either way; what was measured varies less.
PROBED_SPREAD, MEASURED_SPREAD = 2.5, 1.25
_ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


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

    `prefill` is prompt tokens per second. A pass over `rows` rows takes `pass_seconds`. `spread` is the factor by which the truth
    may lie above or below. `attempts` counts what it was measured on; 0 means that it follows from the device's speed.
    """

    prefill: float
    pass_seconds: float
    rows: float
    load_seconds: float
    spread: float
    attempts: int = 0

    def pass_seconds_of(self, rows: int, *, is_pessimistic: bool) -> float:
        """A pass over another number of rows costs the same while reading weights decides, and grows while arithmetic does."""
        more = rows / self.rows
        return self.pass_seconds * (max(1.0, more) if is_pessimistic else max(1.0, more**0.5))


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
    return Rate(
        prefill=prefill,
        pass_seconds=max(pass_seconds, 1e-9),
        rows=max(rows, 1.0),
        load_seconds=max(loads, default=0.0),
        spread=MEASURED_SPREAD,
        attempts=len(alike),
    )


def probed_rate(profile: ModelProfile, device: Device, *, rows: int, disk_rate: float | None) -> Rate | None:
    """What the device's probed speed allows; None where it was not probed.

    A prompt costs 2 operations for each parameter and token. A pass reads the weights once, and costs those operations for each
    row; the longer of the two decides, and no layer takes less than starting its operations does. A mixture of experts computes
    with the routed experts alone, and reads those of a row. Loading reads the weights from disk.
    """
    arithmetic = device.arithmetic.get(profile.dtype or "", 0.0) * PROBED_EFFICIENCY
    memory_rate = (device.memory_rate or 0.0) * PROBED_EFFICIENCY
    if not arithmetic or not memory_rate or not profile.weight_bytes:
        return None
    active = _active_bytes(profile)
    parameters = active / _ELEMENT_BYTES.get(profile.dtype or "", 4)
    return Rate(
        prefill=arithmetic / (2 * parameters),
        pass_seconds=max(active / memory_rate, 2 * parameters * rows / arithmetic, profile.layer_count * LAYER_SECONDS),
        rows=float(rows),
        load_seconds=profile.weight_bytes / disk_rate if disk_rate else 0.0,
        spread=PROBED_SPREAD,
    )


def _active_bytes(profile: ModelProfile) -> int:
    """The weights that one token goes through."""
    if not profile.expert_count:
        return profile.weight_bytes
    routed = profile.expert_bytes * profile.experts_per_token // profile.expert_count
    return profile.weight_bytes - profile.expert_bytes + routed


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
