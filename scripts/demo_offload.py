"""What if a model is larger than the memory that a worker may have? The demo's last job: right answers, and its quote kept."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ollm_service.cli.output import bytes_in_words
from ollm_service.cli.preview import duration, quoted_in_words
from ollm_service.client import Attempt, Job, Preview
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.wire import from_json
from scripts.demo_stage import ROOT, START_SECONDS, Stage, promise, running_service, say, tell_history
from scripts.demo_sums import SHORT, random_sums, results_of, tell_right

GIB = 1024**3
MODEL = "sum-deep"
LAYERS, WIDTH = 48, 9216
LIMIT_GB = 0.6
ROWS = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """What the job showed: sizes in bytes, and the attempt that answered all rows."""

    rows: int
    right: int
    model_bytes: int
    limit_bytes: int
    attempt: Attempt


def job_beyond_memory(folder: Path, *, shows_why: bool = False) -> Offloaded:
    """A model that exceeds the memory limit answers. Raises NotAsPromised unless its layers really came from disk."""
    say("\n4. A model that does not fit: the same one, deepened by layers that add nothing. It answers the same, and is large.\n")
    model = deepened(folder / "models" / MODEL)
    size, limit = sum(file.stat().st_size for file in model.glob("*.safetensors")), int(LIMIT_GB * GIB)
    promise(size > limit, f"the model has {size:,} bytes, which {limit:,} hold")
    sizes = f"weigh {bytes_in_words(size)}; the worker may take {bytes_in_words(limit)} in all"
    say(f"   Its {LAYERS} layers {sizes} (OLLM_MEMORY_LIMIT_GB={LIMIT_GB}).")
    with running_service(folder / "small", model, shows_why=shows_why, OLLM_MEMORY_LIMIT_GB=str(LIMIT_GB)) as stage:
        sums = random_sums(ROWS)
        (seen,) = stage.wait_for(lambda: quoted(stage, sums.rows), "the worker's speed to be known", START_SECONDS)
        quote = seen.quote or {}
        (worker,) = quote["workers"]
        say(f"\n   {ROWS} sums. Before anything runs, the quote says:")
        say(f"     how       {worker['placement']['tier']}, {worker['placement']['micro_batch']} rows at a time")
        for refused in worker["placement"]["refused"]:
            needed, usable = bytes_in_words(refused["needed_bytes"]), bytes_in_words(refused["free_bytes"])
            say(f"     not       {refused['tier']}: {needed} needed, {usable} usable beside the libraries")
        say()
        job = stage.client.submit_previewed(seen.id or "", sums.rows)
        stage.follow(job)
        results = results_of(job, sums)
        say(f"   {tell_right(sums, results)}\n")
        plan = stage.client.plan(job.plans[0].id)
        attempt = plan.attempts[-1]
        promise(attempt.placement["layers_on_disk"] > 0, "no layer was placed on disk")
        promise(attempt.measured["weight_bytes_read"] > size, "fewer bytes were read than the model has")
        promise(most_memory(attempt.measured) < limit, f"the runner took {most_memory(attempt.measured):,} bytes")
        tell_beside(quote, job, attempt)
        tell_history(plan)
        stage.why(plan)
    return Offloaded(rows=ROWS, right=sums.right(results), model_bytes=size, limit_bytes=limit, attempt=attempt)


def deepened(folder: Path) -> Path:
    """The demo model with many wide layers, made by a process of its own, so that this one needs no torch."""
    command = [sys.executable, "-m", "scripts.deepen_demo_model", str(folder), "--layers", str(LAYERS), "--width", str(WIDTH)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    promise(made.returncode == 0, f"the model could not be made:\n{made.stderr}")
    return folder


def quoted(stage: Stage, rows: Sequence[Mapping[str, Any]]) -> list[Preview]:
    """The preview with its quote, as soon as the worker has found out how fast it is; until then nothing."""
    seen = stage.client.preview(MODEL, generation=SHORT, rows=rows)
    return [seen] if seen.quote is not None and seen.quote["seconds"] is not None else []


def tell_beside(quote: Mapping[str, Any], job: Job, attempt: Attempt) -> None:
    """What was quoted beside what it took."""
    (worker,) = quote["workers"]
    estimate, measured = from_json(MemoryEstimate, worker["placement"]["estimate"]), attempt.measured
    layers = worker["placement"]["layers_on_disk"]
    say("   What was quoted                                       and what it took:")
    beside("time", quoted_in_words(quote) or "", duration(seconds_of(job)))
    beside("memory", bytes_in_words(estimate.device_bytes), bytes_in_words(measured["peak_device_bytes"]))
    read = f"{measured['layers_brought']:,.0f} times a layer, {bytes_in_words(measured['weight_bytes_read'])}"
    beside("from disk", f"{layers} of {LAYERS} layers for each token of a batch", read)
    say(f"   With all of its libraries the runner never took more than {bytes_in_words(most_memory(measured))}.\n")


def most_memory(measured: Mapping[str, Any]) -> float:
    """The most that a runner on a CPU had taken, in bytes, be it while it loaded the model or while it answered."""
    bare = measured["peak_host_bytes"] - measured["peak_device_bytes"]
    return float(bare + max(measured["peak_device_bytes"], measured["peak_load_bytes"]))


def beside(what: str, quoted_words: str, took: str) -> None:
    """One line of the comparison."""
    say(f"     {what:10}{quoted_words:43} {took}")


def seconds_of(job: Job) -> float:
    """From the submission to the last answer."""
    raw = job.refresh().status.raw
    return (datetime.fromisoformat(raw["finished_at"]) - datetime.fromisoformat(raw["created_at"])).total_seconds()
