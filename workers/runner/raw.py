"""How are a tensor's bytes read and written without a copy?"""

import mmap
import os

import torch
from torch import Tensor


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


def pages(size: int) -> Tensor:
    """Bytes that begin at a page of memory, as direct I/O wants them. They are not there before they are written to."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
