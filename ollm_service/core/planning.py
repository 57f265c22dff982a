"""Given a model reference, what the fleet holds and the user's options: what is the RuntimePlan, and why?

Planning is pure and knows no host: the same input gives the same plan everywhere. What a demand would need of a worker is left to
the requirements; what no backend could meet for this model makes the plan not executable, with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ollm_service.core.decisions import Decision, Outcome, decide
from ollm_service.core.errors import InvalidOption
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import (
    BackendId,
    GenericModelKind,
    ModelModality,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import (
    GDS_EXPORT_DETAIL,
    PROCESSOR_DETAIL,
    PROVIDERS,
    QUANTIZATION_DETAIL,
    SpecializationProvider,
    has_export,
    matching_providers,
    planned_passes,
)
from ollm_service.core.reference import inner_path, parse_reference
from ollm_service.core.resolution import HeldModel, resolve

MOST_CHUNK_ROWS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with the profile that it was made from; no profile where no worker has the model yet."""

    plan: RuntimePlan
    profile: ModelProfile | None


def plan(
    reference: str, inventory: Sequence[HeldModel], config: RuntimeConfig, *, preferred_digest: str | None = None
) -> Planned:
    """Resolve the reference against the fleet's inventory and plan it.

    Of several models under one name the one with `preferred_digest` is taken, where it is among them. Raises InvalidReference
    for a malformed reference or a path of an adapter or a draft that leaves the models root, ModelNotFound for an opaque name
    or path that no worker has, and InvalidOption where several providers match. A plan that is not executable is returned, with
    its reason.
    """
    if config.adapter_dir is not None:
        inner_path(config.adapter_dir, raw=config.adapter_dir, param="adapter_dir")
    if config.draft_model is not None:
        inner_path(config.draft_model, raw=config.draft_model, param="draft_model")
    found = resolve(parse_reference(reference), inventory, preferred_digest=preferred_digest)
    return Planned(plan=plan_resolved(found.resolved, config), profile=found.profile)


def plan_resolved(
    resolved: ResolvedModel, config: RuntimeConfig, providers: Sequence[SpecializationProvider] = PROVIDERS
) -> RuntimePlan:
    """Choose a backend for a resolved model by the decision table, then hold the choice against what was asked for."""
    is_packed = QUANTIZATION_DETAIL in resolved.capabilities.details
    matching = () if config.adapter_dir or is_packed else matching_providers(resolved, providers)
    if len(matching) > 1:
        names = ", ".join(provider.provider_id for provider in matching)
        raise InvalidOption("model", f"several specializations match this model: {names}")
    awaits_download = resolved.digest is None and resolved.is_downloadable
    decision = decide(
        config,
        is_specialized=bool(matching),
        is_loadable=resolved.generic_model_kind is not None or awaits_download,
    )
    provider = matching[0] if matching else None
    if decision.outcome is Outcome.NATIVE and provider is not None:
        chosen = _native(resolved, config, provider, decision)
    elif decision.outcome is Outcome.GENERIC:
        chosen = _generic(resolved, config, providers, decision)
    else:
        return _refused(resolved, _reason(decision, resolved, config, providers))
    unmet = _unmet_by(chosen, config)
    return _refused(resolved, unmet) if unmet else chosen


def _native(resolved: ResolvedModel, config: RuntimeConfig, provider: SpecializationProvider, decision: Decision) -> RuntimePlan:
    pass_ids = planned_passes(resolved, config, provider)
    flags = {PASS_TRAITS[pass_id].sets for pass_id in pass_ids}
    details = {
        "source_kind": resolved.source_kind.value,
        "provider_id": provider.provider_id,
        "specialization_provider_id": provider.provider_id,
        "native_family": provider.family.value,
        "architecture": resolved.architecture or "",
        "specialization_pass_ids": ",".join(pass_ids),
        "pass_count": str(len(pass_ids)),
        "offload_cpu_requested_layers": str(config.offload_cpu_layers),
        "offload_cpu_policy": config.offload_cpu_policy,
        "offload_gpu_layers": str(config.offload_gpu_layers),
        **_kv_wishes(config),
    }
    if config.device is not None:
        details["execution_device_type"] = config.device.partition(":")[0]
        details["specialization_device_profile"] = "host" if config.device == "cpu" else "accelerator-resident"
    if PassId.MLP_CHUNKING in pass_ids:
        rows = config.dense_projection_chunk_rows
        details["mlp_chunking_mode"] = "explicit-rows" if rows else "adaptive-headroom"
        details["mlp_chunking_max_rows"] = str(rows or MOST_CHUNK_ROWS)
    if config.backend is not None:
        details["backend_override"] = config.backend
    return RuntimePlan(
        resolved_model=resolved,
        backend_id=BackendId.OPTIMIZED_NATIVE,
        model_path=resolved.model_path,
        support_level=SupportLevel.OPTIMIZED,
        generic_model_kind=resolved.generic_model_kind,
        supports_disk_cache="supports_disk_cache" in flags,
        supports_cpu_offload="supports_cpu_offload" in flags,
        supports_gpu_offload="supports_gpu_offload" in flags,
        specialization_enabled=True,
        specialization_applied=False,
        specialization_provider_id=provider.provider_id,
        specialization_state=SpecializationState.PLANNED,
        reason=decision.reason.format(provider=provider.provider_id, family=provider.family, passes=", ".join(pass_ids)),
        specialization_pass_ids=pass_ids,
        details=details,
    )


