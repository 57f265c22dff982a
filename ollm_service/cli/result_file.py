"""How do results reach a file? Collected beside it as they come, and put in its place, in row order, when all are there.

What is collected is named after the job, so that a command that was interrupted goes on where it stopped; the file itself
changes in one step, from what it was to the whole result.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from ollm_service.cli.output import json_line
from ollm_service.client import Result
from ollm_service.core.errors import InvalidOption


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    row: int
    offset: int
    length: int


@dataclass(slots=True, kw_only=True)
class ResultFile:
    """A file to come with a job's results. `cursor` is that of the last result which is collected already."""

    path: Path
    cursor: int
    _collected: BinaryIO
    _lines: list[_Line] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, job_id: str) -> Self:
        """Begin, or go on with what an earlier command collected of this job. Raises InvalidOption where it cannot be written."""
        try:
            stream = _collection(path, job_id).open("a+b")
        except OSError as error:
            raise _unwritable(path, error) from error
        found = cls(path=path, cursor=0, _collected=stream)
        found._take_up()
        return found

    def append(self, result: Result) -> None:
        """Collect one result."""
        line = json_line(result.raw)
        offset = self._lines[-1].offset + self._lines[-1].length if self._lines else 0
        self._collected.write(line)
        self._collected.flush()
        self._lines.append(_Line(row=result.row, offset=offset, length=len(line)))
        self.cursor = result.cursor

    def finish(self) -> None:
        """Put the whole result in place."""
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        with fresh.open("wb") as target:
            for line in sorted(self._lines, key=lambda line: line.row):
                self._collected.seek(line.offset)
                target.write(self._collected.read(line.length))
            target.flush()
            os.fsync(target.fileno())
        os.replace(fresh, self.path)
        self.close()
        Path(self._collected.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what is collected for a later command."""
        self._collected.close()

    def _take_up(self) -> None:
        self._collected.seek(0)
        whole = 0
        for line in self._collected:
            try:
                result = json.loads(line)
                row, cursor = int(result["row"]), int(result["cursor"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._lines.append(_Line(row=row, offset=whole, length=len(line)))
            whole, self.cursor = whole + len(line), cursor
        self._collected.truncate(whole)
        self._collected.seek(0, os.SEEK_END)


def check_writable(path: Path) -> None:
    """Raise InvalidOption for a place where no file could be written: better before a job is submitted than after it ran."""
    if path.is_dir():
        raise InvalidOption("--output", f"{path} is a folder")
    probe = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _collection(path: Path, job_id: str) -> Path:
    return path.with_name(f".{path.name}.{job_id}.partial")


def _unwritable(path: Path, error: OSError) -> InvalidOption:
    return InvalidOption("--output", f"{path} cannot be written: {error.strerror}")
