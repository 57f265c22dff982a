"""What does each specialization pass do, and how did one end?"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.plan import PassId


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTraits:
    """What a pass means for a plan.

    `sets` is the support flag of RuntimePlan that a planned pass raises; `exact` promises the generic backend's greedy tokens
    in float32; `needs_accelerator` and `needs_cache_disk` are what a worker must have to apply it.
    """

    effect: str
    sets: str | None = None
    exact: bool = True
    needs_accelerator: bool = False
    needs_cache_disk: bool = False


PASS_TRAITS: Mapping[PassId, PassTraits] = MappingProxyType(
    {
        PassId.DISK_CACHE: PassTraits(effect="the KV cache may live in files", sets="supports_disk_cache", needs_cache_disk=True),
        PassId.CPU_OFFLOAD: PassTraits(
            effect="decoder layers are kept in host memory or on disk", sets="supports_cpu_offload", needs_cache_disk=True
        ),
        PassId.GPU_OFFLOAD: PassTraits(
            effect="layers are pinned on the GPU first, then on the CPU",
            sets="supports_gpu_offload",
            needs_accelerator=True,
            needs_cache_disk=True,
        ),
        PassId.MLP_CHUNKING: PassTraits(effect="the gated MLP runs over chunks of rows"),
        PassId.MOE_ROUTING: PassTraits(effect="only routed experts are loaded", needs_cache_disk=True),
        PassId.ATTENTION_REPLACEMENT: PassTraits(effect="attention is computed in linear memory"),
        PassId.MULTIMODAL_SHELL: PassTraits(effect="images or sounds go through the model's processor"),
        PassId.GDS_EXPORT_WEIGHTS: PassTraits(effect="weights are read from raw exported files"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The pass took effect in a real forward pass: `evidence` is a count or bytes with its unit, such as `41 chunks`."""

    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NotNeeded:
    """The pass had nothing to do here."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The pass could not be applied, or was applied and took no effect."""

    reason: str
    error_type: str | None = None


PassOutcome = Applied | NotNeeded | Failed


def describe(outcome: PassOutcome) -> str:
    """One line for the plan's details and for people: `applied(41 chunks)`, `not-needed(…)` or `failed(…)`."""
    match outcome:
        case Applied(evidence=evidence):
            return f"applied({evidence})"
        case NotNeeded(reason=reason):
            return f"not-needed({reason})"
        case Failed(reason=reason):
            return f"failed({reason})"
