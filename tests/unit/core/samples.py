"""Small, whole examples of the core's types, each changed by keyword where a test needs it different."""

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ollm_service.core.capabilities import CacheDisk, Capabilities, Device, LiveState
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import (
    BackendId,
    CapabilityProfile,
    GenericModelKind,
    ModelSourceKind,
    NativeFamily,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel

MIB, GIB = 1024**2, 1024**3


def profile(**changes: Any) -> ModelProfile:
    """A small Llama in a folder of its own."""
    facts: dict[str, Any] = {
        "name": "tiny-llama",
        "path": PurePosixPath(changes.get("name", "tiny-llama")),
        "digest": "d" * 64,
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "family": NativeFamily.LLAMA,
        "kind": GenericModelKind.CAUSAL_LM,
        "dtype": "float32",
        "weight_bytes": 4_000_000,
        "parameter_count": 1_000_000,
        "layer_count": 4,
        "hidden_size": 64,
        "intermediate_size": 256,
        "vocabulary_size": 1000,
        "attention_heads": 4,
        "kv_bytes_per_token": 2 * 4 * 64 * 4,
        "max_context_tokens": 2048,
    }
    return ModelProfile(**(facts | changes))


def gpt2(**changes: Any) -> ModelProfile:
    """A model of no native family."""
    return profile(**({"name": "gpt2", "digest": "9" * 64, "architecture": "GPT2LMHeadModel", "family": None} | changes))


def held(model: ModelProfile | None = None, *workers: str) -> HeldModel:
    """A model that some worker has."""
    return HeldModel(profile=model or profile(), workers=workers or ("w1",))


def planned(config: RuntimeConfig | None = None, model: ModelProfile | None = None) -> RuntimePlan:
    """The plan of one model that a worker has."""
    model = model or profile()
    return plan(f"path:{model.path}", [held(model)], config or RuntimeConfig()).plan


def resolved(**changes: Any) -> ResolvedModel:
    """A resolved model that a worker has."""
    facts: dict[str, Any] = {
        "reference": "tiny-llama",
        "source_kind": ModelSourceKind.OPAQUE,
        "normalized_name": "tiny-llama",
        "capabilities": CapabilityProfile(support_level=SupportLevel.GENERIC, supports_specialization=True),
        "resolution_message": "1 worker has it.",
        "model_path": PurePosixPath("tiny-llama"),
        "native_family": NativeFamily.LLAMA,
        "architecture": "LlamaForCausalLM",
        "generic_model_kind": GenericModelKind.CAUSAL_LM,
        "digest": "d" * 64,
    }
    return ResolvedModel(**(facts | changes))


def runtime_plan(**changes: Any) -> RuntimePlan:
    """A plan built field by field, to reach combinations that planning never makes."""
    facts: dict[str, Any] = {
        "resolved_model": resolved(),
        "backend_id": BackendId.OPTIMIZED_NATIVE,
        "model_path": PurePosixPath("tiny-llama"),
        "support_level": SupportLevel.OPTIMIZED,
        "generic_model_kind": GenericModelKind.CAUSAL_LM,
        "supports_disk_cache": True,
        "supports_cpu_offload": False,
        "supports_gpu_offload": False,
        "specialization_enabled": True,
        "specialization_applied": False,
        "specialization_provider_id": "llama-native",
        "specialization_state": SpecializationState.PLANNED,
        "reason": "because",
        "specialization_pass_ids": (PassId.DISK_CACHE, PassId.MLP_CHUNKING),
    }
    return RuntimePlan(**(facts | changes))


def cpu(memory_bytes: int = 32 * GIB, **changes: Any) -> Device:
    """A processor."""
    return replace(Device(device_id="cpu", name="CPU", memory_bytes=memory_bytes), **changes)


def cuda(number: int = 0, memory_bytes: int = 8 * GIB, **changes: Any) -> Device:
    """A graphics card."""
    return replace(Device(device_id=f"cuda:{number}", name="GPU", memory_bytes=memory_bytes), **changes)


def capabilities(*devices: Device, **changes: Any) -> Capabilities:
    """A worker that can do everything that exists so far."""
    offers: dict[str, Any] = {
        "node": "node-a",
        "slots": 1,
        "devices": devices or (cpu(),),
        "host_memory_bytes": 32 * GIB,
        "backends": dict.fromkeys(BackendId),
        "passes": dict.fromkeys((PassId.DISK_CACHE, PassId.MLP_CHUNKING)),
        "kv_strategies": dict.fromkeys((KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED)),
        "models": (profile(),),
        "cache_disk": CacheDisk(path="/cache", total_bytes=100 * GIB),
    }
    return Capabilities(**(offers | changes))


def live(device_free: dict[str, int] | None = None, **changes: Any) -> LiveState:
    """A worker with everything free."""
    free: dict[str, Any] = {
        "device_free_bytes": device_free if device_free is not None else {"cpu": 32 * GIB},
        "host_free_bytes": 32 * GIB,
        "cache_free_bytes": 100 * GIB,
    }
    return LiveState(**(free | changes))
