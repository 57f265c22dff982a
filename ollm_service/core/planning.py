"""Given a model reference, what the fleet holds and the user's options: what is the RuntimePlan, and why?"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ollm_service.core.catalog import CATALOG, CatalogEntry, entry_for_repo
from ollm_service.core.errors import InvalidOption, ModelNotFound
from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import PASS_TRAITS
from ollm_service.core.plan import (
    BackendId,
    CapabilityProfile,
    GenericModelKind,
    ModelSourceKind,
    PassId,
    ResolvedModel,
    RuntimePlan,
    SpecializationState,
    SupportLevel,
)
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import PROVIDERS, SpecializationProvider, matching_providers
from ollm_service.core.reference import ModelReference, parse_reference

MOST_CHUNK_ROWS = 16_384
# The kinds that a backend runs so far; the others are recognized, and refused with that reason.
RUNNABLE_KINDS = frozenset({GenericModelKind.CAUSAL_LM})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A usable model and the ids of the workers that have it."""

    profile: ModelProfile
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with the profile that it was made from; no profile where no worker has the model yet."""

    plan: RuntimePlan
    profile: ModelProfile | None


def plan(reference: str, inventory: Sequence[HeldModel], config: RuntimeConfig) -> Planned:
    """Resolve the reference against the fleet's inventory and plan it.

    Raises InvalidReference for a malformed reference, ModelNotFound for an opaque name or path that no worker has, and
    InvalidOption where several providers match. A plan that is not executable is returned, with its reason.
    """
    parsed = parse_reference(reference)
    held = _find(parsed, inventory)
    if held is None and _catalog_entry(parsed) is None and not parsed.is_hub_id:
        raise _not_found(parsed, inventory)
    resolved = _resolve(parsed, held)
    profile = held.profile if held else None
    return Planned(plan=plan_resolved(resolved, config), profile=profile)


def plan_resolved(
    resolved: ResolvedModel, config: RuntimeConfig, providers: Sequence[SpecializationProvider] = PROVIDERS
) -> RuntimePlan:
    """Choose a backend for a resolved model: the decision table, first row that fits."""
    providers_here = () if config.adapter_dir else matching_providers(resolved, providers)
    if len(providers_here) > 1:
        names = ", ".join(provider.provider_id for provider in providers_here)
        raise InvalidOption("model", f"several specializations match this model: {names}")
    provider = providers_here[0] if providers_here else None
    awaits_download = resolved.digest is None and resolved.is_downloadable
    has_generic = resolved.generic_model_kind in RUNNABLE_KINDS or awaits_download
    if config.backend == BackendId.OPTIMIZED_NATIVE:
        if provider is None:
            return _refused(resolved, f"Backend `optimized-native` was asked for, but {_why_not_native(resolved, config)}.")
        return _native(resolved, config, provider, "asked for")
    if config.backend == BackendId.TRANSFORMERS_GENERIC:
        return _generic(resolved, config, "asked for") if has_generic else _refused(resolved, _why_not_generic(resolved))
    if config.use_specialization and provider is not None:
        return _native(resolved, config, provider, None)
    if not has_generic:
        return _refused(resolved, _why_not_generic(resolved))
    if not config.use_specialization:
        return _generic(resolved, config, "specialization was switched off")
    return _generic(resolved, config, _why_not_native(resolved, config))


def _native(resolved: ResolvedModel, config: RuntimeConfig, provider: SpecializationProvider, asked: str | None) -> RuntimePlan:
    pass_ids = _passes(resolved, config, provider)
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
    if PassId.MLP_CHUNKING in pass_ids:
        rows = config.dense_projection_chunk_rows
        details["mlp_chunking_mode"] = "explicit-rows" if rows else "adaptive-headroom"
        details["mlp_chunking_max_rows"] = str(rows or MOST_CHUNK_ROWS)
    if asked:
        details["backend_override"] = BackendId.OPTIMIZED_NATIVE.value
    family = f"{provider.provider_id} specializes the {provider.family} family"
    native = RuntimePlan(
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
        reason=f"{family} with {', '.join(pass_ids)}" + (f"; {asked}." if asked else "."),
        specialization_pass_ids=pass_ids,
        details=details,
    )
    unmet = _unmet_by(native, config)
    return _refused(resolved, unmet) if unmet else native


def _passes(resolved: ResolvedModel, config: RuntimeConfig, provider: SpecializationProvider) -> tuple[PassId, ...]:
    def wanted(pass_id: PassId) -> bool:
        if pass_id is PassId.DISK_CACHE:
            return config.use_cache and resolved.capabilities.supports_disk_cache
        return True

    return tuple(pass_id for pass_id in provider.pass_ids if wanted(pass_id))


def _generic(resolved: ResolvedModel, config: RuntimeConfig, why: str) -> RuntimePlan:
    kind = resolved.generic_model_kind
    loads = f"loads it as {kind}" if kind else "loads it once a worker has fetched it"
    details = {"source_kind": resolved.source_kind.value, **_kv_wishes(config)}
    if kind:
        details["generic_model_kind"] = kind.value
    if config.backend:
        details["backend_override"] = config.backend
    generic = _without_specialization(
        resolved,
        backend_id=BackendId.TRANSFORMERS_GENERIC,
        level=SupportLevel.GENERIC,
        reason=f"transformers-generic {loads}: {why}.",
        details=details,
    )
    unmet = _unmet_by(generic, config)
    return _refused(resolved, unmet) if unmet else generic


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
    if config.multimodal and PassId.MULTIMODAL_SHELL not in passes:
        return f"multimodal needs the multimodal-shell pass, which {backend} does not plan for this model."
    if config.adapter_dir is not None:
        return "adapter_dir is not supported by any backend yet."
    return None


def _why_not_native(resolved: ResolvedModel, config: RuntimeConfig) -> str:
    if config.adapter_dir:
        return "an adapter rules specialization out"
    if resolved.architecture is None:
        return "its architecture is not known before a worker has it"
    return f"no specialization matches {resolved.architecture}"


def _why_not_generic(resolved: ResolvedModel) -> str:
    if resolved.digest is None:
        return resolved.resolution_message
    what, kind = resolved.architecture or resolved.reference, resolved.generic_model_kind
    if kind is not None:
        return f"{what} is a model of kind `{kind}`, which no backend runs yet."
    return f"{what} is not of a kind that transformers-generic loads ({', '.join(sorted(RUNNABLE_KINDS))})."


def _catalog_entry(parsed: ModelReference) -> CatalogEntry | None:
    if parsed.scheme is None and parsed.local_path is None and parsed.identifier in CATALOG:
        return CATALOG[parsed.identifier]
    if parsed.is_hub_id and parsed.revision is None:
        return entry_for_repo(parsed.identifier)
    return None


def _find(parsed: ModelReference, inventory: Iterable[HeldModel]) -> HeldModel | None:
    entry = _catalog_entry(parsed)
    found = [held for held in inventory if held.profile.is_usable and _is_named(held.profile, parsed, entry)]
    holders: dict[str, set[str]] = defaultdict(set)
    for held in found:
        holders[held.profile.digest].update(held.workers)

    def rank(held: HeldModel) -> tuple[bool, int, str]:
        """Of several digests under one name: not a revision aside of `main`, what most workers hold, the smallest digest."""
        is_other_revision = held.profile.repo_id is not None and "main" not in held.profile.refs
        return (parsed.revision is None and is_other_revision, -len(holders[held.profile.digest]), held.profile.digest)

    return min(found, key=rank, default=None)


def _is_named(profile: ModelProfile, parsed: ModelReference, entry: CatalogEntry | None) -> bool:
    """Whether a folder is what the reference names. A folder that knows its revision is held to the one asked for."""
    if parsed.local_path is not None:
        return profile.path.as_posix() == parsed.local_path
    repo_id = entry.repo_id if entry else parsed.identifier if parsed.is_hub_id else None
    if repo_id is not None and profile.repo_id is not None:
        return profile.repo_id == repo_id and parsed.revision in (None, profile.revision, *profile.refs)
    return profile.name in ({entry.alias, entry.repo_id.replace("/", "--")} if entry else {parsed.directory_name})


def _resolve(parsed: ModelReference, held: HeldModel | None) -> ResolvedModel:
    entry = _catalog_entry(parsed)
    profile = held.profile if held else None
    repo_id = entry.repo_id if entry else parsed.identifier if parsed.is_hub_id else None
    folder = entry.alias if entry else parsed.directory_name
    path = profile.path if profile else PurePosixPath(folder) if repo_id else None
    if parsed.local_path is not None:
        source = ModelSourceKind.LOCAL_PATH
    elif entry is not None and not parsed.is_hub_id:
        source = ModelSourceKind.BUILTIN
    else:
        source = ModelSourceKind.HUGGING_FACE if parsed.is_hub_id else ModelSourceKind.OPAQUE
    architecture = profile.architecture if profile else _catalog_architecture(entry)
    return ResolvedModel(
        reference=parsed.raw,
        source_kind=source,
        normalized_name=entry.alias if entry else parsed.identifier,
        capabilities=_capabilities(entry, profile),
        resolution_message=_message(parsed, entry, held),
        model_path=path,
        repo_id=repo_id,
        revision=parsed.revision,
        catalog_entry=entry.alias if entry else None,
        native_family=profile.family if profile else entry.family if entry else None,
        architecture=architecture,
        model_type=profile.model_type if profile else None,
        generic_model_kind=profile.kind if profile else None,
        digest=profile.digest if profile else None,
    )


def _catalog_architecture(entry: CatalogEntry | None) -> str | None:
    """An alias that nobody has yet plans by its family: the family's first architecture stands for it."""
    if entry is None:
        return None
    providers = [provider for provider in PROVIDERS if provider.family is entry.family]
    return min(providers[0].architectures) if providers else None