def _generic(
    resolved: ResolvedModel, config: RuntimeConfig, providers: Sequence[SpecializationProvider], decision: Decision
) -> RuntimePlan:
    kind = resolved.generic_model_kind
    details = {"source_kind": resolved.source_kind.value, **_kv_wishes(config)}
    if kind:
        details["generic_model_kind"] = kind.value
    if config.backend:
        details["backend_override"] = config.backend
    if config.adapter_dir:
        details["adapter_dir"] = config.adapter_dir
    return _without_specialization(
        resolved,
        backend_id=BackendId.TRANSFORMERS_GENERIC,
        level=SupportLevel.GENERIC,
        reason=_reason(decision, resolved, config, providers),
        details=details,
    )


def _kv_wishes(config: RuntimeConfig) -> dict[str, str]:
    """What the selector will go by: the strategy itself is chosen at placement, where memory is known."""
    return {
        "strategy_selector_profile": config.strategy_selector_profile,
        "strategy_selector_requested_override": config.kv_cache_strategy or "auto",
    }


def _refused(resolved: ResolvedModel, reason: str) -> RuntimePlan:
    level = resolved.capabilities.support_level
    return _without_specialization(
        resolved, backend_id=None, level=level, reason=reason, details={"source_kind": resolved.source_kind.value}
    )


def _without_specialization(
    resolved: ResolvedModel, *, backend_id: BackendId | None, level: SupportLevel, reason: str, details: dict[str, str]
) -> RuntimePlan:
    return RuntimePlan(
        resolved_model=resolved,
        backend_id=backend_id,
        model_path=resolved.model_path,
        support_level=level,
        generic_model_kind=resolved.generic_model_kind,
        supports_disk_cache=False,
        supports_cpu_offload=False,
        supports_gpu_offload=False,
        specialization_enabled=False,
        specialization_applied=False,
        specialization_provider_id=None,
        specialization_state=SpecializationState.NOT_PLANNED,
        reason=reason,
        details=details,
    )


def _reason(
    decision: Decision, resolved: ResolvedModel, config: RuntimeConfig, providers: Sequence[SpecializationProvider]
) -> str:
    """The decision's reason, with what stands in its braces."""
    kind = resolved.generic_model_kind
    return decision.reason.format(
        how_it_loads=f"loads it as {kind}" if kind else "loads it once a worker has fetched it",
        why_not_native=_why_not_native(resolved, config, providers),
        why_not_generic=_why_not_generic(resolved),
    )


def _unmet_by(candidate: RuntimePlan, config: RuntimeConfig) -> str | None:
    """What the user demanded and this plan cannot give: such a plan is refused at submission, not at load."""
    backend, passes = candidate.backend_id, candidate.specialization_pass_ids
    strategy = config.demanded_kv_strategy
    if strategy not in (None, KVCacheStrategy.RESIDENT) and not candidate.supports_disk_cache:
        return f"KV cache strategy `{strategy}` needs the disk-cache pass, which {backend} does not plan for this model."
    if config.kv_cache_lifecycle == "persistent":
        return "kv_cache_lifecycle `persistent` is not offered yet: KV files live as long as one attempt."
    if config.dense_projection_chunk_rows is not None and PassId.MLP_CHUNKING not in passes:
        return f"dense_projection_chunk_rows needs the mlp-chunking pass, which {backend} does not plan for this model."
    if config.offload_cpu_layers and not candidate.supports_cpu_offload:
        return f"offload_cpu_layers needs the cpu-offload pass, which {backend} does not plan for this model."
    if config.offload_gpu_layers and not candidate.supports_gpu_offload:
        return f"offload_gpu_layers needs the gpu-offload pass, which {backend} does not plan for this model."
    return _why_not_multimodal(candidate) if config.multimodal else None


def _why_not_multimodal(candidate: RuntimePlan) -> str | None:
    """Why images and sounds cannot be given to this plan; of a model that nobody has yet, nothing is known against it."""
    model, kind = candidate.resolved_model, candidate.generic_model_kind
    if model.capabilities.details.get(PROCESSOR_DETAIL) == "missing":
        return "multimodal needs a processor: its folder has neither processor_config.json nor preprocessor_config.json."
    is_unknown = model.digest is None and candidate.backend_id == BackendId.TRANSFORMERS_GENERIC
    if PassId.MULTIMODAL_SHELL in candidate.specialization_pass_ids or is_unknown:
        return None
    if candidate.backend_id == BackendId.TRANSFORMERS_GENERIC and kind is GenericModelKind.IMAGE_TEXT_TO_TEXT:
        return None
    if set(model.capabilities.modalities) == {ModelModality.TEXT}:
        return f"multimodal was asked for, but {model.architecture or model.reference} takes text alone."
    return f"multimodal needs the multimodal-shell pass, which {candidate.backend_id} does not plan for this model."


def _why_not_native(resolved: ResolvedModel, config: RuntimeConfig, providers: Sequence[SpecializationProvider]) -> str:
    if config.adapter_dir:
        return "an adapter rules specialization out"
    packed = resolved.capabilities.details.get(QUANTIZATION_DETAIL)
    if packed is not None:
        return f"weights quantized by {packed} rule specialization out"
    if resolved.architecture is None:
        return "its architecture is not known before a worker has it" if resolved.digest is None else "it names no architecture"
    lacking = [provider for provider in providers if provider.family is resolved.native_family and provider.needs_export]
    if lacking and not has_export(resolved):
        problem = resolved.capabilities.details.get(GDS_EXPORT_DETAIL)
        return f"{lacking[0].provider_id} needs a gds_export folder, " + (f"and {problem}" if problem else "which it has not")
    return f"no specialization matches {resolved.architecture}"


def _why_not_generic(resolved: ResolvedModel) -> str:
    if resolved.digest is None:
        return resolved.resolution_message.rstrip(".")
    kinds = ", ".join(kind.value for kind in GenericModelKind)
    return f"{resolved.architecture or resolved.reference} is not of a kind that transformers-generic loads ({kinds})"
