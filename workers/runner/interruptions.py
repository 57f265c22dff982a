"""What can cut an attempt short, other than a defect?"""

from ollm_service.core.plan import PassId


class StopRequested(Exception):
    """The supervisor asked for the plan to be stopped."""


class PassFailed(Exception):
    """A planned pass cannot be applied, or broke down at work."""

    def __init__(self, pass_id: PassId, reason: str, error_type: str | None = None) -> None:
        super().__init__(reason)
        self.pass_id = pass_id
        self.reason = reason
        self.error_type = error_type or type(self).__name__


class AttemptEnded(Exception):
    """The plan cannot go on in this runner, for a reason that has a code of its own."""

    def __init__(self, *, stage: str, code: str, message: str, error_type: str, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.stage = stage
        self.code = code
        self.message = message
        self.error_type = error_type
        self.is_permanent = is_permanent


def first_line(error: BaseException) -> str:
    """The error's first line, shortened. Only for what happens before the first row is fed: later texts may quote a prompt."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
