"""What can go wrong, whose fault is it, and what should they do about it?

Two branches: `RequestError` is the caller's to mend (HTTP 4xx), `ServiceError` is ours or the surroundings' (HTTP 5xx).
Expected outcomes of matching, placement and attempts are not errors: they are returned as data.
"""

from collections.abc import Iterable

_LONGEST_ECHO = 80


def printable(text: str) -> str:
    """The text with everything that a terminal or a database could choke on written as an escape."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def shown(value: object) -> str:
    """A hostile value as a message may repeat it: short and printable."""
    if not isinstance(value, str | float | None):
        short = isinstance(value, int) and abs(value) < 10**15
        return str(value) if short else f"a {type(value).__name__}"
    text = printable(str(value))
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}…"


class OllmError(Exception):
    """Something went wrong in ollm_service; see the code."""

    code = "internal_error"
    status = 500

    def __init__(self, message: str | None = None, *, param: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message or type(self).__doc__ or self.code)
        self.message = str(self)
        self.param = param
        self.remedy = remedy


class RequestError(OllmError):
    """The request cannot be carried out as it stands."""

    code = "invalid_request"
    status = 400


class InvalidOption(RequestError):
    """An option has a value that is not allowed."""

    code = "invalid_option"

    def __init__(self, param: str, problem: str, *, allowed: Iterable[object] = ()) -> None:
        values = ", ".join(str(value) for value in allowed)
        remedy = f"Allowed: {values}." if values else None
        super().__init__(f"{param}: {problem}." + (f" {remedy}" if remedy else ""), param=param, remedy=remedy)


class InvalidReference(RequestError):
    """The model reference is malformed or leaves the models root."""

    code = "invalid_model_reference"


class InvalidJob(RequestError):
    """The job cannot be accepted as a whole."""

    code = "invalid_job"


class InvalidExpression(RequestError):
    """The label expression cannot be parsed."""

    code = "invalid_expression"


class AuthenticationFailed(RequestError):
    """The API key is missing or unknown."""

    code = "authentication_failed"
    status = 401


class NotFound(RequestError):
    """There is no such object."""

    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    """No worker has this model, and its name is neither an alias nor a hub id."""

    code = "model_not_found"


class Conflict(RequestError):
    """The request contradicts what is already stored."""

    code = "conflict"
    status = 409


class IdempotencyConflict(Conflict):
    """This idempotency key was used before with another body."""

    code = "idempotency_conflict"


class PlanChanged(Conflict):
    """What was previewed is not what would run now."""

    code = "plan_changed"


class BodyTooLarge(RequestError):
    """The request body is over the size limit."""

    code = "body_too_large"
    status = 413


class PlanNotExecutable(RequestError):
    """The plan names no backend that could run it."""

    code = "plan_not_executable"
    status = 422


class ServiceError(OllmError):
    """The service cannot do its part at present."""

    code = "service_error"
    status = 500


class DatabaseUnavailable(ServiceError):
    """The database cannot be reached."""

    code = "database_unavailable"
    status = 503


class BrokerUnavailable(ServiceError):
    """The message broker cannot be reached."""

    code = "broker_unavailable"
    status = 503


class MisconfiguredService(ServiceError):
    """A setting of this process is missing, malformed or unsafe."""

    code = "misconfigured"
