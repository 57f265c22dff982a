"""How much memory does this process use, how much is free, was an error a lack of it, and what moved from and to disks?

Sizes are in bytes.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATUS, _STATM, _IO, _CLEAR, _MEMINFO, _MAPS = (
    Path("/proc/self/status"),
    Path("/proc/self/statm"),
    Path("/proc/self/io"),
    Path("/proc/self/clear_refs"),
    Path("/proc/meminfo"),
    Path("/proc/self/maps"),
)
_M_MMAP_THRESHOLD = -3  # its number in glibc's malloc.h
_MAPPED_ALONE_BYTES = 1024**2
SAMPLES_A_SECOND = 100
# Torch's CPU allocator, its MPS allocator and some BLAS libraries raise a plain RuntimeError that only its text tells apart.
_OUT_OF_MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # no pages of memory, as under a limit of address space
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def give_back_what_is_freed() -> None:
    """Let every tensor above 1 MiB have a mapping of its own, which ends with it. Call before torch is imported.

    glibc raises that limit to as much as 32 MiB by itself. Then tensors lie in a heap, and since each step makes them a little
    longer, what one leaves is too small for the next: peaks reach up to twice what lives, and differ from run to run. Huge pages
    make up for the page faults. Where the C library is another one this has no effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_ALONE_BYTES)


def let_go_of_pages(files: Collection[Path], still_used: Iterable[tuple[int, int]]) -> None:
    """Give back the memory of mapped files that nobody reads any more; `still_used` are the (address, bytes) of all the rest.

    Weights that a loader has joined into others of its own, as those of experts, would count twice as long as any tensor of the
    same file lives.
    """
    used = sorted((address, address + size) for address, size in still_used if size)
    with contextlib.suppress(AttributeError, OSError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for first, last in _mappings({str(file.resolve()) for file in files}):
            for start, end in _gaps(first, last, used):
                advise(start, end - start, mmap.MADV_DONTNEED)


def host_bytes() -> int:
    """The memory that is resident now, 0 where the system does not tell."""
    return _kilobytes(_STATUS, "VmRSS:")


def private_host_bytes() -> int:
    """The resident memory that is in no file, 0 where the system does not tell. Pages of files it takes back by itself."""
    return _kilobytes(_STATUS, "RssAnon:") + _kilobytes(_STATUS, "RssShmem:")


class PrivatePeak:
    """The most private memory while it is entered, looked at `SAMPLES_A_SECOND` times a second from beside.

    The kernel's own peak counts the pages of mapped files, which are all of a checkpoint that is read once through.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="private-peak", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.wait(1 / SAMPLES_A_SECOND):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, private_host_bytes())


def reset_peak_host_bytes() -> None:
    """Start a new peak, where the kernel lets a process do so; otherwise the peak stays that of the whole process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_host_bytes() -> int:
    """The most resident memory since the last reset, 0 where the system does not tell."""
    return _kilobytes(_STATUS, "VmHWM:")


def free_host_bytes() -> int | None:
    """What may be allocated without swapping, None where the system does not tell."""
    return _kilobytes(_MEMINFO, "MemAvailable:") or None


def bytes_taken_in() -> int:
    """A number that changes while files are read or mapped in, 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE + _moved()["rchar"]
    except (OSError, KeyError):
        return 0


def disk_bytes() -> tuple[int, int] | None:
    """What this process has had read from disks and written to them so far; None where the system does not tell.

    What was in the page cache already is not read. What is written counts when it goes into the page cache.
    """
    try:
        moved = _moved()
        return moved["read_bytes"], moved["write_bytes"]
    except (OSError, KeyError):
        return None


def _moved() -> dict[str, int]:
    """The kernel's counts of this process, by name."""
    return {name: int(count) for name, count in (line.split(": ") for line in _IO.read_text().splitlines())}


def _mappings(names: Collection[str]) -> Iterator[tuple[int, int]]:
    """Where this process has mapped files of these names."""
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            first, last = fields[0].split("-")
            yield int(first, 16), int(last, 16)


def _gaps(first: int, last: int, used: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The whole pages between `first` and `last` that no used span touches; spans in ascending order."""
    start = first
    for used_first, used_last in (*used, (last, last)):
        end = min(used_first // _PAGE * _PAGE, last)
        if start < end:
            yield start, end
        start = max(start, -(-used_last // _PAGE) * _PAGE)


def _kilobytes(path: Path, label: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(label)), 0)
