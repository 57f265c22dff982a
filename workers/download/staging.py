"""Where does a model lie while it is fetched? In a hidden folder beside the others, which becomes its own in one step.

    ROOT/.ollm-downloads/FOLDER.lock           locked by whoever fetches it; the kernel lets go when that process ends
    ROOT/.ollm-downloads/FOLDER/files          what is whole; renamed to ROOT/FOLDER at the end
    ROOT/.ollm-downloads/FOLDER/parts          what is not, to be gone on with
    …/files/.ollm-download.json                the mark: this folder was made here, of which repository and commit

Nothing is deleted that does not bear the mark. Inspection passes hidden folders by, so no half model is ever offered.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

STAGING = ".ollm-downloads"
MARK = ".ollm-download.json"


class Busy(Exception):
    """Another process fetches this model into the same folder."""


class NotOurs(Exception):
    """A folder is in the way that no download has made."""


class Staging:
    """The place of one download; `locked` gives it."""

    def __init__(self, root: Path, folder: str) -> None:
        if PurePosixPath(folder).name != folder or folder.startswith("."):
            raise ValueError(f"{folder!r} is no name of a model's folder")
        self.final = root / folder
        self._place = root / STAGING / folder
        self.files = self._place / "files"
        self.parts = self._place / "parts"

    @classmethod
    @contextlib.contextmanager
    def locked(cls, root: Path, folder: str) -> Iterator["Staging"]:
        """The place, while nobody else has it. Raises Busy, and OSError where the models root cannot be written to."""
        made = cls(root, folder)
        made._place.parent.mkdir(parents=True, exist_ok=True)
        with (root / STAGING / f"{folder}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Busy(f"another process fetches {folder} here") from error
            yield made

    def open(self, repo_id: str, commit: str) -> None:
        """Make it ready for this commit of a repository; what lies there of another is deleted. Raises NotOurs."""
        mark = {"repo_id": repo_id, "commit": commit}
        if self.final.exists() or self.final.is_symlink():
            if _mark_of(self.final) != mark:
                raise NotOurs(f"{self.final.name} is there already and not whole; move it away")
            self._remove()
            self._place.mkdir()
            os.rename(self.final, self.files)  # it lacks something: the rest is gone on with
        elif self._place.exists() and _mark_of(self.files) != mark:
            self._remove()
        self.files.mkdir(parents=True, exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        if _mark_of(self.files) is None:
            (self.files / MARK).write_text(json.dumps(mark), encoding="utf-8")

    def bytes_there(self) -> int:
        """How much of it is there."""
        return sum(size for _, size in [*_sizes(self.files), *_sizes(self.parts)])

    def names(self) -> dict[str, int]:
        """The whole files with their sizes."""
        return dict(_sizes(self.files))

    def drop(self, name: str) -> None:
        """Forget a file, whole or not."""
        for folder in (self.files, self.parts):
            (folder / name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Make it the model's folder, in one step. Raises OSError where one has come in the way."""
        os.rename(self.files, self.final)
        shutil.rmtree(self._place, ignore_errors=True)

    def _remove(self) -> None:
        """Delete what an earlier download left. Raises NotOurs where nothing says that it was one."""
        if not self._place.exists():
            return
        is_empty = not any(True for _ in _paths(self._place))
        if not is_empty and _mark_of(self.files) is None:
            raise NotOurs(f"{STAGING}/{self._place.name} was not made by a download; move it away")
        shutil.rmtree(self._place)


def _mark_of(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    return ((path.relative_to(folder).as_posix(), size) for path, size in _paths(folder) if path.name != MARK)


def _paths(folder: Path) -> Iterator[tuple[Path, int]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(OSError):
                yield path, path.lstat().st_size
