"""Which model does a reference mean, given what the fleet holds?

A local path, an alias, a hub id and a folder's name are looked for in the inventory that workers advertise. Of several digests
under one name one is taken, always the same for the same fleet, and the message says which others there are.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ollm_service.core.catalog import CATALOG, CatalogEntry, entry_for_repo
from ollm_service.core.errors import ModelNotFound
from ollm_service.core.plan import CapabilityProfile, ModelSourceKind, ResolvedModel, SupportLevel
from ollm_service.core.profile import ModelProfile
from ollm_service.core.providers import GDS_EXPORT_DETAIL, PROCESSOR_DETAIL, QUANTIZATION_DETAIL
from ollm_service.core.quantization import QUANTIZATION_LIBRARIES
from ollm_service.core.reference import ModelReference

SHORT_DIGEST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A usable model and the ids of the workers that have it."""

    profile: ModelProfile
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a reference means. `profile` is None where no worker has the model yet."""

    resolved: ResolvedModel
    profile: ModelProfile | None


def resolve(parsed: ModelReference, inventory: Sequence[HeldModel], *, preferred_digest: str | None = None) -> Resolution:
    """Find the model. Raises ModelNotFound for a name, path or digest that no worker has."""
    entry = catalog_entry(parsed)
    found = sorted(_candidates(parsed, entry, inventory), key=lambda held: held.profile.digest != preferred_digest)
    if not found and (parsed.digest is not None or (entry is None and not parsed.is_hub_id)):
        raise _not_found(parsed, inventory)
    held = found[0] if found else None
    return Resolution(resolved=_resolved(parsed, entry, found), profile=held.profile if held else None)


def catalog_entry(parsed: ModelReference) -> CatalogEntry | None:
    """The entry of the catalog that a reference names, by its alias or by its repository where that bears no revision."""
    if parsed.scheme is None and parsed.local_path is None and parsed.identifier in CATALOG:
        return CATALOG[parsed.identifier]
    if parsed.is_hub_id and parsed.revision is None:
        return entry_for_repo(parsed.identifier)
    return None


def _candidates(parsed: ModelReference, entry: CatalogEntry | None, inventory: Iterable[HeldModel]) -> list[HeldModel]:
    """What answers to the name, one for each digest, the one to take first.

    That is: not a revision aside of `main`, what most workers hold, the smallest digest. Each is shown with all its workers.
    """
    found = [held for held in inventory if held.profile.is_usable and _is_named(held.profile, parsed, entry)]
    found = [held for held in found if held.profile.digest.startswith(parsed.digest or "")]
    holders: dict[str, set[str]] = defaultdict(set)
    for held in found:
        holders[held.profile.digest].update(held.workers)

    def rank(held: HeldModel) -> tuple[bool, int, str, str]:
        is_other_revision = held.profile.repo_id is not None and "main" not in held.profile.refs
        digest = held.profile.digest
        return (parsed.revision is None and is_other_revision, -len(holders[digest]), digest, held.profile.path.as_posix())

    first: dict[str, HeldModel] = {}
    for held in sorted(found, key=rank):
        digest = held.profile.digest
        first.setdefault(digest, HeldModel(profile=held.profile, workers=tuple(sorted(holders[digest]))))
    return list(first.values())


def is_named(profile: ModelProfile, parsed: ModelReference) -> bool:
    """Whether a folder is what a reference names; its name, path, repository and revision are enough to know."""
    return _is_named(profile, parsed, catalog_entry(parsed))


def _is_named(profile: ModelProfile, parsed: ModelReference, entry: CatalogEntry | None) -> bool:
    """Whether a folder is what the reference names. A folder that knows its revision is held to the one asked for."""
    if parsed.local_path is not None:
        return profile.path.as_posix() == parsed.local_path
    repo_id = entry.repo_id if entry else parsed.identifier if parsed.is_hub_id else None
    if repo_id is not None and profile.repo_id is not None:
        return profile.repo_id == repo_id and parsed.revision in (None, profile.revision, *profile.refs)
    return profile.name in ({entry.alias, entry.repo_id.replace("/", "--")} if entry else {parsed.directory_name})


def _resolved(parsed: ModelReference, entry: CatalogEntry | None, found: Sequence[HeldModel]) -> ResolvedModel:
    profile = found[0].profile if found else None
    repo_id = entry.repo_id if entry else parsed.identifier if parsed.is_hub_id else None
    folder = entry.alias if entry else parsed.directory_name
    path = profile.path if profile else PurePosixPath(folder) if repo_id else None
    if parsed.local_path is not None:
        source = ModelSourceKind.LOCAL_PATH
    elif entry is not None and not parsed.is_hub_id:
        source = ModelSourceKind.BUILTIN
    else:
        source = ModelSourceKind.HUGGING_FACE if parsed.is_hub_id else ModelSourceKind.OPAQUE
    return ResolvedModel(
        reference=parsed.raw,
        source_kind=source,
        normalized_name=entry.alias if entry else parsed.identifier,
        capabilities=_capabilities(entry, profile),
        resolution_message=_message(parsed, entry, found),
        model_path=path,
        repo_id=repo_id,
        revision=parsed.revision,
        catalog_entry=entry.alias if entry else None,
        native_family=profile.family if profile else entry.family if entry else None,
        architecture=profile.architecture if profile else None,
        model_type=profile.model_type if profile else None,
        generic_model_kind=profile.kind if profile else None,
        digest=profile.digest if profile else None,
    )


def _capabilities(entry: CatalogEntry | None, profile: ModelProfile | None) -> CapabilityProfile:
    details = _known_details(profile) if profile else {}
    if entry is not None:
        return CapabilityProfile(
            support_level=SupportLevel.OPTIMIZED,
            modalities=entry.modalities,
            requires_processor=entry.requires_processor,
            supports_disk_cache=entry.supports_disk_cache,
            supports_local_materialization=True,
            supports_specialization=True,
            details=details,
        )
    if profile is None:
        return CapabilityProfile(
            support_level=SupportLevel.UNSUPPORTED, supports_disk_cache=False, supports_local_materialization=True
        )
    return CapabilityProfile(
        support_level=SupportLevel.UNSUPPORTED if profile.kind is None else SupportLevel.GENERIC,
        modalities=profile.modalities,
        requires_processor=profile.requires_processor,
        supports_disk_cache=False,
        supports_local_materialization=True,
        supports_specialization=profile.family is not None,
        details=details,
    )


def _known_details(profile: ModelProfile) -> dict[str, str]:
    """What planning goes by beyond the fields: a raw export, the files of a processor where one is needed, packed weights."""
    details: dict[str, str] = {}
    if profile.has_gds_export:
        details[GDS_EXPORT_DETAIL] = "present"
    elif profile.gds_export_problem is not None:
        details[GDS_EXPORT_DETAIL] = profile.gds_export_problem
    if profile.requires_processor:
        details[PROCESSOR_DETAIL] = "present" if profile.has_processor else "missing"
    if profile.quantization is not None and profile.quantization in QUANTIZATION_LIBRARIES:
        details[QUANTIZATION_DETAIL] = profile.quantization
    return details


def _message(parsed: ModelReference, entry: CatalogEntry | None, found: Sequence[HeldModel]) -> str:
    if not found:
        return f"No worker has {entry.repo_id if entry else parsed.identifier} yet; it waits for one that has or may fetch it."
    taken, *others = found
    profile = taken.profile
    told = f"{_workers(taken)} it as {profile.path} ({profile.architecture}, {profile.weight_bytes:,} bytes)."
    if others:
        also = ", ".join(f"{held.profile.digest[:SHORT_DIGEST]} ({_workers(held)} it)" for held in others)
        told += f" Of {len(found)} different models of that name this is {profile.digest[:SHORT_DIGEST]}; the others: {also}."
        told += f" To choose, write {_choosable(parsed)}@sha256:DIGEST."
    return told


def _choosable(parsed: ModelReference) -> str:
    return parsed.raw.partition("@")[0]


def _workers(held: HeldModel) -> str:
    return "1 worker has" if len(held.workers) == 1 else f"{len(held.workers)} workers have"


def _not_found(parsed: ModelReference, inventory: Sequence[HeldModel]) -> ModelNotFound:
    here = sorted({f"{held.profile.name} ({len(held.workers)} workers)" for held in inventory if held.profile.is_usable})
    return ModelNotFound(
        f"No worker has a model named `{parsed.raw}`.",
        param="model",
        remedy=f"On the fleet: {', '.join(here) or 'none'}. Aliases: {', '.join(CATALOG)}. Or name a hub id, org/name.",
    )
