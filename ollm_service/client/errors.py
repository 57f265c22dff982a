"""Which exception does a refused request become? The one of the core that the service raised, rebuilt from its envelope."""

from collections.abc import Iterator
from typing import Any

from ollm_service.core.errors import OllmError, RequestError, ServiceError


def error_from(status: int, body: Any) -> OllmError:
    """The exception for an answer of 400 or more.

    Known codes become their own class, unknown ones `RequestError` below 500 and `ServiceError` from there on, always with
    the answer's own code, status, message, param and remedy.
    """
    envelope = body.get("error") if isinstance(body, dict) else None
    told: dict[str, Any] = envelope if isinstance(envelope, dict) else {}
    code = _text(told.get("code"))
    fallback = RequestError if status < 500 else ServiceError
    kind = next((found for found in _below(OllmError) if "code" in vars(found) and found.code == code), fallback)
    # Some of them take other arguments; what the service told is complete already.
    error = kind.__new__(kind)
    message = _text(told.get("message")) or f"The service answered {status} without saying why."
    OllmError.__init__(error, message, param=_text(told.get("param")), remedy=_text(told.get("remedy")))
    error.code = code or fallback.code
    error.status = status
    return error


def _below(kind: type[OllmError]) -> Iterator[type[OllmError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
