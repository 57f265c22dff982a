"""Which models has the fleet, what is known of one of them, and who fetches what nobody has?"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ollm_service.coordinator.drafting import Draft, draft
from ollm_service.coordinator.fleet import Snapshot, capable
from ollm_service.coordinator.service import Service
from ollm_service.core.catalog import CatalogEntry
from ollm_service.core.downloading import DownloadState, HubModel, hub_model
from ollm_service.core.errors import Conflict, InvalidReference, ModelNotFound, NotFound, RequestError
from ollm_service.core.profile import ModelProfile
from ollm_service.core.reference import ModelReference, parse_reference
from ollm_service.core.resolution import catalog_entry, resolve
from ollm_service.store.downloads import DownloadView, WantedModel
from ollm_service.store.views import ClassBacklog, WorkerView

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetModel:
    """One model as folders of the same name and digest on these workers hold it."""

    profile: ModelProfile
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownModel:
    """Everything that is known of a name: each digest that bears it, the usable ones on the most workers first.

    `drafted` is how a job without options would be planned now, None where it could not be: `problem` says why.
    """

    name: str
    held: tuple[FleetModel, ...]
    entry: CatalogEntry | None
    downloads: tuple[DownloadView, ...]
    drafted: Draft | None
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What asking for a model has led to: a download, or nothing where these nodes have it already."""

    reference: str
    download: DownloadView | None
    held_by: tuple[str, ...]
    is_new: bool


def held_models(workers: Iterable[WorkerView]) -> list[FleetModel]:
    """Every folder that these workers tell of, refused ones among them, one entry for each name and digest, in that order."""
    holders: dict[tuple[str, str], list[WorkerView]] = {}
    profiles: dict[tuple[str, str], ModelProfile] = {}
    for worker in workers:
        for model in worker.capabilities.models:
            profiles.setdefault((model.name, model.digest), model)
            holders.setdefault((model.name, model.digest), []).append(worker)
    return [FleetModel(profile=profiles[key], workers=tuple(holders[key])) for key in sorted(profiles)]


def telling_downloads(downloads: Iterable[DownloadView]) -> list[DownloadView]:
    """Of each model and target the newest, `downloads` being the newest first; without those that ended well."""
    newest: dict[tuple[str, str, str | None], DownloadView] = {}
    for download in downloads:
        newest.setdefault((download.reference, download.folder, download.target), download)
    return [download for download in newest.values() if download.state is not DownloadState.DONE]


def show_model(service: Service, name: str) -> ShownModel:
    """One model by anything that a job may call it. Raises InvalidReference, and ModelNotFound where nobody knows of it."""
    parsed = parse_reference(name)
    entry = catalog_entry(parsed)
    fleet = service.fleet.fresh()
    held = [model for model in held_models(fleet.workers) if _is_called(model.profile, parsed, entry)]
    held.sort(key=lambda model: (not model.profile.is_usable, -len(model.workers), model.profile.digest))
    downloads = telling_downloads(service.store.downloads.list(reference=_on_hub(name)))
    if not held and not downloads and (entry is None or parsed.digest is not None):
        raise ModelNotFound(f"No worker has a model named `{parsed.raw}`.", param="model", remedy=_remedy(parsed))
    try:
        drafted, problem = draft(fleet, name, service.options.runtime_config({}), None), None
    except RequestError as error:
        drafted, problem = None, error.message
    return ShownModel(
        name=parsed.raw, held=tuple(held), entry=entry, downloads=tuple(downloads), drafted=drafted, problem=problem
    )


def pull(service: Service, reference: str, target: str | None) -> Pulled:
    """Ask for a model of the hub: on the node or worker `target`, or on any one that may download it.

    Raises InvalidReference, NotFound for the target, and Conflict where nobody who is asked may download it.
    """
    wanted = hub_model(reference)
    fleet = service.fleet.fresh()
    asked = [worker for worker in fleet.workers if target in (None, worker.node, worker.worker_id)]
    if target is not None and not asked:
        raise NotFound(f"No active worker has the id or the node name `{target}`.", remedy="GET /v1/workers lists them.")
    holders = _holders(reference, fleet, asked)
    if holders:
        return Pulled(reference=wanted.reference, download=None, held_by=holders, is_new=False)
    if not any(worker.capabilities.may_fetch(wanted.repo_id) for worker in asked):
        who = "No active worker" if target is None else f"{asked[0].node} is not one that"
        raise Conflict(
            f"{who} may download {wanted.repo_id}.",
            param="model",
            remedy="A worker may when it was started with OLLM_ALLOW_DOWNLOADS=true and its OLLM_DOWNLOAD_REPOS, if set, "
            "names the repository.",
        )
    node = None if target is None else asked[0].node
    download, is_new = service.store.downloads.request(wanted, service.make_id("dl"), target=node)
    return Pulled(reference=wanted.reference, download=download, held_by=(), is_new=is_new)


