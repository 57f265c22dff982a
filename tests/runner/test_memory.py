"""Does a runner's process hold what lives in it, and no more?"""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runner.disks import is_on_a_disk
from tests.waiting import wait_for
from workers.runner.memory import PrivatePeak, disk_bytes, host_bytes, let_go_of_pages, peak_host_bytes, private_host_bytes

MIB = 1024**2
# Freeing 30 MiB teaches glibc to keep blocks of up to that size in its heap, where the last one holds all before it.
_FREE_BEHIND_A_LAST_BLOCK = """
import torch
from workers.runner.memory import give_back_what_is_freed, host_bytes
if {is_given_back}:
    give_back_what_is_freed()
torch.ones(30 * 1024**2, dtype=torch.uint8)
before = host_bytes()
blocks = [torch.ones(4 * 1024**2, dtype=torch.uint8) for _ in range(50)]
del blocks[:-1]
print(host_bytes() - before)
"""


def left_over(*, is_given_back: bool) -> int:
    """The bytes that a process holds after all but the last of 50 tensors of 4 MiB are gone."""
    script = _FREE_BEHIND_A_LAST_BLOCK.format(is_given_back=is_given_back)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_is_given_back() -> None:
    """Tensors that are gone take no memory, whatever lies behind them; by itself the C library would keep it."""
    assert left_over(is_given_back=True) < 20 * MIB
    assert left_over(is_given_back=False) > 100 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_peak_is_at_least_what_is_held() -> None:
    """Both are read, in bytes."""
    assert peak_host_bytes() >= host_bytes() > MIB


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_peak_that_is_gone_is_remembered_and_mapped_files_are_none(tmp_path: Path) -> None:
    """Of a tensor that came and went between, and of a file whose pages were all looked at, the tensor counts alone."""
    path, size = tmp_path / "file", 64 * MIB
    path.write_bytes(bytes(size))
    with PrivatePeak() as mapped:
        before = private_host_bytes()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert sum(pages[:: mmap.PAGESIZE]) == 0
    assert mapped.peak - before < size / 2
    with PrivatePeak() as memory:
        tensor = torch.ones(size, dtype=torch.uint8)
        wait_for(lambda: memory.peak >= before + size * 0.9, timeout=10, what="the watch to see it")
        del tensor
    assert memory.peak >= before + size * 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_what_moves_from_and_to_disks_is_counted(tmp_path: Path) -> None:
    """In bytes: what is written, and what is read once it is not in the page cache any more."""
    if not is_on_a_disk(tmp_path):
        pytest.skip("the folder for temporary files is in memory")
    path, size = tmp_path / "file", 8 * MIB
    before = disk_bytes()
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()
    after = disk_bytes()
    assert before is not None
    assert after is not None
    assert all(size <= now - then < 3 * size for now, then in zip(after, before, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account of pages")
def test_pages_that_nobody_reads_are_let_go(tmp_path: Path) -> None:
    """Of a mapped file stays what is still used, to the byte, and the memory of all the rest is given back."""
    file, size = tmp_path / "weights", 64 * MIB
    file.write_bytes(os.urandom(size))
    weights = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    used = weights[10 * MIB + 5 : 34 * MIB + 7]
    kept, total = used.clone(), weights.sum(dtype=torch.int64)
    before = host_bytes()
    let_go_of_pages([file], [(used.data_ptr(), used.nbytes)])
    held = host_bytes()
    assert before - held > 35 * MIB
    assert torch.equal(used, kept)
    assert host_bytes() - held < 12 * MIB  # those pages were never gone
    assert weights.sum(dtype=torch.int64) == total
