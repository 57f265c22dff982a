"""How are a tensor's bytes read and written without a copy?"""

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: for every CUDA context of the process


def memory_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of bytes on the CPU."""
    # numpy declares the buffer protocol only from Python 3.12 on
    return memoryview(data.numpy())  # type: ignore[arg-type]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements in their order, in the machine's byte order; copied only where they are not so already."""
    return memory_of(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))


def write_all(fd: int, data: memoryview, offset: int) -> int:
    """Write all of it at this place of a file; returns where it ends. Raises OSError, as when the disk is full."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset


def pages(size: int, device: torch.device | None = None) -> Tensor:
    """Bytes that begin at a page of memory, as direct I/O wants them. They are not there before they are written to.

    Those for a CUDA device are page-locked and there at once, so that the device fetches them by itself at its link's full rate,
    while others compute. Torch's own page-locked memory would not do: it comes in powers of two. Where the system refuses to
    lock, they are pages as any other, and copies of them are slower.
    """
    # Private, so that the system counts them as this process's own, and reading what was never written to takes none.
    kept = _Pages(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(kept, dtype=torch.uint8)
    if device is not None and device.type == "cuda":
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch does not annotate it
        if int(runtime.cudaHostRegister(found.data_ptr(), found.numel(), _PORTABLE)) == 0:
            kept.before_end = partial(runtime.cudaHostUnregister, found.data_ptr())
        else:
            with suppress(RuntimeError):  # else the next kernel would be blamed for it
                torch.zeros(1, device=device)
    return found


class _Pages(mmap.mmap):
    """Memory that may have something to be done before it goes away, which is with the last tensor that lies in it."""

    before_end: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.before_end is not None:
            self.before_end()
