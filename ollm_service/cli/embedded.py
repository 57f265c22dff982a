"""How does the whole service run on one machine? A coordinator and workers as child processes, until somebody ends it.

Whatever ends this process ends its children too: in order after SIGTERM, SIGINT and SIGHUP, by the kernel after SIGKILL.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ollm_service.cli.child_process import ChildProcess
from ollm_service.cli.output import count, say, tell
from ollm_service.client import Client
from ollm_service.core.errors import Conflict, OllmError, ServiceError
from ollm_service.settings import Settings

LOOK_SECONDS = 0.2
START_SECONDS = 60.0
WORKERS_SECONDS = 60.0
SERVER_GRACE_SECONDS = 10.0
KILL_AFTER_DRAIN_SECONDS = 10.0
# Who presses Ctrl-C wants the prompt back; finished rows are recorded and the rest waits in the database.
DRAIN_SECONDS = 5.0
LOCK_NAME = "up.lock"
SERVER_IS_READY = "ollm_service listens on"
TAIL_CHARACTERS = 2000


class EmbeddedService:
    """One coordinator and some workers on one data folder."""

    def __init__(self, settings: Settings, *, workers: int) -> None:
        self._settings = settings
        self._drain_seconds = settings.drain_seconds if "drain_seconds" in settings.model_fields_set else DRAIN_SECONDS
        self._data_dir = settings.data_dir.absolute()
        self._port = settings.port or _free_port(settings.host)
        self._environment = {
            **os.environ,
            "OLLM_DATA_DIR": str(self._data_dir),
            "OLLM_MODELS_DIR": str(settings.models_dir.absolute()),
            "OLLM_PORT": str(self._port),
            "OLLM_DRAIN_SECONDS": f"{self._drain_seconds:g}",
            "PYTHONUNBUFFERED": "1",
        }
        self._server = self._child("server", server_command(), {})
        node = settings.effective_node
        names = [node] if workers == 1 else [f"{node}-{number}" for number in range(1, workers + 1)]
        self._workers = [self._child(f"worker {name}", worker_command(), {"OLLM_NODE": name}) for name in names]
        self._signals = 0
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        """Where it answers on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def run(self) -> int:
        """Run until a signal comes; the exit code. Raises Conflict for a folder in use, ServiceError for a failed start."""
        with self._locked():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            self._upgrade()
            try:
                if not self._start_server():
                    return 0
                for worker in self._workers:
                    worker.start()
                self._announce()
                self._watch()
            finally:
                self._end()
        return 0

    def _start_server(self) -> bool:
        """Start it and wait until it answers; False where a signal came first. Raises ServiceError when it does not."""
        self._server.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._stopping.wait(LOOK_SECONDS / 4):
            # Asking the port would not do: another service may answer there, which is why ours cannot.
            if SERVER_IS_READY in self._server.said():
                return True
            if not self._server.is_running or time.monotonic() > deadline:
                raise ServiceError(f"The server {self._server.how_it_ended()}.\n{self._server.said()[-TAIL_CHARACTERS:]}")
        return False

    def _announce(self) -> None:
        say(f"ollm_service runs at {self.url} (data in {self._data_dir}, logs in {self._data_dir / 'logs'})")
        if self._port != 8000:
            say(f"For the other commands: export OLLM_BASE_URL={self.url}")
        waiting = f"Waiting for {count(len(self._workers), 'worker')} …" if self._workers else "No workers were asked for."
        say(f"{waiting} Ctrl-C ends everything.")

    def _watch(self) -> None:
        deadline: float | None = time.monotonic() + WORKERS_SECONDS
        next_look = 0.0
        while not self._stopping.wait(LOOK_SECONDS):
            for child in (self._server, *self._workers):
                news = child.revive()
                if news:
                    tell(news)
            if deadline is not None and self._workers and time.monotonic() >= next_look:
                next_look = time.monotonic() + 1.0
                deadline = None if self._workers_told(is_last=time.monotonic() > deadline) else deadline

    def _workers_told(self, *, is_last: bool) -> bool:
        """Say which workers are there and what they have, once all are or it took too long; whether that was said."""
        keys = self._settings.api_keys.split(",")
        with Client(self.url, api_key=keys[0].strip() or None) as client, suppress(OllmError):
            active = [worker for worker in client.workers() if worker.state == "active"]
            if len(active) < len(self._workers) and not is_last:
                return False
            names = {name for worker in active for name in worker.usable_models}
            models = ", ".join(sorted(names)) or f"none yet (put them below {self._settings.models_dir.absolute()})"
            say(f"{len(active)} of {count(len(self._workers), 'worker')} ready. Models: {models}.")
            return True
        return is_last

    def _end(self) -> None:
        """Workers first, so that they can still tell the database what they finished; then the server."""
        patience = self._drain_seconds + KILL_AFTER_DRAIN_SECONDS
        for children, seconds in ((self._workers, patience), ([self._server], SERVER_GRACE_SECONDS)):
            for child in children:
                child.terminate()
            deadline, signals = time.monotonic() + seconds, self._signals
            pause = threading.Event()
            while any(child.is_running for child in children) and time.monotonic() < deadline and self._signals == signals:
                pause.wait(LOOK_SECONDS / 4)
            for child in children:
                child.kill_family()

    def _upgrade(self) -> None:
        done = subprocess.run(schema_command(), env=self._environment, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ServiceError(f"The database could not be prepared: {done.stderr.strip()}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first one ends in order, the second one at once."""
        del number, frame
        self._signals += 1
        self._stopping.set()

    def _child(self, name: str, command: Sequence[str], extra: dict[str, str]) -> ChildProcess:
        log = self._data_dir / "logs" / f"{name.replace(' ', '-').replace('/', '-')}.log"
        return ChildProcess(name, command, {**self._environment, **extra}, log)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the data folder. Raises Conflict where another one does; the kernel lets go of it however we end."""
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            file = (self._data_dir / LOCK_NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise ServiceError(f"{self._data_dir} cannot be used as a data folder: {error.strerror}.") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise Conflict(
                    f"Another `ollm-service up` uses {self._data_dir} already: {file.read().strip() or 'it is just starting'}.",
                    remedy="End that one, or give this one a folder of its own with --data-dir.",
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()}, {self.url}\n")
            file.flush()
            yield
            file.truncate(0)


def server_command() -> list[str]:
    """The coordinator."""
    return [sys.executable, "-m", "ollm_service.api.server"]


def worker_command() -> list[str]:
    """A worker."""
    return [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--loglevel", "INFO"]


def schema_command() -> list[str]:
    """The upgrade of the database."""
    return [sys.executable, "-m", "ollm_service.cli.schema"]


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_models(models_dir: Path) -> str | None:
    """What is wrong with a models folder; None where it can be read."""
    if not models_dir.is_dir():
        return f"{models_dir} is not a folder"
    return None if os.access(models_dir, os.R_OK | os.X_OK) else f"{models_dir} cannot be read"
