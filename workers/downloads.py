"""Which models does this worker fetch from the hub? One at a time, in a process of its own, where its operator allows it.

A thread asks the store for something to fetch, starts `workers.download`, hands its progress on and renews the lease with it. The
process dies with this thread, and what it has fetched stays: whoever takes the download next here goes on with it. The model
counts as there when the shelf offers it.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.errors import DatabaseUnavailable
from ollm_service.core.profile import ModelProfile
from ollm_service.core.retry import Failure
from ollm_service.store.downloads import Downloads, DownloadView
from workers.cache_folder import NoCacheFolder, check_writable
from workers.model_shelf import ModelShelf

IDLE_SECONDS = 1.0
LOOK_SECONDS = 0.25
TELL_SECONDS = 2.0
TELL_PART = 0.05  # of the whole: so much more is told at once
AWAY_SECONDS = 1.0
BUSY_MS = 10_000
STOP_SECONDS = 10.0
COMMAND = (sys.executable, "-m", "workers.download")
_TETHER = Path(__file__).with_name("tether.py")
# What keeps the hub's library from the hub: whether it may go there is said by OLLM_ALLOW_DOWNLOADS.
_NOT_HANDED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_log = logging.getLogger(__name__)


def download_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a downloading process sees: the hub's variables, its token among them, and nothing of ours."""
    kept = {name: value for name, value in environment.items() if not name.startswith("OLLM_") and name not in _NOT_HANDED_ON}
    return kept | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def can_download(root: Path) -> bool:
    """Whether a model could be fetched into this models root, which is made where it is not there; a log line says why not."""
    if find_spec("huggingface_hub") is None:
        problem = "huggingface_hub is not installed"
    else:
        try:
            root.mkdir(parents=True, exist_ok=True)
            check_writable(root)
            return True
        except (OSError, NoCacheFolder) as error:
            problem = str(error)
    _log.warning("no-downloads", extra={"root": str(root), "reason": problem})
    return False


@dataclass(slots=True)
class _Fetching:
    """One download as its process tells of it. `told` is when the store heard of it last, on the caller's clock."""

    download: DownloadView
    lease_id: str
    bytes_done: int = 0
    bytes_total: int | None = None
    commit: str | None = None
    told_at: float = float("-inf")
    told_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def hear(self, facts: Mapping[str, Any]) -> None:
        """A line of the process."""
        self.facts = facts
        if facts.get("event") == "progress":
            self.bytes_done, self.bytes_total, self.commit = facts["bytes_done"], facts["bytes_total"], facts["commit"]

    def is_worth_telling(self, now: float) -> bool:
        """Whether enough time has passed, or enough has come."""
        more = self.bytes_done - self.told_bytes
        return now - self.told_at >= TELL_SECONDS or bool(self.bytes_total and more >= TELL_PART * self.bytes_total)


