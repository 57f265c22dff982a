"""How is one model reference intended to run? The RuntimePlan and the vocabulary that it is written in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Self


class SpecializationState(StrEnum):
    """What became of the specialization passes of a plan."""

    NOT_PLANNED = "not-planned"
    PLANNED = "planned"
    APPLIED = "applied"
    FALLBACK = "fallback"


class SupportLevel(StrEnum):
    """How well a model is supported: by a native family, by transformers' generic classes, or not at all."""

    OPTIMIZED = "optimized"
    GENERIC = "generic"
    UNSUPPORTED = "unsupported"


class GenericModelKind(StrEnum):
    """Which Auto class of transformers loads a model."""

    CAUSAL_LM = "causal-lm"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"
    SEQ2SEQ_LM = "seq2seq-lm"


class ModelModality(StrEnum):
    """What a model takes as input."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


class ModelSourceKind(StrEnum):
    """Where a model reference points."""

    BUILTIN = "builtin"
    HUGGING_FACE = "hugging-face"
    LOCAL_PATH = "local-path"
    OPAQUE = "opaque"


class NativeFamily(StrEnum):
    """The model families for which specialization passes exist."""

    LLAMA = "llama"
    GEMMA3 = "gemma3"
    GPT_OSS = "gpt-oss"
    QWEN3_NEXT = "qwen3-next"
    VOXTRAL = "voxtral"


class BackendId(StrEnum):
    """The execution backends."""

    OPTIMIZED_NATIVE = "optimized-native"
    TRANSFORMERS_GENERIC = "transformers-generic"


class PassId(StrEnum):
    """The specialization passes, in the order in which they are planned and applied."""

    DISK_CACHE = "disk-cache"
    CPU_OFFLOAD = "cpu-offload"
    GPU_OFFLOAD = "gpu-offload"
    MLP_CHUNKING = "mlp-chunking"
    MOE_ROUTING = "moe-routing"
    ATTENTION_REPLACEMENT = "attention-replacement"
    MULTIMODAL_SHELL = "multimodal-shell"
    GDS_EXPORT_WEIGHTS = "gds-export-weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityProfile:
    """What a model can do, as far as its catalog entry or its configuration tells."""

    support_level: SupportLevel
    modalities: tuple[ModelModality, ...] = (ModelModality.TEXT,)
    requires_processor: bool = False
    supports_disk_cache: bool = True
    supports_local_materialization: bool = False
    supports_specialization: bool = False
    details: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All seven fields, enums as their values."""
        return {
            "support_level": self.support_level.value,
            "modalities": [modality.value for modality in self.modalities],
            "requires_processor": self.requires_processor,
            "supports_disk_cache": self.supports_disk_cache,
            "supports_local_materialization": self.supports_local_materialization,
            "supports_specialization": self.supports_specialization,
            "details": dict(self.details),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """What a model reference turned out to mean.

    `model_path` is relative to a worker's models root, so that a stored plan holds no host's paths. `catalog_entry` is the
    alias of the built-in catalog entry, where there is one; `digest` pins the exact model files, where a worker has them.
    """

    reference: str
    source_kind: ModelSourceKind
    normalized_name: str
    capabilities: CapabilityProfile
    resolution_message: str
    model_path: PurePosixPath | None = None
    repo_id: str | None = None
    revision: str | None = None
    catalog_entry: str | None = None
    native_family: NativeFamily | None = None
    architecture: str | None = None
    model_type: str | None = None
    generic_model_kind: GenericModelKind | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.model_path is not None and (self.model_path.is_absolute() or ".." in self.model_path.parts):
            raise ValueError(f"model_path must stay inside the models root: {self.model_path}")

    @property
    def is_downloadable(self) -> bool:
        """Whether a worker could fetch it; its directory need not exist yet."""
        return self.repo_id is not None and self.model_path is not None


# The meaning of a stored RuntimePlan, kept beside it: raised when an older reader would misunderstand a newer writer.
PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePlan:
    """How one model reference is intended to run, before and after a worker has tried.

    Wrong combinations raise ValueError at construction. `details` is a read-only map of strings.
    """

    resolved_model: ResolvedModel
    backend_id: str | None
    model_path: PurePosixPath | None
    support_level: SupportLevel
    generic_model_kind: GenericModelKind | None
    supports_disk_cache: bool
    supports_cpu_offload: bool
    supports_gpu_offload: bool
    specialization_enabled: bool
    specialization_applied: bool
    specialization_provider_id: str | None
    specialization_state: SpecializationState
    reason: str
    specialization_pass_ids: tuple[PassId, ...] = ()
    applied_specialization_pass_ids: tuple[PassId, ...] = ()
    fallback_reason: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))
        for name in ("specialization_pass_ids", "applied_specialization_pass_ids"):
            object.__setattr__(self, name, tuple(PassId(pass_id) for pass_id in getattr(self, name)))
        state, planned, applied = (
            self.specialization_state,
            self.specialization_pass_ids,
            self.applied_specialization_pass_ids,
        )
        if len(set(planned)) != len(planned):
            raise ValueError("a pass is planned twice")
        if applied != tuple(pass_id for pass_id in planned if pass_id in applied):
            raise ValueError("applied passes must be planned ones, in planned order")
        if (state is SpecializationState.APPLIED) != self.specialization_applied:
            raise ValueError("specialization_applied must agree with the state `applied`")
        if applied and state is not SpecializationState.APPLIED:
            raise ValueError("only a plan in the state `applied` names applied passes")
        if state is not SpecializationState.NOT_PLANNED and self.specialization_provider_id is None:
            raise ValueError(f"the state `{state}` needs a specialization provider")
        if state is SpecializationState.NOT_PLANNED and (planned or self.specialization_enabled):
            raise ValueError("a plan without specialization plans no passes and does not enable it")
        if (state is SpecializationState.FALLBACK) != (self.fallback_reason is not None):
            raise ValueError("a fallback has a fallback_reason, and nothing else has")
        if self.backend_id is None and state is not SpecializationState.NOT_PLANNED:
            raise ValueError("a plan without a backend plans no specialization")

    def is_executable(self) -> bool:
        """Whether a backend was found that can run it."""
        return self.backend_id is not None

    def evolve(self, **changes: Any) -> Self:
        """A copy with these fields changed; the invariants are checked again."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types. `resolved_model` is left out: it is kept beside the plan, not in it."""
        return {
            "backend_id": self.backend_id,
            "model_path": None if self.model_path is None else str(self.model_path),
            "support_level": self.support_level.value,
            "generic_model_kind": None if self.generic_model_kind is None else self.generic_model_kind.value,
            "supports_disk_cache": self.supports_disk_cache,
            "supports_cpu_offload": self.supports_cpu_offload,
            "supports_gpu_offload": self.supports_gpu_offload,
            "specialization_enabled": self.specialization_enabled,
            "specialization_applied": self.specialization_applied,
            "specialization_provider_id": self.specialization_provider_id,
            "specialization_state": self.specialization_state.value,
            "reason": self.reason,
            "specialization_pass_ids": [pass_id.value for pass_id in self.specialization_pass_ids],
            "applied_specialization_pass_ids": [pass_id.value for pass_id in self.applied_specialization_pass_ids],
            "fallback_reason": self.fallback_reason,
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, resolved_model: ResolvedModel) -> Self:
        """Rebuild a plan from `as_dict()` and the model that was kept beside it.

        Raises KeyError for a missing key, ValueError for an unknown value or a contradiction.
        """
        path, kind = data["model_path"], data["generic_model_kind"]
        return cls(
            resolved_model=resolved_model,
            backend_id=data["backend_id"],
            model_path=None if path is None else PurePosixPath(path),
            support_level=SupportLevel(data["support_level"]),
            generic_model_kind=None if kind is None else GenericModelKind(kind),
            supports_disk_cache=data["supports_disk_cache"],
            supports_cpu_offload=data["supports_cpu_offload"],
            supports_gpu_offload=data["supports_gpu_offload"],
            specialization_enabled=data["specialization_enabled"],
            specialization_applied=data["specialization_applied"],
            specialization_provider_id=data["specialization_provider_id"],
            specialization_state=SpecializationState(data["specialization_state"]),
            reason=data["reason"],
            specialization_pass_ids=data["specialization_pass_ids"],
            applied_specialization_pass_ids=data["applied_specialization_pass_ids"],
            fallback_reason=data["fallback_reason"],
            details=data["details"],
        )
