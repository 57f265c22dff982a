"""How are a tensor's bytes read and written without a copy?"""

import mmap

import torch
from torch import Tensor


def memory_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of bytes on the CPU."""
    # numpy declares the buffer protocol only from Python 3.12 on
    return memoryview(data.numpy())  # type: ignore[arg-type]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements in their order, in the machine's byte order; copied only where they are not so already."""
    return memory_of(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))


def pages(size: int) -> Tensor:
    """Bytes that begin at a page of memory, as direct I/O wants them. They are not there before they are written to."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)
