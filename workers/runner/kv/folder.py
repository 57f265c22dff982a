"""Where may one attempt keep files? In a private folder that it made, marks by a lock, and deletes at the end."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "kv-"
_LOCK = "owner.lock"


class PrivateFolder:
    """A new folder inside `cache_dir`. A lock on a file in it lives as long as this process: without, it is an orphan."""

    def __init__(self, cache_dir: Path) -> None:
        """Raises OSError where the folder cannot be made."""
        cache_dir.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache_dir))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def delete(self) -> None:
        """Delete it with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def delete_orphans(cache_dir: Path) -> int:
    """Delete the folders that runners left when they were killed; returns how many. Touches nothing that we did not make."""
    deleted = 0
    for path in sorted(cache_dir.glob(f"{_PREFIX}*")):
        lock = path / _LOCK
        if path.is_symlink() or not lock.is_file():
            continue
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(path, ignore_errors=True)
            deleted += 1
    return deleted