def _capabilities(entry: CatalogEntry | None, profile: ModelProfile | None) -> CapabilityProfile:
    if entry is not None:
        return CapabilityProfile(
            support_level=SupportLevel.OPTIMIZED,
            modalities=entry.modalities,
            requires_processor=entry.requires_processor,
            supports_disk_cache=entry.supports_disk_cache,
            supports_local_materialization=True,
            supports_specialization=True,
        )
    if profile is None:
        return CapabilityProfile(
            support_level=SupportLevel.UNSUPPORTED, supports_disk_cache=False, supports_local_materialization=True
        )
    return CapabilityProfile(
        support_level=SupportLevel.GENERIC if profile.kind in RUNNABLE_KINDS else SupportLevel.UNSUPPORTED,
        modalities=profile.modalities,
        requires_processor=profile.requires_processor,
        supports_disk_cache=profile.family is not None,
        supports_local_materialization=True,
        supports_specialization=profile.family is not None,
    )


def _message(parsed: ModelReference, entry: CatalogEntry | None, held: HeldModel | None) -> str:
    if held is None:
        return f"No worker has {entry.repo_id if entry else parsed.identifier} yet; it waits for one that has or may fetch it."
    workers = "1 worker has" if len(held.workers) == 1 else f"{len(held.workers)} workers have"
    return f"{workers} it as {held.profile.path} ({held.profile.architecture}, {held.profile.weight_bytes:,} bytes)."


def _not_found(parsed: ModelReference, inventory: Sequence[HeldModel]) -> ModelNotFound:
    here = sorted({f"{held.profile.name} ({len(held.workers)} workers)" for held in inventory if held.profile.is_usable})
    return ModelNotFound(
        f"No worker has a model named `{parsed.raw}`.",
        param="model",
        remedy=f"On the fleet: {', '.join(here) or 'none'}. Aliases: {', '.join(CATALOG)}. Or name a hub id, org/name.",
    )
