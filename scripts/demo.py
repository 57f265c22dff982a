"""What does the service do for me? Four small jobs on this machine, before your eyes: plan, fallback, a pulled plug, and
a model larger than memory.

Run by `make demo`. Starts the whole service in a temporary folder, leaves nothing running and no files. `--why` prints the full
plans and histories. Exits 1 with a sentence when anything is not as promised.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from ollm_service.client import Client, Result
from ollm_service.core.errors import OllmError
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import SpecializationState
from scripts.demo_offload import job_beyond_memory
from scripts.demo_stage import (
    LEASE_SECONDS,
    ROOT,
    START_SECONDS,
    NotAsPromised,
    Stage,
    promise,
    running_service,
    say,
    tell_history,
)
from scripts.demo_sums import SHORT, heldout_sums, random_sums, results_of, tell_right

MODEL = "sum-chat"
ROWS_TO_KILL_IN = 640


def main() -> int:
    """Play all four; the exit code."""
    parser = argparse.ArgumentParser(description="Four small jobs, before your eyes.")
    parser.add_argument("--why", action="store_true", help="print the full plans and histories, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    say("ollm_service in four jobs. Everything runs on this machine, in a folder that is gone afterwards.")
    try:
        with tempfile.TemporaryDirectory(prefix="ollm-demo-") as folder:
            with running_service(Path(folder), ROOT / "demo" / "models" / MODEL, shows_why=arguments.why) as stage:
                answers = first_job(stage)
                job_without_its_disk(stage, answers)
                job_with_a_pulled_plug(stage)
            job_beyond_memory(Path(folder), shows_why=arguments.why)
    except (NotAsPromised, OllmError, OSError) as error:
        say(f"\nThis is not as promised: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"\nThat was all, in {time.monotonic() - started:.0f} s; nothing runs any more. To go on:")
    say("   .venv/bin/ollm-service up --models-dir demo/models")
    return 0


# --- the first three jobs, of one service


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
