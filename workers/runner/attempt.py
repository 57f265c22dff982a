"""How do one plan's rows get through a loaded model, and what is reported on the way?"""

import gc
from collections.abc import Sequence

import torch

from ollm_service.core.leasing import RowError, RowResult
from ollm_service.core.passes import Failed, PassOutcome
from ollm_service.core.plan import PassId, SpecializationState
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
from workers.runner.interruptions import AttemptEnded, PassFailed
from workers.runner.loops import generate
from workers.runner.measurements import Measurements
from workers.runner.memory import is_out_of_memory
from workers.runner.model import LoadedModel, at_each_layer
from workers.runner.passes.specialization import AppliedPasses, outcomes_after
from workers.runner.progress import Pulse, Report
from workers.runner.prompts import EncodedRow, encode_row


class Attempt:
    """One Execute, from the loaded model to its last row."""

    def __init__(self, command: Execute, report: Report, pulse: Pulse, bare_host_bytes: int = 0) -> None:
        self.command = command
        self.report = report
        self.pulse = pulse
        self.measurements = Measurements(bare_host_bytes)
        self._has_reported_rows = False

    def run(self, model: LoadedModel, passes: AppliedPasses) -> Finished:
        """Answer all rows, and return the last message. Raises StopRequested and PassFailed."""
        self.measurements.start_generating(model.device)
        runnable, refused = self._encode_rows(model)
        self.pulse.stage = "generating"
        if refused and not runnable:
            self._report_results(refused, passes.outcomes(has_run=False), passes)
        batches = MicroBatches(runnable, most_rows=self.command.placement.micro_batch, suspects=self.command.suspects)
        with at_each_layer(model, self.pulse):
            while batches:
                results = self._answer(model, batches)
                if results is None:
                    continue
                # Rows that were refused beforehand travel with the first answers, once the passes have ended well.
                self._report_results([*refused, *results], passes.outcomes(), passes)
                refused = []
        return Finished(measured=self._measured(passes))

    def ending_of(self, end: PassFailed | AttemptEnded) -> Message:
        """A failed pass ends the specialization, unless rows were reported under it already: then it ends the attempt."""
        if isinstance(end, PassFailed):
            return self._failure_of(end)
        return AttemptFailed(
            stage=end.stage, code=end.code, message=end.message, error_type=end.error_type, is_permanent=end.is_permanent
        )

    def broken_by(self, error: Exception) -> Message | None:
        """The failure of the planned passes when anything else broke before rows were reported; None where none are planned.

        Which of them it was cannot be told, so all have failed. Only the kind of error is named: its text might quote a row.
        """
        planned, kind = self.command.runtime_plan.specialization_pass_ids, type(error).__name__
        if self._has_reported_rows or self.command.runtime_plan.specialization_state is not SpecializationState.PLANNED:
            return None
        reason = f"{kind} before the first rows were answered with {', '.join(planned)}"
        outcomes = {pass_id: Failed(reason=reason, error_type=kind) for pass_id in planned}
        return SpecializationFailed(outcomes=outcomes, reason=reason, error_type=kind)

    def _failure_of(self, failure: PassFailed) -> Message:
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
        """The rows that fit the placement, and the results of those that cannot run anywhere."""
        self.pulse.stage = "tokenizing"
        longest = self.command.placement.longest_row_tokens
        runnable: list[EncodedRow] = []
        refused: list[RowResult] = []
        for row in self.command.rows:
            self.pulse()
            encoded_or_refused = encode_row(
                row,
                model.tokenizer,
                model.context_limit,
                is_source=model.has_encoder,
                reader=model.media,
                most_image_tokens=self.command.profile.most_image_tokens,
            )
            match encoded_or_refused:
                case EncodedRow() as encoded:
                    if longest is None or len(encoded.tokens) + encoded.max_new_tokens <= longest:
                        runnable.append(encoded)
                case RowResult() as result:
                    refused.append(result)
        return runnable, refused

    def _answer(self, model: LoadedModel, batches: MicroBatches) -> list[RowResult] | None:
        """The next micro-batch's results, or None when it was too large for the memory and was put back."""
        batch = batches.take()
        self.report(BatchStarted(rows=tuple(row.row for row in batch)))
        try:
            results = [answer.result() for answer in generate(model, batch, self.pulse, self.measurements)]
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
