"""Of which models do the weights lie on the cache disk already, by layers, and how much is there of others?

Looked at again and again, so that a manifest is read anew only when its file has changed.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ollm_service.core.laying_out import EXTENTS_DATA, EXTENTS_MANIFEST, is_last_line, manifest_entry, manifest_header

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FileMark = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    """Digests of models that are whole, and the bytes of those that are not."""

    whole: frozenset[str] = frozenset()
    begun_bytes: dict[str, int] = field(default_factory=dict)


class LaidOutWeights:
    """Looks into the folder where all slots keep weights; `transformers` is the version that runners have, None: not known."""

    def __init__(self, transformers: str | None) -> None:
        self._transformers = transformers
        self._ends: dict[Path, tuple[_FileMark, int | None]] = {}

    def look(self, folder: Path | None) -> LaidOut:
        """What is there now; nothing where the folder cannot be read."""
        whole, begun = set(), {}
        for model in _folders(folder):
            end, size = self._end(model), _size(model / EXTENTS_DATA)
            if end is not None and size >= end:
                whole.add(model.name)
            else:
                begun[model.name] = sum(_size(Path(at, name)) for at, _, names in os.walk(model) for name in names)
        return LaidOut(whole=frozenset(whole), begun_bytes=begun)

    def _end(self, model: Path) -> int | None:
        """Where the last extent ends, None where they are not all there or of no use to our runners."""
        path = model / EXTENTS_MANIFEST
        try:
            status = path.stat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns)
            if path not in self._ends or self._ends[path][0] != mark:
                self._ends[path] = mark, self._read_end(path, model.name)
        except OSError:
            self._ends.pop(path, None)
            return None
        return self._ends[path][1]

    def _read_end(self, path: Path, digest: str) -> int | None:
        lines = path.read_bytes().splitlines(keepends=True)
        if self._transformers is None or len(lines) < 3 or not lines[-1].endswith(b"\n"):
            return None
        try:
            first, extent, last = (manifest_entry(lines[number].rstrip(b"\n")) for number in (0, -2, -1))
            if first != manifest_header(digest, self._transformers) or not is_last_line(last):
                return None
            return int(extent["offset"]) + int(extent["size"])
        except (ValueError, KeyError, TypeError):
            return None


def _folders(folder: Path | None) -> Iterator[Path]:
    """The folders of models; they are named by digests."""
    if folder is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if _DIGEST.fullmatch(entry.name) and entry.is_dir())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
