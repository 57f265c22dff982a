"""Is the runner getting on, and has it been asked to stop?"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ollm_service.core.wire import Message, Progress
from workers.runner.interruptions import StopRequested
from workers.runner.memory import bytes_taken_in

Report = Callable[[Message], None]
REPORT_SECONDS = 1.0


class Pulse:
    """Called wherever work gets on (each layer, each decode step): reports at most once a second and obeys a Stop."""

    def __init__(self, report: Report, stop: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._stop = stop
        self._clock = clock
        self._last = clock()
        self.stage = "starting"
        self.tokens = 0

    def __call__(self) -> None:
        """Raises StopRequested when the plan is to be stopped."""
        if self._stop.is_set():
            raise StopRequested
        now = self._clock()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            self._report(Progress(stage=self.stage, tokens=self.tokens))


class LoadWatch:
    """Reports progress from beside a long load, but only while this process really takes in bytes."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report = report
        self._stage = stage
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="load-watch", daemon=True)

    def __enter__(self) -> Self:
        self._report(Progress(stage=self._stage))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = bytes_taken_in()
        while not self._is_over.wait(REPORT_SECONDS):
            now = bytes_taken_in()
            if now != seen:
                seen = now
                self._report(Progress(stage=self._stage))
