"""What has to be fetched from the hub for a model reference, where will it lie, and how far can a download be?"""

from dataclasses import dataclass
from enum import StrEnum

from ollm_service.core.errors import InvalidReference, shown
from ollm_service.core.reference import ModelReference, parse_reference
from ollm_service.core.resolution import catalog_entry

# A folder of such a name is read as the hub cache's own, or not at all.
_TAKEN = ("models--", "datasets--", "spaces--")


class DownloadState(StrEnum):
    """How far a download is.

    `queued` until a worker that may takes it; `running` while that one renews its lease. It then ends as one of the next two, or
    goes back to `queued` when its worker dies, leaves, or loses the hub. `done`: the worker has the whole model. `failed`: it is
    not tried again.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing happens any more."""
        return self in (DownloadState.DONE, DownloadState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A repository of the hub, at a revision unless at its main branch, and the folder of a models root that is to hold it."""

    repo_id: str
    revision: str | None
    folder: str

    @property
    def reference(self) -> str:
        """As `Requirements.download` names it: `org/name` or `org/name@revision`."""
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def hub_model(text: str) -> HubModel:
    """What a reference means on the hub. Raises InvalidReference where it names nothing there, and for a malformed one.

    An alias has the folder of its name whatever its revision; so has the repository of an alias where no revision is named.
    """
    parsed = parse_reference(text)
    problem = _why_not(parsed)
    if problem is not None:
        raise InvalidReference(
            f"`{shown(parsed.raw)}` cannot be downloaded: {problem}.",
            param="model",
            remedy="Name an alias or a hub id, org/name or org/name@revision.",
        )
    entry = catalog_entry(parsed)
    return HubModel(
        repo_id=entry.repo_id if entry else parsed.identifier,
        revision=parsed.revision,
        folder=entry.alias if entry else parsed.directory_name,
    )


def _why_not(parsed: ModelReference) -> str | None:
    if parsed.local_path is not None:
        return "it is a path on the workers' own disks"
    if parsed.digest is not None:
        return "a digest says what a model is, not where it is found"
    if parsed.is_hub_id and parsed.directory_name.startswith(_TAKEN):
        return "its folder's name is one that the hub's own cache uses"
    if catalog_entry(parsed) is None and not parsed.is_hub_id:
        return "it names neither an alias nor a repository of the hub"
    return None
