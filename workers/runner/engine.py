"""In what order does the runner carry out a plan?

Load the model unless it is warm; check and apply the passes; answer the rows; undo the passes. The first results are reported
only when every planned pass has ended well: otherwise the pass's failure is reported instead, and nothing of the attempt is
kept.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from ollm_service.core.wire import Execute, Loaded, Message, Stopped
from workers.runner.attempt import Attempt
from workers.runner.backends import generic, native
from workers.runner.interruptions import AttemptEnded, PassFailed, StopRequested, first_line
from workers.runner.memory import PrivatePeak, host_bytes, is_out_of_memory, private_host_bytes
from workers.runner.model import LoadedModel, free_memory
from workers.runner.passes.specialization import AppliedPasses, SpecializationPass
from workers.runner.progress import REPORT_SECONDS, LoadWatch, Pulse, Report

PassSource = Callable[[LoadedModel, Execute], Sequence[SpecializationPass]]


class Engine:
    """Holds the warm model and carries out one plan at a time.

    `planned_passes` gives the passes that a plan names; answers are reported every `report_seconds` at most. `of_packs` are
    options of `PackedLoop`.
    """

    def __init__(
        self,
        planned_passes: PassSource = native.planned_passes,
        report_seconds: float = REPORT_SECONDS,
        **of_packs: Any,
    ) -> None:
        self._planned_passes = planned_passes
        self._report_seconds = report_seconds
        self._of_packs = of_packs
        self._model: LoadedModel | None = None
        self._passes = AppliedPasses(())
        self._bare_host_bytes = self._bare_private_bytes = 0

    def execute(self, command: Execute, report: Report, stop: threading.Event) -> None:
        """Carry out the plan; the last message is Finished, Stopped, SpecializationFailed or AttemptFailed.

        Raises whatever else goes wrong; the passes are undone in any case.
        """
        # The first plan finds a process without a model.
        self._bare_host_bytes = self._bare_host_bytes or host_bytes()
        self._bare_private_bytes = self._bare_private_bytes or private_host_bytes()
        attempt = Attempt(command, report, Pulse(report, stop), self._bare_host_bytes, self._report_seconds, **self._of_packs)
        try:
            last = self._carry_out(attempt)
        finally:
            self.abandon()
        # Whoever hears the last message finds the plan's files gone.
        report(last)

    def abandon(self) -> None:
        """Undo the passes of the current plan, if there is one, and delete its files. They hold its model no longer."""
        self._passes.undo()
        self._passes = AppliedPasses(())

    def has_lost(self, device_id: str) -> bool:
        """Whether this process can use the device no more. Waits for what it still computes.

        After a failed assertion in a kernel, or its access to memory that is not its own, every later call in the process fails,
        whatever the exception was that told of it (torch.AcceleratorError, or cuBLAS's own), and whatever that became here: a
        failed pass, a failed load or a surprise.
        """
        if device_id == "cpu":
            return False
        try:
            torch.accelerator.synchronize(device_id)
        except RuntimeError:
            return True
        return False

    def _carry_out(self, attempt: Attempt) -> Message:
        """Returns the last message."""
        command = attempt.command
        try:
            model = self._load(command, attempt)
            model.media = generic.media_reader(model, command)
            self._passes = AppliedPasses(self._planned_passes(model, command))
            self._passes.apply()
            return attempt.run(model, self._passes)
        except StopRequested:
            return Stopped()
        except (PassFailed, AttemptEnded) as end:
            return attempt.ending_of(end)
        except Exception as error:
            # With passes planned, anything that breaks before the first rows are reported may be their doing.
            broken = attempt.broken_by(error)
            if broken is None:
                raise
            return broken

    def _load(self, command: Execute, attempt: Attempt) -> LoadedModel:
        key, started = generic.model_key(command), time.monotonic()
        attempt.pulse.stage = "loading"
        attempt.pulse()
        if self._model is not None and self._model.key == key and not self._model.is_broken:
            attempt.report(Loaded(seconds=0.0, was_warm=True))
            return self._model
        self._model = None
        free_memory()
        with LoadWatch(attempt.report, "loading"), PrivatePeak() as memory:
            try:
                self._model = generic.load(command, attempt.pulse)
            except (OSError, ValueError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
                raise _load_failure(error) from error
        attempt.measurements.load_seconds = time.monotonic() - started
        attempt.measurements.peak_load_bytes = max(0, memory.peak - self._bare_private_bytes)
        attempt.report(Loaded(seconds=attempt.measurements.load_seconds, was_warm=False))
        return self._model


def _load_failure(error: Exception) -> AttemptEnded:
    """Paths are told, contents are not: loading has seen no row yet."""
    return AttemptEnded(
        stage="loading",
        code="out_of_memory" if is_out_of_memory(error) else "load_failed",
        message=first_line(error),
        error_type=type(error).__name__,
    )
