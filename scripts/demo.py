"""What does the service do for me? Three small jobs on this machine, before your eyes: plan, fallback, and a pulled plug.

Run by `make demo`. Starts the whole service in a temporary folder, leaves nothing running and no files. `--why` prints the full
plans and histories. Exits 1 with a sentence when anything is not as promised.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ollm_service.cli.child_process import TETHER
from ollm_service.client import Client, Job, Plan, Result
from ollm_service.client.views import JobStatus
from ollm_service.core.errors import OllmError
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import SpecializationState

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "demo" / "models"
QUESTIONS, ANSWERS = ROOT / "demo" / "heldout.jsonl", ROOT / "demo" / "heldout_answers.json"
MODEL = "sum-chat"
LEASE_SECONDS = 6
START_SECONDS = 60
JOB_SECONDS = 180
LEAST_RIGHT = 0.95
ROWS_TO_KILL_IN = 640
SHORT = GenerationConfig(max_new_tokens=8)
BAR_WIDTH = 30


class NotAsPromised(Exception):
    """The service did not do what this demo says that it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Questions as rows, and their answers by custom_id."""

    rows: tuple[Mapping[str, Any], ...]
    answers: Mapping[str, str]

    def question(self, custom_id: str) -> str:
        """What was asked, for people."""
        row = next(row for row in self.rows if row["custom_id"] == custom_id)
        return str(row["prompt"] if "prompt" in row else row["messages"][-1]["content"])

    def right(self, results: Sequence[Result]) -> int:
        """How many answers are right."""
        return sum((result.text or "").strip() == self.answers[result.custom_id] for result in results)


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


def main() -> int:
    """Play all three; the exit code."""
    parser = argparse.ArgumentParser(description="Three small jobs, before your eyes.")
    parser.add_argument("--why", action="store_true", help="print the full plans and histories, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    say("ollm_service in three jobs. Everything runs on this machine, in a folder that is gone afterwards.")
    try:
        with tempfile.TemporaryDirectory(prefix="ollm-demo-") as folder, running_service(Path(folder), arguments.why) as stage:
            answers = first_job(stage)
            job_without_its_disk(stage, answers)
            job_with_a_pulled_plug(stage)
    except (NotAsPromised, OllmError, OSError) as error:
        say(f"\nThis is not as promised: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"\nThat was all, in {time.monotonic() - started:.0f} s; nothing runs any more. To go on:")
    say("   .venv/bin/ollm-service up --models-dir demo/models")
    return 0


@contextmanager
def running_service(folder: Path, shows_why: bool) -> Iterator[Stage]:
    """`ollm-service up` in a folder of its own, and its end in any case."""
    promise((MODELS / MODEL / "config.json").is_file(), f"the demo model is not in {MODELS}")
    data_dir = folder / "data"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OLLM_")}
    environment |= {"OLLM_NODE": "this-machine", "OLLM_LEASE_SECONDS": str(LEASE_SECONDS), "HF_HUB_OFFLINE": "1"}
    # Tied to this process, so that killing the demo kills the service, too.
    tied = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid())]
    command = [*tied, sys.executable, "-m", "ollm_service.cli", "up", "--port", "0", "--models-dir", str(MODELS)]
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
            stage.wait_for(lambda: active_workers(client), "a worker", START_SECONDS)
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


# --- the three jobs


def first_job(stage: Stage) -> list[Result]:
    """The plan before the run, the answers, and what became of the plan; returns the answers."""
    sums = heldout_sums(200)
    say("\n1. A job: 200 sums for a small Llama that has never seen them.\n")
    config = RuntimeConfig(dense_projection_chunk_rows=256)
    seen = stage.client.preview(MODEL, config)
    plan = seen.runtime_plan
    say("   Before anything runs, this is the plan:")
    say(f"     backend   {plan.backend_id}")
    say(f"     passes    {', '.join(plan.specialization_pass_ids)}")
    say(f"     because   {plan.reason}")
    say(f"     who can   {', '.join(verdict.node for verdict in seen.workers if verdict.eligible) or 'nobody'}\n")
    job = stage.client.submit(MODEL, sums.rows, runtime=config, generation=SHORT)
    promise(job.plans[0].reason == plan.reason, "the job's plan is not the one that was previewed")
    stage.follow(job)
    results = results_of(job, sums)
    for result in results[1:10:2]:
        say(f"     {sums.question(result.custom_id):15} {result.text:5} {'right' if sums.right([result]) else 'wrong'}")
    say(f"   {tell_right(sums, results)}\n")
    done = stage.client.plan(job.plans[0].id)
    promise(done.runtime_plan.specialization_state is SpecializationState.APPLIED, f"the plan was not applied: {done.reason}")
    tell_history(done)
    stage.why(done)
    return results


def job_without_its_disk(stage: Stage, before: Sequence[Result]) -> None:
    """The cache disk goes, and the plan falls back, for real and with its reason."""
    sums = heldout_sums(40)
    say("\n2. A bad day: the disk for the KV cache is gone (its folder becomes a file, as when a disk is unmounted).\n")
    for _ in range(3):
        with lost_cache_disk(stage.data_dir):
            job = stage.client.submit(MODEL, sums.rows, generation=SHORT)
            stage.follow(job)
        plan = stage.client.plan(job.plans[0].id)
        if plan.runtime_plan.specialization_state is SpecializationState.FALLBACK:
            break
        # The worker looks at its disk every half minute. Just now it looked first, and planned without a disk cache.
        stage.wait_for(lambda: cache_disk_is_seen(stage.client), "the worker to see its disk again", START_SECONDS)
    else:
        raise NotAsPromised(f"the plan did not fall back: {plan.reason}")
    now = {result.custom_id: result.text for result in results_of(job, sums)}
    same = sum(now[result.custom_id] == result.text for result in before[: len(now)])
    promise(same == len(now), f"only {same} of {len(now)} answers are those of the first job")
    say(f"   Answered all the same: {same} of {same} answers are those of the first job.\n")
    tell_history(plan)
    say(f"     because   {plan.runtime_plan.fallback_reason}")
    say("   The disk is back.")
    stage.why(plan)


def job_with_a_pulled_plug(stage: Stage) -> None:
    """The worker is killed in the middle, and nothing is lost or doubled."""
    sums = random_sums(ROWS_TO_KILL_IN)
    say(f"\n3. Pulling the plug: {ROWS_TO_KILL_IN} sums, and `kill -9` for the worker in the middle.\n")
    job = stage.client.submit(MODEL, sums.rows, generation=SHORT)
    stage.follow(job, until=lambda status: status.counts.done >= ROWS_TO_KILL_IN // 4 or status.state.is_final)
    victim = worker_process(stage.service)
    victim.kill()
    kept = stage.client.status(job.id).counts.done
    promise(0 < kept < ROWS_TO_KILL_IN, f"the worker was to be killed in the middle, but {kept} rows were done")
    say(f"   Killed process {victim.pid} after {kept} rows. Another worker starts, and takes over when the lease runs out")
    say(f"   (after {LEASE_SECONDS} s here, by OLLM_LEASE_SECONDS; 30 s unless you set it).")
    stage.follow(job)
    results = results_of(job, sums)
    plans = [stage.client.plan(plan.id) for plan in stage.client.plans(job)]
    workers = {attempt.worker for plan in plans for attempt in plan.attempts}
    promise(len(workers) > 1, "no other worker took over")
    say(f"   {len(results)} rows, {len({result.custom_id for result in results})} answers: none lost, none twice.")
    say(f"   {tell_right(sums, results)}\n")
    interrupted = next(plan for plan in plans if len(plan.attempts) > 1)
    tell_history(interrupted)
    stage.why(interrupted)


@contextmanager
def lost_cache_disk(data_dir: Path) -> Iterator[None]:
    """Replace the worker's cache folder by a file for a while."""
    folder = next((data_dir / "kv").glob("slot-*[0-9]"))
    aside = folder.with_name("away")
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


