"""What does a caller see when something goes wrong? OpenAI's error envelope, with a code and a remedy, whatever went wrong."""

import json
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ollm_service.api.requests import wrong_field
from ollm_service.core.errors import Conflict, DatabaseUnavailable, NotFound, OllmError, RequestError

RETRY_AFTER_SECONDS = 2
_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error"}


class ErrorDetail(BaseModel):
    """One error: what is wrong, where, and what to do about it."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The field that is wrong, where it is one.")
    code: str = Field(examples=["invalid_option"])
    remedy: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Forbidden(RequestError):
    """This request is not allowed here."""

    code = "forbidden"
    status = 403


class MethodNotAllowed(RequestError):
    """This URL does not know this method."""

    code = "method_not_allowed"
    status = 405


def error_response(error: OllmError) -> Response:
    """The error as a response. Everything is ASCII, so that no echoed input can break the encoding."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    detail = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
        "remedy": error.remedy,
    }
    return Response(
        json.dumps({"error": detail}), status_code=error.status, headers=_headers(error), media_type="application/json"
    )


def _headers(error: OllmError) -> dict[str, str]:
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if isinstance(error, Conflict):
        return {"x-should-retry": "false"}  # clients of this API family repeat a 409 by themselves otherwise
    if error.status == 413:
        return {"connection": "close"}
    return {"retry-after": str(RETRY_AFTER_SECONDS)} if error.status == 503 else {}


def install_error_responses(app: FastAPI) -> None:
    """Answer every error that an endpoint raises, and those of the framework, in the envelope."""

    @app.exception_handler(OllmError)
    def _ours(_request: Request, error: OllmError) -> Response:
        return error_response(_with_remedy(error))

    @app.exception_handler(RequestValidationError)
    def _wrong_query(_request: Request, error: RequestValidationError) -> Response:
        return error_response(wrong_field(error.errors()[0]))

    @app.exception_handler(HTTPException)
    def _framework(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            return error_response(NotFound(f"There is nothing at {path}.", remedy="The endpoints are listed at /docs."))
        if error.status_code == 405:
            problem = f"{request.method} is not allowed at {path}."
            return error_response(MethodNotAllowed(problem, remedy="The endpoints and their methods are listed at /docs."))
        wrong = RequestError(str(error.detail))
        wrong.status = error.status_code
        return error_response(wrong)


def _with_remedy(error: OllmError) -> OllmError:
    if error.remedy is None and isinstance(error, DatabaseUnavailable):
        # The message names the server, which is the operator's business and stands in the log.
        return DatabaseUnavailable("The database cannot be reached at the moment.", remedy="Try again in a few seconds.")
    return error
