"""What is a pass to the runner, and how do the planned ones come to their ends?

Each planned pass ends exactly once, as applied, not needed or failed, and the end is known with the first answers. Nothing
is applied unless real forward passes have shown it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from ollm_service.core.passes import Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from workers.runner.interruptions import PassFailed, StopRequested, first_line


class SpecializationPass(Protocol):
    """One pass on one model, for one attempt."""

    pass_id: PassId

    def check(self) -> PassOutcome | None:
        """Whether it can and need be applied here: NotNeeded or Failed where not, None where it can."""

    def apply(self) -> None:
        """Change the model. Raises PassFailed."""

    def evidence(self) -> PassOutcome:
        """What real forward passes have shown so far."""

    def undo(self) -> None:
        """Leave the model as it was found, and nothing on disk. Never raises."""

    def measured(self) -> Mapping[str, float]:
        """Counts and bytes so far, by name."""


class AppliedPasses:
    """The passes of one attempt, from check to undo."""

    def __init__(self, passes: Sequence[SpecializationPass]) -> None:
        self._planned = [one.pass_id for one in passes]
        self._passes = passes
        self._applied: list[SpecializationPass] = []
        self._ended: dict[PassId, PassOutcome] = {}

    def apply(self) -> None:
        """Check and apply all, in order. Raises PassFailed at the first that fails."""
        for one in self._passes:
            with _blamed_on(one.pass_id):
                outcome = one.check()
                if isinstance(outcome, Failed):
                    raise PassFailed(one.pass_id, outcome.reason, outcome.error_type)
                if outcome is not None:
                    self._ended[one.pass_id] = outcome
                    continue
                self._applied.append(one)
                one.apply()

    def outcomes(self, *, has_run: bool = True) -> dict[PassId, PassOutcome]:
        """How every planned pass ended, in planned order. Raises PassFailed when one took no effect though it had to.

        `has_run` false: no row could run, so that there was nothing to take effect on.
        """
        nothing = NotNeeded(reason="no row could run")
        seen = self._ended | {one.pass_id: one.evidence() if has_run else nothing for one in self._applied}
        for pass_id, outcome in seen.items():
            if isinstance(outcome, Failed):
                raise PassFailed(pass_id, outcome.reason, outcome.error_type)
        return {pass_id: seen[pass_id] for pass_id in self._planned}

    def measured(self) -> dict[str, float]:
        """Everything that the applied passes count."""
        return {name: value for one in self._applied for name, value in one.measured().items()}

    def undo(self) -> None:
        """Undo in reverse order."""
        while self._applied:
            self._applied.pop().undo()


@contextmanager
def _blamed_on(pass_id: PassId) -> Iterator[None]:
    """Whatever goes wrong while a pass is put in place is that pass's failure."""
    try:
        yield
    except (PassFailed, StopRequested):
        raise
    except Exception as error:
        raise PassFailed(pass_id, f"it cannot be applied: {first_line(error)}", type(error).__name__) from error


def outcomes_after(failure: PassFailed, planned: Sequence[PassId]) -> dict[PassId, PassOutcome]:
    """How every planned pass ended when one failed: nothing of the others was kept."""
    return {
        pass_id: Failed(reason=failure.reason, error_type=failure.error_type)
        if pass_id == failure.pass_id
        else NotNeeded(reason=f"given up because {failure.pass_id} failed")
        for pass_id in planned
    }