# --- what is asked, and what is told


def heldout_sums(most: int) -> Sums:
    """Questions that the model was not trained on."""
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()[:most]]
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return Sums(rows=tuple(lines), answers={line["custom_id"]: answers[line["custom_id"]] for line in lines})


def random_sums(number: int) -> Sums:
    """Any sums of two numbers below 100."""
    dice = random.Random(7)
    pairs = {f"sum-{index:03}": (dice.randrange(100), dice.randrange(100)) for index in range(number)}
    rows = tuple({"custom_id": name, "prompt": f"{a}+{b}="} for name, (a, b) in pairs.items())
    return Sums(rows=rows, answers={name: str(a + b) for name, (a, b) in pairs.items()})


def results_of(job: Job, sums: Sums) -> list[Result]:
    """The job's results in row order. Raises NotAsPromised unless every row was answered exactly once."""
    results = sorted(job.refresh().results(), key=lambda result: result.row)
    promise([result.custom_id for result in results] == [row["custom_id"] for row in sums.rows], "rows are lost or doubled")
    failed = next((result for result in results if result.error is not None), None)
    promise(failed is None, f"row {failed.custom_id} failed: {failed.error}" if failed else "")
    return results


def tell_right(sums: Sums, results: Sequence[Result]) -> str:
    """`200 of 200 answers are right.` Raises NotAsPromised below 95 %."""
    right = sums.right(results)
    promise(right >= LEAST_RIGHT * len(results), f"only {right} of {len(results)} answers are right")
    return f"{right} of {len(results)} answers are right."


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


def active_workers(client: Client) -> list[str]:
    """The nodes of the active workers that have the model."""
    return [worker.node for worker in client.workers() if worker.state == "active" and MODEL in worker.usable_models]


def cache_disk_is_seen(client: Client) -> bool:
    """Whether every active worker says that it can apply the disk-cache pass."""
    return all(worker.capabilities["passes"]["disk-cache"] is None for worker in client.workers() if worker.state == "active")


def worker_process(service: subprocess.Popen[bytes]) -> psutil.Process:
    """The worker's own process, a child of the service."""
    for child in psutil.Process(service.pid).children():
        if "workers.app" in child.cmdline():
            return child
    raise NotAsPromised("there is no worker process")


if __name__ == "__main__":
    sys.exit(main())