def want_downloads(service: Service, fleet: Snapshot, backlog: Sequence[ClassBacklog]) -> int:
    """Ask for each model that queued plans wait for, that nobody has and somebody may download; how many were new.

    On a node where it ended since the newest of those plans was submitted it is not tried again, unless the worker was started
    again since. Raises DatabaseUnavailable.
    """
    needs = {waiting.class_id: waiting.requirements for waiting in backlog}
    classes = {class_id: found for class_id, found in needs.items() if found is not None and found.download is not None}
    asked = 0
    for wanted in service.store.downloads.wanted(tuple(classes)):
        try:
            model = hub_model(wanted.model)
        except InvalidReference:
            continue  # written by another release
        able = capable(classes[wanted.class_id], fleet.workers)
        nodes = _untried(able, service.store.downloads.list(reference=model.reference), model, wanted) if able else set()
        if nodes:
            download, is_new = service.store.downloads.request(model, service.make_id("dl"), nodes=nodes)
            asked += is_new
            if is_new:
                _log.info("download-wanted", extra={"download_id": download.download_id, "model": model.reference})
    return asked


def waiting_downloads(service: Service, references: Iterable[str]) -> list[DownloadView]:
    """The newest download of each of these, as `Requirements.download` names them, unless it ended well."""
    return [
        found for name in sorted(set(references)) for found in telling_downloads(service.store.downloads.list(reference=name))
    ]


def _untried(able: Iterable[WorkerView], downloads: Iterable[DownloadView], model: HubModel, wanted: WantedModel) -> set[str]:
    """The nodes that may be asked now; none while one that was is still at it, or is about to offer the model."""
    workers = {worker.worker_id: worker for worker in able}
    nodes = {worker.node for worker in able}
    for download in downloads:
        if download.folder != model.folder:
            continue
        ended = download.finished_ms
        if ended is None:
            if download.target is not None and download.target in nodes:
                return set()
            continue
        if ended < wanted.newest_ms:
            continue
        if download.is_everywhere or (download.state is DownloadState.DONE and download.worker_id in workers):
            return set()
        nodes -= {worker.node for worker in able if worker.node == download.node and worker.started_ms <= ended}
    return nodes


def _holders(reference: str, fleet: Snapshot, asked: Sequence[WorkerView]) -> tuple[str, ...]:
    """The nodes among these workers' that have the model."""
    nodes = {worker.worker_id: worker.node for worker in asked}
    models = [model for model in fleet.models if nodes.keys() & set(model.workers)]
    digest = resolve(parse_reference(reference), models).resolved.digest
    held = [model for model in models if digest is not None and model.profile.digest == digest]
    return tuple(sorted({nodes[worker] for model in held for worker in model.workers if worker in nodes}))


def _is_called(profile: ModelProfile, parsed: ModelReference, entry: CatalogEntry | None) -> bool:
    names = {parsed.raw, parsed.directory_name, profile.name if profile.path.as_posix() == parsed.local_path else None}
    repos = {parsed.identifier} if parsed.is_hub_id and parsed.revision is None else set()
    if entry is not None:
        names |= {entry.alias, entry.repo_id.replace("/", "--")}
        repos |= {entry.repo_id}
    is_called = profile.name in names or profile.repo_id in repos
    return is_called and profile.digest.startswith(parsed.digest or "")


def _on_hub(name: str) -> str:
    try:
        return hub_model(name).reference
    except InvalidReference:
        return ""  # nothing is downloaded under it


def _remedy(parsed: ModelReference) -> str:
    pull_it = f"`ollm-service models pull {parsed.raw}` has a worker fetch it. " if parsed.is_hub_id and not parsed.digest else ""
    return f"{pull_it}GET /v1/models lists those that are there."
