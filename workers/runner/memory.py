"""How much memory does this process use, how much is free, and was an error a lack of it? Sizes in bytes."""

import contextlib
import ctypes
import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATUS, _STATM, _IO, _CLEAR, _MEMINFO = (
    Path("/proc/self/status"),
    Path("/proc/self/statm"),
    Path("/proc/self/io"),
    Path("/proc/self/clear_refs"),
    Path("/proc/meminfo"),
)
_M_MMAP_THRESHOLD = -3  # its number in glibc's malloc.h
_MAPPED_ALONE_BYTES = 1024**2
# Torch's CPU allocator, its MPS allocator and some BLAS libraries raise a plain RuntimeError that only its text tells apart.
_OUT_OF_MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
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


def host_bytes() -> int:
    """The memory that is resident now, 0 where the system does not tell."""
    return _kilobytes(_STATUS, "VmRSS:")


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
        resident = int(_STATM.read_text().split()[1]) * _PAGE
        read = next(int(line.split()[1]) for line in _IO.read_text().splitlines() if line.startswith("rchar:"))
    except (OSError, StopIteration):
        return 0
    return resident + read


def _kilobytes(path: Path, label: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(label)), 0)
