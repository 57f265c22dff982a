"""Where may a slot keep its KV files, is the disk any good, and what did dead runners leave there?

Every slot of every worker on this machine owns one folder, by a lock that the kernel drops when the worker ends, so that what
lies in a folder whose lock can be taken is garbage. The same goes for what a runner needs while it lays weights out.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ollm_service.core.laying_out import SCRATCH, WRITER_LOCK

MOST_SLOTS = 256
PROBE_CHUNK_BYTES = 4 * 1024**2
PROBE_MOST_BYTES = 64 * 1024**2
PROBE_SECONDS = 0.25


class NoCacheFolder(Exception):
    """There is no folder that KV files could be written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bytes per second, through the file system and onto the disk."""

    write: float
    read: float


class CacheFolder:
    """A slot's own folder, locked while this object is open."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path = path
        self._lock = lock

    @property
    def weights_path(self) -> Path:
        """Where all slots of this machine keep weights in the form in which layers are read from disk."""
        return weights_folder(self.path)

    def sweep(self) -> int:
        """Delete what is in it, and return how many entries that were. Call it when no runner uses the folder.

        What runners had beside the weights that they were laying out when they were killed goes as well, whosever they were.
        """
        _sweep_layouts(self.weights_path)
        entries = 0
        for entry in self._entries():
            entries += 1
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        return entries

    def release(self) -> None:
        """Delete what is in it and leave it to others."""
        self.sweep()
        self._lock.close()

    def _entries(self) -> Iterator["os.DirEntry[str]"]:
        try:
            with os.scandir(self.path) as found:
                yield from list(found)
        except OSError:
            return


def _sweep_layouts(weights: Path) -> None:
    """Delete the scratch folders whose writer is gone. The extents stay: whoever lays the model out next goes on from there."""
    for scratch in weights.glob(f"*/{SCRATCH}"):
        with contextlib.suppress(OSError), (scratch.parent / WRITER_LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
            shutil.rmtree(scratch, ignore_errors=True)


def weights_folder(slot_folder: Path) -> Path:
    """Beside the slots' folders: what is in there is no slot's own, and stays."""
    return slot_folder.parent / "weights"


def take_folder(root: Path) -> CacheFolder:
    """The first free slot folder under `root`, made, locked and swept. Raises NoCacheFolder with the reason."""
    for number in range(MOST_SLOTS):
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / f"slot-{number}.lock").open("ab")
        except OSError as error:
            raise NoCacheFolder(f"{root} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()  # another slot's
            continue
        folder = CacheFolder(root / f"slot-{number}", lock)
        try:
            folder.path.mkdir(mode=0o700, exist_ok=True)
            check_writable(folder.path)
        except (OSError, NoCacheFolder) as error:
            lock.close()
            raise NoCacheFolder(str(error)) from error
        folder.sweep()
        return folder
    raise NoCacheFolder(f"{MOST_SLOTS} slots use {root} already")


def check_writable(path: Path) -> None:
    """Write and delete a page. Raises NoCacheFolder with the reason."""
    probe = path / ".probe"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise NoCacheFolder(f"{path} cannot be written to: {error.strerror}") from error


def measure(path: Path) -> DiskRates | None:
    """How fast the disk under `path` is, from a quarter of a second of writing and as much reading; None if it cannot be told."""
    probe, chunk, written = path / ".rate", os.urandom(PROBE_CHUNK_BYTES), 0
    try:
        with probe.open("wb", buffering=0) as file:
            started = time.perf_counter()
            while written < PROBE_MOST_BYTES and time.perf_counter() - started < PROBE_SECONDS:
                written += file.write(chunk)
            os.fsync(file.fileno())
            write_seconds = time.perf_counter() - started
        with probe.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk is asked, not the page cache
            started = time.perf_counter()
            while file.read(PROBE_CHUNK_BYTES):
                pass
            read_seconds = time.perf_counter() - started
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return DiskRates(write=written / max(write_seconds, 1e-6), read=written / max(read_seconds, 1e-6))


def free_bytes(path: Path) -> int:
    """What can still be written under `path`; 0 where that cannot be told."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def total_bytes(path: Path) -> int:
    """The size of the file system under `path`; 0 where that cannot be told."""
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return 0
