"""What does a plan need of a worker? The static part, which decides eligibility and names the class."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ollm_service.core.labels import parse_expression
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passing import passing_layers
from ollm_service.core.plan import ModelModality, PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES

SMALLEST_CACHE_BYTES = 16 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a worker must offer. Only what the user demanded is hard; preferences are left to placement.

    `memory_bytes` is what the whole model takes on one device, `offloaded_bytes` what is enough on a worker that can keep layers
    off the device; `cache_bytes` what a demanded disk cache needs at the least. They follow from the model and the options alone,
    never from the rows, so that classes stay few. `model_digest` null with `download` set means that the worker must be allowed
    to fetch that repository; one excludes the other. `kind` is the kind of model that it must run; for a model of no generic
    kind, which only its family's provider can run, the family; null where neither is known yet. `adapter` demands that it can put
    an adapter on the model, `modalities` that it has what images or sounds take, `quantization` that it has the libraries for
    weights packed in that way. Raises ValueError for a digest and a download together, InvalidExpression for a `where` that is no
    label expression.
    """

    backend_id: str
    model_digest: str | None = None
    download: str | None = None
    passes: tuple[PassId, ...] = ()
    kv_cache_strategy: str | None = None
    device: str | None = None
    dtype: str | None = None
    kind: str | None = None
    adapter: bool = False
    quantization: str | None = None
    modalities: tuple[ModelModality, ...] = (ModelModality.TEXT,)
    memory_bytes: int = 0
    offloaded_bytes: int = 0
    cache_bytes: int = 0
    where: str | None = None

    def __post_init__(self) -> None:
        if self.model_digest is not None and self.download is not None:
            raise ValueError("a plan needs a model that is there or one that is fetched, not both")
        if self.where is not None:
            parse_expression(self.where)

    def as_dict(self) -> dict[str, Any]:
        """Every field as JSON types."""
        return {
            "backend_id": self.backend_id,
            "model_digest": self.model_digest,
            "download": self.download,
            "passes": [pass_id.value for pass_id in self.passes],
            "kv_cache_strategy": self.kv_cache_strategy,
            "device": self.device,
            "dtype": self.dtype,
            "kind": self.kind,
            "adapter": self.adapter,
            "quantization": self.quantization,
            "modalities": [modality.value for modality in self.modalities],
            "memory_bytes": self.memory_bytes,
            "offloaded_bytes": self.offloaded_bytes,
            "cache_bytes": self.cache_bytes,
            "where": self.where,
        }


def class_id(requirements: Requirements) -> str:
    """The name of the class of equal requirements: 16 hex digits of the sha256 over their canonical JSON."""
    canonical = json.dumps(requirements.as_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def demanded_passes(plan: RuntimePlan, config: RuntimeConfig) -> tuple[PassId, ...]:
    """The planned passes that the user asked for explicitly, in planned order: those must not be given up."""
    wanted = {
        PassId.DISK_CACHE: config.demanded_kv_strategy not in (None, KVCacheStrategy.RESIDENT),
        PassId.MLP_CHUNKING: config.dense_projection_chunk_rows is not None,
        PassId.CPU_OFFLOAD: config.offload_cpu_layers > 0,
        PassId.GPU_OFFLOAD: config.offload_gpu_layers > 0,
        PassId.MULTIMODAL_SHELL: config.multimodal,
    }
    return tuple(pass_id for pass_id in plan.specialization_pass_ids if wanted.get(pass_id, False))


def requirements_of(
    plan: RuntimePlan, profile: ModelProfile | None, config: RuntimeConfig, *, where: str | None = None
) -> Requirements:
    """What an executable plan needs. Raises ValueError for a plan that is not executable."""
    if plan.backend_id is None:
        raise ValueError("a plan that is not executable has no requirements")
    passes = demanded_passes(plan, config)
    resolved = plan.resolved_model
    return Requirements(
        backend_id=plan.backend_id,
        model_digest=profile.digest if profile else None,
        download=None if profile else _download(resolved.repo_id, resolved.revision),
        passes=passes,
        kv_cache_strategy=config.demanded_kv_strategy,
        device=config.device,
        dtype=profile.dtype if profile else None,
        kind=_kind(plan, profile),
        adapter=config.adapter_dir is not None,
        quantization=profile.quantization if profile and profile.quantization in QUANTIZATION_LIBRARIES else None,
        modalities=resolved.capabilities.modalities if config.multimodal else (ModelModality.TEXT,),
        memory_bytes=profile.weight_bytes if profile else 0,
        offloaded_bytes=_offloaded(plan, profile) if profile else 0,
        cache_bytes=SMALLEST_CACHE_BYTES if PassId.DISK_CACHE in passes else 0,
        where=where,
    )


def _offloaded(plan: RuntimePlan, profile: ModelProfile) -> int:
    """What has to be on the device where layers may come and go: the largest of them, or the whole where none can be told.

    With moe-routing it may come without its experts.
    """
    if not plan.supports_cpu_offload or not profile.layer_bytes:
        return profile.weight_bytes
    return max(passing_layers(profile, is_routed=PassId.MOE_ROUTING in plan.specialization_pass_ids))


def _kind(plan: RuntimePlan, profile: ModelProfile | None) -> str | None:
    if profile is None:
        return None
    if plan.generic_model_kind is not None:
        return plan.generic_model_kind.value
    return profile.family.value if profile.family else None


def _download(repo_id: str | None, revision: str | None) -> str | None:
    return f"{repo_id}@{revision}" if repo_id and revision else repo_id
