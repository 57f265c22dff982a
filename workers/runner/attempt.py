"""How do one plan's rows get through a loaded model, and what is reported on the way?"""

import gc
from collections.abc import Sequence

import torch

from ollm_service.core.leasing import RowError, RowResult
from ollm_service.core.passes import PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    Execute,
    Finished,
    Message,
    SpecializationFailed,
)
from workers.runner.batching import MicroBatches
from workers.runner.decoding import generate
from workers.runner.interruptions import PassFailed
from workers.runner.measurements import Measurements
from workers.runner.memory import is_out_of_memory
from workers.runner.model import LoadedModel, at_each_layer
from workers.runner.passes.specialization import AppliedPasses, outcomes_after
from workers.runner.progress import Pulse, Report
from workers.runner.prompts import EncodedRow, encode_row


class Attempt:
    """One Execute, from the loaded model to its last row."""

    def __init__(self, command: Execute, report: Report, pulse: Pulse) -> None:
        self.command = command
        self.report = report
        self.pulse = pulse
        self.measurements = Measurements()
        self._has_reported_rows = False

    def run(self, model: LoadedModel, passes: AppliedPasses) -> None:
        """Answer all rows and report Finished. Raises StopRequested and PassFailed."""
        self.measurements.start_generating(model.device)
        runnable, refused = self._encode_rows(model)
        self.pulse.stage = "generating"
        if refused and not runnable:
            self._report_results(refused, passes.outcomes(has_run=False), passes)
        batches = MicroBatches(runnable, most_rows=self.command.placement.micro_batch)
        with at_each_layer(model, self.pulse):
            while batches:
                results = self._answer(model, batches)
                if results is None:
                    continue
                # Rows that were refused beforehand travel with the first answers, once the passes have ended well.
                self._report_results([*refused, *results], passes.outcomes(), passes)
                refused = []
        self.report(Finished(measured=self._measured(passes)))

    def failure_of(self, failure: PassFailed) -> Message:
        """A failed pass ends the specialization, unless rows were reported under it already: then it ends the attempt."""
        if self._has_reported_rows:
            return AttemptFailed(
                stage="generating",
                code="pass_failed",
                message=f"{failure.pass_id}: {failure.reason}",
                error_type=failure.error_type,
            )
        return SpecializationFailed(
            outcomes=outcomes_after(failure, self.command.runtime_plan.specialization_pass_ids),
            reason=f"{failure.pass_id}: {failure.reason}",
            error_type=failure.error_type,
        )

    def _encode_rows(self, model: LoadedModel) -> tuple[list[EncodedRow], list[RowResult]]:
        self.pulse.stage = "tokenizing"
        runnable: list[EncodedRow] = []
        refused: list[RowResult] = []
        for row in self.command.rows:
            self.pulse()
            match encode_row(row, model.tokenizer, model.context_limit):
                case EncodedRow() as encoded:
                    runnable.append(encoded)
                case RowResult() as result:
                    refused.append(result)
        return runnable, refused

    def _answer(self, model: LoadedModel, batches: MicroBatches) -> list[RowResult] | None:
        """The next micro-batch's results, or None when it was too large for the memory and was put back."""
        batch = batches.take()
        self.report(BatchStarted(rows=tuple(row.row for row in batch)))
        try:
            results = [answer.result() for answer in generate(model, batch, self.pulse)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            results = [] if len(batch) > 1 else [_out_of_memory(batch[0])]
        if results:
            self.measurements.count(results)
            return results
        # Outside the except clause, so that the error's frames no longer hold the tensors.
        self.measurements.halvings += 1
        batches.halve(batch)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _report_results(self, results: Sequence[RowResult], outcomes: dict[PassId, PassOutcome], passes: AppliedPasses) -> None:
        self.report(BatchDone(results=tuple(results), outcomes=outcomes, measured=self._measured(passes)))
        self._has_reported_rows = True

    def _measured(self, passes: AppliedPasses) -> dict[str, float]:
        return self.measurements.as_dict() | passes.measured()


def _out_of_memory(row: EncodedRow) -> RowResult:
    message = f"Memory ran out on this row alone, with {len(row.tokens):,} prompt tokens."
    return RowResult(row=row.row, prompt_tokens=len(row.tokens), error=RowError(code="generation_failed", message=message))