class Downloader:
    """One worker's downloads, between `start` and `stop`. `environment` is handed on to the process that fetches."""

    def __init__(
        self,
        worker_id: str,
        store: Downloads,
        shelf: ModelShelf,
        root: Path,
        environment: Mapping[str, str],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._shelf = shelf
        self._root = root.absolute()
        self._environment = dict(environment)
        self._clock = clock
        self._capabilities: Callable[[], Capabilities] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)

    def start(self, capabilities: Callable[[], Capabilities]) -> None:
        """Begin to look for something to fetch; `capabilities` are what the worker advertises."""
        self._capabilities = capabilities
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more and give back what is under way."""
        self._stop.set()

    def wait(self) -> None:
        """Return when it has been given back."""
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_SECONDS)

    def _run(self) -> None:
        """Broad on purpose, as the claim loop is: what is a bug here costs a download, not the worker."""
        while not self._stop.is_set():
            try:
                if not self._next():
                    self._stop.wait(IDLE_SECONDS)
            except DatabaseUnavailable:
                self._stop.wait(AWAY_SECONDS)
            except Exception:  # noqa: BLE001 - the claim loop
                _log.exception("download-broken", extra={"worker_id": self._worker_id})
                self._stop.wait(AWAY_SECONDS)

    def _next(self) -> bool:
        """Fetch one model; false where there was none to fetch. Raises DatabaseUnavailable."""
        offered = self._capabilities() if self._capabilities is not None else None
        if offered is None or not offered.may_download:
            return False
        lease_id = str(uuid.uuid4())
        download = self._store.claim(self._worker_id, offered.node, lease_id, offered.may_fetch)
        if download is None:
            return False
        about = {"download_id": download.download_id, "model": download.reference, "lease_id": lease_id}
        _log.info("download-started", extra=about)
        fetching = _Fetching(download=download, lease_id=lease_id)
        process, lines = self._spawn(download)
        try:
            self._follow(fetching, process, lines)
        finally:
            process.kill()
            process.wait()
        self._settle(fetching, offered.node)
        return True

    def _spawn(self, download: DownloadView) -> tuple["subprocess.Popen[bytes]", "queue.SimpleQueue[Mapping[str, Any] | None]"]:
        """The process and what it says, None at its end. Started by this thread, with which the kernel ends it."""
        wanted = {"repo_id": download.repo_id, "revision": download.revision, "root": str(self._root), "folder": download.folder}
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
        process = subprocess.Popen(
            [*tether, *COMMAND, json.dumps(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print addresses there that bear signatures
            start_new_session=True,
            env=self._environment,
        )
        lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, lines), name=f"download-{process.pid}", daemon=True).start()
        return process, lines

    def _follow(
        self, fetching: _Fetching, process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[Mapping[str, Any] | None]"
    ) -> None:
        """Hand on what the process says until it has ended, or the lease is lost, or this worker leaves."""
        while not self._stop.is_set():
            try:
                facts = lines.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                facts = fetching.facts
            if facts is None:
                process.wait()
                return
            fetching.hear(facts)
            if facts.get("event") in (None, "progress") and not self._tell(fetching):
                fetching.facts = {"event": "lost"}
                return

    def _tell(self, fetching: _Fetching) -> bool:
        """Tell the store, now and then; false: the lease is lost."""
        now = self._clock()
        if not fetching.is_worth_telling(now):
            return True
        try:
            is_ours = self._store.progress(
                fetching.lease_id, fetching.bytes_done, bytes_total=fetching.bytes_total, commit_id=fetching.commit
            )
        except DatabaseUnavailable:
            return True  # the process goes on meanwhile; a lease that was lost by then is lost
        fetching.told_at, fetching.told_bytes = now, fetching.bytes_done
        return is_ours

    def _settle(self, fetching: _Fetching, node: str) -> None:
        """Say how it ended, as soon as the database hears it."""
        lease_id, facts, event = fetching.lease_id, fetching.facts, fetching.facts.get("event")
        about = {"download_id": fetching.download.download_id, "model": fetching.download.reference}
        if event == "lost":
            _log.warning("download-lost", extra=about)
            return
        if event == "done":
            profile = self._offered(fetching)
            if profile is not None and profile.is_usable:
                self._surely(lambda: self._store.finish(lease_id))
                _log.info("download-done", extra=about | {"bytes": fetching.bytes_total})
                return
            if profile is not None:
                problem = Failure(code="refused", message=f"it is there, but: {profile.unsafe_because}", is_permanent=True)
                self._fail(lease_id, problem, about, is_everywhere=True)
                return
        if event == "busy":
            reason = f"{node}: {facts.get('message')}"
            self._surely(lambda: self._store.release(lease_id, reason=reason, wait_ms=BUSY_MS))
        elif event == "failed":
            failure = Failure(code=facts["code"], message=facts["message"], is_permanent=facts["is_permanent"])
            self._fail(lease_id, failure, about, is_everywhere=facts["is_everywhere"])
        elif self._stop.is_set():
            self._surely(lambda: self._store.release(lease_id, reason=f"{node} left"))
        else:
            ended = Failure(code="download_ended", message=f"the process on {node} that fetched it ended")
            self._fail(lease_id, ended, about, is_everywhere=False)

    def _offered(self, fetching: _Fetching) -> ModelProfile | None:
        """The model as the shelf has it, once it has; its lease is renewed meanwhile. None where that is lost or we leave.

        That the shelf refuses the folder counts only where it has looked since: it may have been incomplete before.
        """
        look = self._shelf.look_again()
        while not self._stop.is_set():
            has_looked = self._shelf.has_looked(look)
            found = [model for model in self._shelf.models if model.path.as_posix() == fetching.download.folder]
            if found and (found[0].is_usable or has_looked):
                return found[0]
            if not self._tell(fetching):
                return None
            self._stop.wait(LOOK_SECONDS)
        return None

    def _fail(self, lease_id: str, failure: Failure, about: Mapping[str, Any], *, is_everywhere: bool) -> None:
        self._surely(lambda: self._store.fail(lease_id, failure, is_everywhere=is_everywhere))
        _log.warning("download-failed", extra={**about, "code": failure.code, "error": failure.message})

    def _surely(self, verb: Callable[[], object]) -> None:
        """Say it until the database hears it; a worker that leaves tries once, and its lease runs out otherwise."""
        while True:
            try:
                verb()
                return
            except DatabaseUnavailable:
                if self._stop.wait(AWAY_SECONDS):
                    return


def _read(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[Mapping[str, Any] | None]") -> None:
    stream = process.stdout
    if stream is not None:
        with stream:
            for line in stream:
                try:
                    facts = json.loads(line)
                except ValueError:
                    continue  # something that a library has printed
                if isinstance(facts, dict):
                    lines.put(facts)
    lines.put(None)
