"""How do one plan's rows get through a loaded model, and what is reported on the way?"""

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from ollm_service.core.leasing import RowResult
from ollm_service.core.passes import Failed, PassOutcome
from ollm_service.core.plan import PassId, SpecializationState
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    Execute,
    Finished,
    LongRow,
    Message,
    SpecializationFailed,
)
from workers.runner.interruptions import AttemptEnded, PassFailed
from workers.runner.loops import loop_for
from workers.runner.measurements import Measurements
from workers.runner.model import LoadedModel, at_each_layer
from workers.runner.passes.specialization import AppliedPasses, outcomes_after
from workers.runner.progress import REPORT_SECONDS, Pulse, Report
from workers.runner.prompts import EncodedRow, encode_row


class Attempt:
    """One Execute, from the loaded model to its last row."""

    def __init__(
        self,
        command: Execute,
        report: Report,
        pulse: Pulse,
        bare_host_bytes: int = 0,
        report_seconds: float = REPORT_SECONDS,
        **of_packs: Any,
    ) -> None:
        """Answers are reported at most so often, all that there are. `of_packs` are options of `PackedLoop`."""
        self.command = command
        self.report = report
        self.pulse = pulse
        self.measurements = Measurements(bare_host_bytes)
        self._report_seconds = report_seconds
        self._of_packs = of_packs
        self._has_reported_rows = False
        self._outcomes: dict[PassId, PassOutcome] = {}
        self._too_long: list[LongRow] = []

    def run(self, model: LoadedModel, passes: AppliedPasses) -> Finished:
        """Answer all rows, and return the last message. Raises StopRequested and PassFailed."""
        self.measurements.start_generating(model.device)
        runnable, refused = self._encode_rows(model)
        self.pulse.stage = "generating"
        if not runnable:
            if refused:
                self._report_results(refused, passes.outcomes(has_run=False), passes)
            return self._finished(passes)
        loop = loop_for(
            model,
            self.command.runtime_plan.backend_id,
            planned_tokens=self.command.placement.longest_row_tokens,
            **self._of_packs,
        )(
            model,
            runnable,
            most_rows=self.command.placement.micro_batch,
            suspects=self.command.suspects,
            pulse=self.pulse,
            measurements=self.measurements,
            started=lambda rows: self.report(BatchStarted(rows=rows)),
        )
        # Rows that were refused beforehand travel with the first answers, once the passes have ended well.
        held, answered, reported_at = refused, 0, -self._report_seconds
        try:
            with at_each_layer(model, self.pulse), closing(loop.run()) as forward_passes:
                for results in forward_passes:
                    held += results
                    answered += len(results)
                    if held and answered and time.monotonic() - reported_at >= self._report_seconds:
                        self._report_results(held, passes.outcomes(), passes)
                        held, reported_at = [], time.monotonic()
                        if loop.in_flight:
                            self.report(BatchStarted(rows=loop.in_flight))
        except Exception:
            # Whatever ends the attempt, answers that are there are not computed a second time elsewhere.
            if held and self._has_reported_rows:
                self._report_results(held, self._outcomes, passes)
            raise
        if held:
            self._report_results(held, passes.outcomes(), passes)
        return self._finished(passes)

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
            )
            match encoded_or_refused:
                case EncodedRow() as encoded:
                    tokens = len(encoded.tokens) + encoded.max_new_tokens
                    if longest is None or tokens <= longest:
                        runnable.append(encoded)
                    else:
                        self._too_long.append(LongRow(row=row.row, prompt_tokens=len(encoded.tokens), tokens=tokens))
                case RowResult() as result:
                    refused.append(result)
        return runnable, refused

    def _report_results(self, results: Sequence[RowResult], outcomes: dict[PassId, PassOutcome], passes: AppliedPasses) -> None:
        self.report(BatchDone(results=tuple(results), outcomes=outcomes, measured=self._measured(passes)))
        self._has_reported_rows, self._outcomes = True, outcomes

    def _finished(self, passes: AppliedPasses) -> Finished:
        return Finished(measured=self._measured(passes), too_long=tuple(self._too_long))

    def _measured(self, passes: AppliedPasses) -> dict[str, float]:
        return self.measurements.as_dict() | passes.measured()
