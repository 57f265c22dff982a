"""Which models can this worker load right now? Looks again and again, hashing what is new on a thread of its own.

A model is not offered while its weights are being read: what is on offer has the digest that is advertised.
"""

import contextlib
import logging
import os
import threading
from pathlib import Path

from ollm_service.core.errors import MisconfiguredService
from ollm_service.core.profile import ModelProfile
from ollm_service.inspection import DigestCache, InspectionStopped, each_model

RESCAN_SECONDS = 30.0
_Fingerprint = tuple[tuple[str, int, int, int], ...]
_log = logging.getLogger(__name__)


class ModelShelf:
    """The models of one root, kept current by a background thread between `start` and `stop`."""

    def __init__(self, root: Path, digests: DigestCache, *, rescan_seconds: float = RESCAN_SECONDS) -> None:
        self._root = root
        self._digests = digests
        self._rescan_seconds = rescan_seconds
        self._models: tuple[ModelProfile, ...] = ()
        self._fingerprints: dict[str, _Fingerprint] = {}
        self._stop = threading.Event()
        self._again = threading.Event()
        self._scanned = threading.Event()
        self._looks_begun = self._looks_ended = 0
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    @property
    def models(self) -> tuple[ModelProfile, ...]:
        """What is known now, the unsafe ones with their reason."""
        return self._models

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wait_for_first_scan(self, timeout: float) -> bool:
        """Wait until everything was looked at once; False after `timeout` seconds."""
        return self._scanned.wait(timeout)

    def look_again(self) -> int:
        """There is something new: do not wait for the next look. Returns its number, for `has_looked`."""
        number = self._looks_begun + 1
        self._again.set()
        return number

    def has_looked(self, number: int) -> bool:
        """Whether the look of this number is over: what is told of any folder was seen since it was asked for."""
        return self._looks_ended >= number

    def stop(self) -> None:
        """Stop looking, also in the middle of a file."""
        self._stop.set()
        self._again.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._looks_begun += 1
            try:
                self._scan()
            except InspectionStopped:
                return
            except (MisconfiguredService, OSError) as error:
                _log.warning("models-unreadable", extra={"root": str(self._root), "error": str(error)})
                self._models = ()
            self._looks_ended = self._looks_begun
            self._scanned.set()
            if self._again.wait(self._rescan_seconds):
                self._again.clear()

    def _scan(self) -> None:
        # What changed on disk is taken off the shelf before its new content is read.
        kept = {model.path.as_posix(): model for model in self._models}
        kept = {path: model for path, model in kept.items() if self._fingerprints.get(path) == _fingerprint(self._root / path)}
        self._offer(kept)
        seen: dict[str, ModelProfile] = {}
        for model in each_model(self._root, self._digests, is_stopped=self._stop.is_set):
            path = model.path.as_posix()
            seen[path] = kept[path] = model
            self._fingerprints[path] = _fingerprint(self._root / path)
            self._offer(kept)
        self._offer(seen)

    def _offer(self, models: dict[str, ModelProfile]) -> None:
        offered = tuple(models[path] for path in sorted(models))
        if offered != self._models:
            usable = sum(model.is_usable for model in offered)
            _log.info("models", extra={"usable": usable, "refused": len(offered) - usable})
        self._models = offered


def _fingerprint(folder: Path) -> _Fingerprint:
    """What changes when a file in the folder is replaced or rewritten; cheap, as no file is opened."""
    found: list[tuple[str, int, int, int]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat()
                found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))
