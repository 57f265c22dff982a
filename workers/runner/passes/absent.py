"""What becomes of a planned pass that this runner does not have?

A planned pass is a preference unless it was asked for. One that was asked for fails. Any other had nothing to do, and says why:
the model runs without it, only without its benefit.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ollm_service.core.passes import Failed, NotNeeded, PassOutcome
from ollm_service.core.plan import PassId
from ollm_service.core.requirements import demanded_passes
from ollm_service.core.wire import Execute

_NOT_HAD = "this runner does not have the pass"
_INSTEAD: Mapping[PassId, str] = MappingProxyType({})


class AbsentPass:
    """A pass that changes nothing, and has ended before it began."""

    def __init__(self, pass_id: PassId, command: Execute) -> None:
        self.pass_id = pass_id
        self._is_demanded = pass_id in demanded_passes(command.runtime_plan, command.config)

    def check(self) -> PassOutcome:
        """Failed where it was asked for or nothing can stand in for it, else not needed."""
        instead = _INSTEAD.get(self.pass_id)
        if self._is_demanded or instead is None:
            return Failed(reason=_NOT_HAD, error_type="UnknownPass")
        return NotNeeded(reason=instead)

    def apply(self) -> None:
        """Never called: the check has ended it."""
        raise AssertionError(f"{self.pass_id} cannot be applied")

    def evidence(self) -> PassOutcome:
        """What the check said."""
        return self.check()

    def undo(self) -> None:
        """Nothing was done."""

    def measured(self) -> Mapping[str, float]:
        """Nothing was counted."""
        return {}
