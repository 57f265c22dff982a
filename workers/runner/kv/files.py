"""How are bytes kept in a file that one layer of a cache has for itself?"""

import contextlib
import errno
import json
import os
from pathlib import Path

from workers.runner.raw import write_all

_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# Where a file system cannot reserve, writing tells whether there was room.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL)


class LayerFile:
    """A new file of raw bytes, and beside it a manifest: lines of JSON that say what lies where."""

    def __init__(self, folder: Path, layer: int, suffix: str, reserved_bytes: int = 0) -> None:
        """`reserved_bytes` of the disk are taken at once. Raises OSError where the files cannot be made or have no room."""
        self._fd = os.open(folder / f"layer-{layer:03d}.{suffix}", os.O_RDWR | _NEW_FILE, 0o600)
        self._manifest_fd = -1
        try:
            self._manifest_fd = os.open(folder / f"layer-{layer:03d}.jsonl", os.O_WRONLY | _NEW_FILE, 0o600)
            _reserve(self._fd, reserved_bytes)
        except OSError:
            self.close()
            raise
        self._manifest_end = 0

    def write(self, data: memoryview, offset: int) -> int:
        """Write all of it; returns where it ends. Raises OSError, for one when the disk is full."""
        return write_all(self._fd, data, offset)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill all of it. Raises OSError when the file is too short."""
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if count == 0:
                raise OSError(f"a file of the KV cache ends {done:,} bytes into a read of {len(into):,}")
            done += count

    def note(self, **entry: object) -> None:
        """Add a line to the manifest. Raises OSError."""
        self._manifest_end = write_all(self._manifest_fd, memoryview(json.dumps(entry).encode() + b"\n"), self._manifest_end)

    def close(self) -> None:
        """Close the files; deleting them is the folder's affair."""
        for fd in (self._fd, self._manifest_fd):
            if fd >= 0:
                os.close(fd)


def free_bytes(folder: Path) -> int:
    """What may still be written on the folder's disk. Raises OSError."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _reserve(fd: int, size: int) -> None:
    if size <= 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
