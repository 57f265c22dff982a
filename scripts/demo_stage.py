"""Where does the demo play, and how does it speak? A whole service in a folder of its own, and plain lines."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from ollm_service.cli.child_process import TETHER
from ollm_service.client import Client, Job, Plan
from ollm_service.client.views import JobStatus
from ollm_service.core.errors import OllmError

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
LEASE_SECONDS = 6
START_SECONDS = 60
JOB_SECONDS = 180
BAR_WIDTH = 30


class NotAsPromised(Exception):
    """The service did not do what this demo says that it does."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """Where the demo plays: the service, its folder and how much is told."""

    client: Client
    service: subprocess.Popen[bytes]
    data_dir: Path
    shows_why: bool
    _pause: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, condition: Callable[[], T], what: str, seconds: float) -> T:
        """The first truthy value of the condition. Raises NotAsPromised when it takes too long or the service ends."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OllmError):
                value = condition()
                if value:
                    return value
            promise(self.service.poll() is None, "the service ended by itself")
            promise(time.monotonic() < deadline, f"waited {seconds} s in vain for {what}")
            self._pause.wait(0.1)

    def follow(self, job: Job, until: Callable[[JobStatus], bool] = lambda status: status.state.is_final) -> JobStatus:
        """Draw the job's bar until the condition holds."""
        bar = Bar()

        def look() -> JobStatus | None:
            status = self.client.status(job.id)
            bar.draw(status.counts.done, status.row_count)
            return status if until(status) else None

        try:
            return self.wait_for(look, f"{job.id}", JOB_SECONDS) or job.status
        finally:
            bar.close()

    def why(self, plan: Plan) -> None:
        """With --why: everything that is known of a plan."""
        if self.shows_why:
            print(json.dumps(plan.raw, indent=2, ensure_ascii=False))


class Bar:
    """A progress bar in one line on a terminal; elsewhere one line for each quarter."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._drawn = -1
        self._started = time.monotonic()

    def draw(self, done: int, total: int) -> None:
        """Show how far it is."""
        filled = BAR_WIDTH * done // total
        text = f"   [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done} of {total} rows, {time.monotonic() - self._started:.0f} s"
        if self._is_terminal:
            print(f"\r{text}", end="", flush=True)
        elif 4 * done // total != self._drawn:
            say(text)
        self._drawn = 4 * done // total

    def close(self) -> None:
        """Go on below it."""
        if self._is_terminal:
            print(flush=True)


def promise(holds: bool, otherwise: str) -> None:
    """Raise NotAsPromised unless it holds."""
    if not holds:
        raise NotAsPromised(otherwise)


def say(text: str = "") -> None:
    """One line."""
    print(text, flush=True)


@contextmanager
def running_service(folder: Path, model: Path, *, shows_why: bool = False, **settings: str) -> Iterator[Stage]:
    """`ollm-service up` in a folder of its own, and its end in any case. Settings are `OLLM_*` variables."""
    promise((model / "config.json").is_file(), f"there is no model in {model}")
    folder.mkdir(exist_ok=True)
    data_dir = folder / "data"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OLLM_")}
    environment |= {"OLLM_NODE": "this-machine", "OLLM_LEASE_SECONDS": str(LEASE_SECONDS), "HF_HUB_OFFLINE": "1", **settings}
    # Tied to this process, so that killing the demo kills the service, too.
    tied = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid())]
    command = [*tied, sys.executable, "-m", "ollm_service.cli", "up", "--port", "0", "--models-dir", str(model.parent)]
    log = folder / "up.log"
    with log.open("wb") as output:
        service = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)],
            env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        started = time.monotonic()
        url = _url_in(log, service)
        with Client(url) as client:
            stage = Stage(client=client, service=service, data_dir=data_dir, shows_why=shows_why)
            stage.wait_for(lambda: active_workers(client, model.name), "a worker", START_SECONDS)
            say(f"The service is up after {time.monotonic() - started:.0f} s: one server, one worker, an embedded database.")
            yield stage
    finally:
        _end(service)


def _url_in(log: Path, service: subprocess.Popen[bytes]) -> str:
    deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
    while time.monotonic() < deadline and service.poll() is None:
        words = log.read_text(errors="replace").split()
        if "(data" in words:
            return next(word for word in words if word.startswith("http://"))
        pause.wait(0.1)
    raise NotAsPromised(f"the service did not start:\n{log.read_text(errors='replace')}")


def _end(service: subprocess.Popen[bytes]) -> None:
    """End the service and see that nothing of it is left."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(service.pid).children(recursive=True)
    service.terminate()
    try:
        service.wait(timeout=30)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    promise(not left, f"{len(left)} processes outlived the service")


def tell_history(plan: Plan) -> None:
    """Which states the plan went through, and how each pass ended."""
    steps = [event for event in plan.events if event.after]
    execution = [step.after for step in steps if step.kind not in ("applied", "fallback")]
    specialization = plan.runtime_plan.specialization_state
    say("   What became of the plan:")
    say(f"     {' → '.join(str(state) for state in without_repetitions(execution))}")
    say(f"     planned → {specialization}, on {plan.runtime_plan.backend_id}")
    for pass_id in plan.runtime_plan.specialization_pass_ids:
        how = plan.runtime_plan.details.get(f"pass_{pass_id.replace('-', '_')}")
        if how:
            say(f"       {pass_id:14} {how}")


def without_repetitions(states: Sequence[str | None]) -> list[str | None]:
    """The states without repetitions of the one before."""
    return [state for number, state in enumerate(states) if number == 0 or states[number - 1] != state]


def active_workers(client: Client, model: str) -> list[str]:
    """The nodes of the active workers that have the model."""
    return [worker.node for worker in client.workers() if worker.state == "active" and model in worker.usable_models]
