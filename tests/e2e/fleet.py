"""Which processes is the service made of, and how are they started, hurt and ended? A real fleet on private servers.

A `Fleet` is one coordinator and any number of workers, each a process of its own with its own folder and log, configured by
`OLLM_*` variables alone, as an operator would. `kill()` is SIGKILL to that one process and to nothing else, so that what it
started has to end by itself; `freeze()` and `thaw()` are SIGSTOP and SIGCONT. Closing a fleet leaves no process behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from ollm_service.store.database import upgrade
from tests.e2e.service_calls import ServiceCalls
from tests.servers import LOOPBACK, free_port, kill_tree, spawn
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
SCRIPTED = f"{sys.executable} -m tests.doubles.scripted_runner"  # a runner without a model, steered by words in the prompts
DEMO_MODELS = REPOSITORY / "demo" / "models"
START_SECONDS = 40.0  # imports on a busy machine
LOG_TAIL_BYTES = 6000


class Part:
    """One process of the fleet, which may be started again after it ended."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.directory = directory
        self._command = command
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        return self.directory / "process.log"

    @property
    def pid(self) -> int:
        """Its process id. Raises AssertionError when it was never started."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert not self.is_running, f"{self.name} is running already"
        self._process = spawn(self._command, log=self.log, environment=self._environment)

    def kill(self) -> None:
        """SIGKILL to this process alone, as a crash or the kernel's out-of-memory killer would end it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, *, timeout: float) -> int:
        """Its exit status. Raises AssertionError when it outlives `timeout` seconds."""
        assert self._process is not None
        try:
            return self._process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout:g} s:\n{self.log_tail()}") from None

    def close(self) -> None:
        """SIGKILL to the whole tree."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGCONT)
            kill_tree(self._process)

    def log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if self.log.exists() else "(no log)"


class Worker(Part):
    """One worker process and the runners that it starts."""

    def __init__(self, node: str, environment: Mapping[str, str], directory: Path) -> None:
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--loglevel", "INFO"]
        super().__init__(f"worker {node}", command, environment, directory)
        self.node = node

    def runner_pids(self) -> list[int]:
        """The process ids of its living runners."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.pid).children(recursive=True)
            return [child.pid for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        return []

    def runner_pid(self) -> int:
        """The id of its runner, as soon as it has one."""
        return wait_for(self.runner_pids, timeout=20, what=f"{self.name} to have a runner")[0]

    def kill_any_runner(self) -> None:
        """SIGKILL to its runner, if it has one at this moment."""
        for pid in self.runner_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_runner(self) -> int:
        """SIGKILL to its runner, and the id that it had."""
        pid = self.runner_pid()
        os.kill(pid, signal.SIGKILL)
        return pid


class Fleet:
    """A coordinator and workers on one database and one broker. `settings` are `OLLM_*` variables for every process."""

    def __init__(
        self,
        directory: Path,
        *,
        database_url: str,
        broker_url: str,
        models_dir: Path = DEMO_MODELS,
        lease_seconds: float = 4,
        runner: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.database_url = database_url
        self.broker_url = broker_url
        self.port = free_port()
        self.workers: dict[str, Worker] = {}
        self._settings = {
            "OLLM_DATABASE_URL": database_url,
            "OLLM_BROKER_URL": broker_url,
            "OLLM_MODELS_DIR": str(models_dir),
            "OLLM_LEASE_SECONDS": f"{lease_seconds:g}",
            "OLLM_DRAIN_SECONDS": "2",
            **({"OLLM_RUNNER_COMMAND": runner} if runner else {}),
            **(settings or {}),
        }
        folder = directory / "coordinator"
        self.coordinator = Part(
            "coordinator",
            [sys.executable, "-m", "ollm_service.api.server"],
            self._environment(folder, {"OLLM_HOST": LOOPBACK, "OLLM_PORT": str(self.port)}),
            folder,
        )
        self.calls = ServiceCalls(f"http://{LOOPBACK}:{self.port}")

    def _environment(self, folder: Path, extra: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OLLM_")}
        python = {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        return {**kept, **python, "OLLM_DATA_DIR": str(folder), **self._settings, **extra}

    def start_coordinator(self) -> None:
        """Start it and return when it is ready to serve."""
        self.coordinator.start()
        wait_for(self._is_ready, timeout=START_SECONDS, what="the coordinator to be ready")

    def _is_ready(self) -> bool:
        assert self.coordinator.is_running, f"the coordinator ended at its start:\n{self.coordinator.log_tail()}"
        try:
            return httpx.get(f"http://{LOOPBACK}:{self.port}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def launch_worker(self, node: str, **settings: str) -> Worker:
        """Start a worker and do not wait for it. Its settings are `OLLM_*` variables."""
        folder = self.directory / node
        worker = Worker(node, self._environment(folder, {"OLLM_NODE": node, **settings}), folder)
        self.workers[node] = worker
        worker.start()
        return worker

    def start_workers(self, *nodes: str, **settings: str) -> list[Worker]:
        """Start workers with equal settings and return when all are registered."""
        workers = [self.launch_worker(node, **settings) for node in nodes]
        self.await_workers(*nodes)
        return workers

    def start_worker(self, node: str, **settings: str) -> Worker:
        """Start a worker and return when it is registered."""
        return self.start_workers(node, **settings)[0]

    def await_workers(self, *nodes: str) -> None:
        """Return when these nodes are registered and active."""
        wait_for(lambda: self._are_active(nodes), timeout=START_SECONDS, what=f"the workers {nodes} to register")

    def _are_active(self, nodes: tuple[str, ...]) -> bool:
        for node in nodes:
            worker = self.workers[node]
            assert worker.is_running, f"{worker.name} ended at its start:\n{worker.log_tail()}"
        return set(nodes) <= {worker["node"] for worker in self.calls.workers() if worker["state"] == "active"}

    def restore(self) -> None:
        """Start what has ended, thaw what is frozen, and return when everything works again."""
        if not self.coordinator.is_running:
            self.start_coordinator()
        for worker in self.workers.values():
            if worker.is_running:
                worker.thaw()
            else:
                worker.start()
        self.await_workers(*self.workers)

    def logs(self) -> str:
        """The end of every process's log."""
        return "\n".join(f"--- {part.name}\n{part.log_tail()}" for part in (self.coordinator, *self.workers.values()))

    def close(self) -> None:
        """End every process of the fleet, and what they started."""
        for part in (*self.workers.values(), self.coordinator):
            part.close()
        self.calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            error.add_note(self.logs())
        self.close()


def run_to_end(
    module_arguments: list[str], environment: Mapping[str, str], *, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` as a user would and return what it said. Raises subprocess.TimeoutExpired."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OLLM_")}
    return subprocess.run(
        [sys.executable, "-m", *module_arguments],
        env={**kept, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def milliseconds_between(earlier: str, later: str) -> float:
    """The time from one ISO-8601 time to another."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds() * 1000


def counts(job: Mapping[str, Any]) -> tuple[int, int, int]:
    """A job's succeeded, failed and pending rows."""
    return job["counts"]["succeeded"], job["counts"]["failed"], job["counts"]["pending"]


@contextlib.contextmanager
def one_real_worker(directory: Path, models_dir: Path, **settings: str) -> Iterator[Fleet]:
    """A coordinator and one worker with a real runner, on SQLite and without a broker; the worker gets these settings, too."""
    database_url = f"sqlite:///{directory / 'ollm.db'}"
    upgrade(database_url)
    with Fleet(
        directory,
        database_url=database_url,
        broker_url="memory://",
        models_dir=models_dir,
        runner=f"{sys.executable} -m workers.runner",
        settings={"OLLM_CACHE_DIR": str(directory / "kv"), **settings},
    ) as fleet:
        fleet.start_coordinator()
        fleet.start_worker("only")
        yield fleet
