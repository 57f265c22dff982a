"""How do models look on the wire?"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ollm_service.api.shapes import DownloadBody, download_body
from ollm_service.coordinator.models import FleetModel, Pulled, ShownModel
from ollm_service.core.catalog import CATALOG, CatalogEntry
from ollm_service.core.wire import to_json
from ollm_service.store.downloads import DownloadView


class ModelBody(BaseModel):
    """A model that a job may name: one that workers have, or one that a worker would have to fetch first.

    Sizes are in bytes, lengths in tokens. `unsafe_because` is why a folder is refused.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = Field("fleet", examples=["fleet", "catalog", "hub"])
    usable: bool
    unsafe_because: str | None = None
    path: str | None = None
    digest: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    family: str | None = None
    kind: str | None = None
    dtype: str | None = None
    weight_bytes: int | None = None
    parameter_count: int | None = None
    layer_count: int | None = None
    max_context_tokens: int | None = None
    has_chat_template: bool | None = None
    nodes: list[str] = []
    workers: list[str] = []
    downloads: list[DownloadBody] = Field([], description="Those under way, and the last one where it failed.")


class ModelsBody(BaseModel):
    """The models of the fleet, then the aliases that nobody has yet, then what else is being fetched."""

    object: Literal["list"] = "list"
    data: list[ModelBody]
    has_more: bool = False
    next: str | None = None


class ModelDetailBody(ModelBody):
    """One model with all that is known of it. Its own fields are those of the digest that most workers have."""

    alias: str | None = Field(None, description="Its name in the catalog.")
    profile: dict[str, Any] | None = Field(None, description="Everything that inspection found; null where nobody has it.")
    variants: list[ModelBody] = Field([], description="Each digest that bears the name, this one first.")
    plan: dict[str, Any] | None = Field(None, description="How a job without options would be planned now.")
    requirements: dict[str, Any] | None = Field(None, description="What that plan would need of a worker.")
    condition: str | None = Field(None, description="Why such a plan would wait.")
    problem: str | None = Field(None, description="Why there is no such plan.")


class DownloadsBody(BaseModel):
    """Downloads, the newest first."""

    object: Literal["list"] = "list"
    data: list[DownloadBody]
    has_more: bool = False
    next: str | None = None


class PullBody(BaseModel):
    """What asking for a model has led to. `download` is null where the nodes in `held_by` have it already."""

    object: Literal["pull"] = "pull"
    model: str
    held_by: list[str]
    download: DownloadBody | None


def models_body(models: Sequence[FleetModel], downloads: Iterable[DownloadView]) -> ModelsBody:
    """The models of the fleet and of the catalog, each with the downloads into its folder."""
    by_folder: dict[str, list[DownloadView]] = {}
    for download in downloads:
        by_folder.setdefault(download.folder, []).append(download)
    known = [model.profile for model in models if model.profile.is_usable]
    names = {name for profile in known for name in (profile.name, profile.path.name, profile.repo_id)}
    absent = [entry for entry in CATALOG.values() if not names & {entry.alias, entry.repo_id, entry.repo_id.replace("/", "--")}]
    data = [_held_body(model, by_folder.get(model.profile.name, ())) for model in models]
    data += [_catalog_body(entry, by_folder.get(entry.alias, ())) for entry in absent]
    shown = {model.profile.name for model in models} | {entry.alias for entry in absent}
    data += [_hub_body(found) for folder, found in sorted(by_folder.items()) if folder not in shown]
    return ModelsBody(data=data)


def model_detail_body(shown: ShownModel) -> ModelDetailBody:
    """Everything of one model."""
    if shown.held:
        first = _held_body(shown.held[0], shown.downloads)
    elif shown.entry is not None:
        first = _catalog_body(shown.entry, shown.downloads)
    else:
        first = _hub_body(shown.downloads)
    drafted = shown.drafted
    return ModelDetailBody(
        **dict(first),
        alias=shown.entry.alias if shown.entry else None,
        profile=to_json(shown.held[0].profile) if shown.held else None,
        variants=[_held_body(model, ()) for model in shown.held],
        plan=drafted.planned.plan.as_dict() if drafted else None,
        requirements=drafted.requirements.as_dict() if drafted and drafted.requirements else None,
        condition=drafted.condition if drafted else None,
        problem=shown.problem,
    )


def pull_body(pulled: Pulled) -> PullBody:
    """What a pull has led to."""
    download = None if pulled.download is None else download_body(pulled.download)
    return PullBody(model=pulled.reference, held_by=list(pulled.held_by), download=download)


def _held_body(model: FleetModel, downloads: Iterable[DownloadView]) -> ModelBody:
    profile = model.profile
    # Why it once could not be fetched is no news where it is there.
    telling = [found for found in downloads if not (profile.is_usable and found.state.is_final)]
    return ModelBody(
        id=profile.name,
        digest=profile.digest,
        path=profile.path.as_posix(),
        repo_id=profile.repo_id,
        revision=profile.revision,
        architecture=profile.architecture,
        family=profile.family,
        kind=profile.kind,
        dtype=profile.dtype,
        weight_bytes=profile.weight_bytes,
        parameter_count=profile.parameter_count,
        layer_count=profile.layer_count,
        max_context_tokens=profile.max_context_tokens,
        has_chat_template=profile.has_chat_template,
        usable=profile.is_usable,
        unsafe_because=profile.unsafe_because,
        nodes=sorted({worker.node for worker in model.workers}),
        workers=[worker.worker_id for worker in model.workers],
        downloads=[download_body(download) for download in telling],
    )


def _catalog_body(entry: CatalogEntry, downloads: Iterable[DownloadView]) -> ModelBody:
    found = [download_body(download) for download in downloads]
    return ModelBody(id=entry.alias, owned_by="catalog", usable=True, repo_id=entry.repo_id, family=entry.family, downloads=found)


def _hub_body(downloads: Sequence[DownloadView]) -> ModelBody:
    first = downloads[0]
    found = [download_body(download) for download in downloads]
    return ModelBody(
        id=first.reference, owned_by="hub", usable=True, repo_id=first.repo_id, revision=first.revision, downloads=found
    )
