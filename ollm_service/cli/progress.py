"""How far is a job? A bar on a terminal, a line every few seconds elsewhere, both on standard error."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ollm_service.cli.output import count, tell
from ollm_service.client import Client
from ollm_service.client.views import JobStatus
from ollm_service.core.errors import OllmError
from ollm_service.core.lifecycle import ExecutionState, JobState

BAR_SECONDS = 0.5
LINE_SECONDS = 5.0


class Display(Protocol):
    """What shows a job's progress: a bar or lines."""

    seconds: float

    def show(self, status: JobStatus) -> None:
        """Show the job as it is now."""

    def close(self) -> None:
        """Leave the place tidy."""


class Bar:
    """A bar that stays in its line."""

    seconds = BAR_SECONDS

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def show(self, status: JobStatus) -> None:
        """Show the job as it is now."""
        self._progress.update(self._task, description=stage(status), total=status.row_count, completed=status.counts.done)

    def close(self) -> None:
        """Leave the bar as it was last."""
        self._progress.stop()


class Lines:
    """A line whenever it is time for one, but no line twice."""

    seconds = LINE_SECONDS

    def __init__(self) -> None:
        self._before: tuple[float, int] | None = None
        self._last = ""

    def show(self, status: JobStatus) -> None:
        """Print the job's progress, with its pace since the line before."""
        now, done = time.monotonic(), status.counts.done
        text = f"{status.id}  {done:,} of {count(status.row_count, 'row')}  {stage(status)}"
        if self._before is not None and done > self._before[1]:
            text += f"  {(done - self._before[1]) / (now - self._before[0]):.1f} rows/s"
        self._before = (now, done)
        if text != self._last:
            tell(text)
        self._last = text

    def close(self) -> None:
        """Nothing is left to do."""


def stage(status: JobStatus) -> str:
    """What the job does now, in a few words."""
    failed = f", {count(status.counts.failed, 'row')} failed" if status.counts.failed else ""
    if status.state.is_final:
        return f"{status.state}{failed}"
    states = Counter(plan.state for plan in status.plans)
    conditions = Counter(plan.condition for plan in status.plans if plan.condition)
    if states[ExecutionState.RUNNING] or states[ExecutionState.LEASED] or status.state is JobState.RUNNING:
        # Until the first rows are answered, most of the time goes into loading the model.
        return f"generating{failed}" if status.counts.succeeded else f"starting{failed}"
    if conditions:
        return f"waiting: {conditions.most_common(1)[0][0]}{failed}"
    return f"queued{failed}"


def new_display() -> Display:
    """A bar where somebody looks, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()


@contextmanager
def shown(client: Client, job_id: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a job's progress, asked for in the background, while the block runs, and once more when it has ended well."""
    if quiet:
        yield
        return
    display, stopping = new_display(), threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            with suppress(OllmError):  # whoever follows the job meets the same error, and does something about it
                display.show(client.status(job_id))
            stopping.wait(display.seconds)

    poller = threading.Thread(target=ask, name="progress", daemon=True)
    poller.start()
    try:
        yield
        stopping.set()
        poller.join(timeout=5)
        display.show(client.status(job_id))
    finally:
        stopping.set()
        display.close()
