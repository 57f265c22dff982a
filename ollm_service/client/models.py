"""What does a user see of models that are fetched from the hub? Frozen views, as of the moment when they were asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ollm_service.core.downloading import DownloadState

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A model on its way to a worker. Sizes in bytes; `bytes_total` is None until the hub has told it."""

    id: str
    model: str
    folder: str
    state: DownloadState
    node: str | None
    bytes_done: int
    bytes_total: int | None
    reason: str | None
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(
            id=raw["id"],
            model=raw["model"],
            folder=raw["folder"],
            state=DownloadState(raw["state"]),
            node=raw.get("node") or raw.get("target"),
            bytes_done=raw.get("bytes_done", 0),
            bytes_total=raw.get("bytes_total"),
            reason=raw.get("reason"),
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What asking for a model has led to: a download, or None where the nodes in `held_by` have it already."""

    model: str
    held_by: tuple[str, ...]
    download: Download | None
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        download = raw.get("download")
        return cls(
            model=raw["model"],
            held_by=tuple(raw.get("held_by") or ()),
            download=None if download is None else Download.from_raw(download),
            raw=raw,
        )
