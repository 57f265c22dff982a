"""What happens to every request before its endpoint? A name, a log line, a check of who asks, and a limit to its size."""

import hashlib
import hmac
import ipaddress
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollm_service.api.errors import Forbidden, error_response
from ollm_service.core.errors import AuthenticationFailed, BodyTooLarge, OllmError, ServiceError

REQUEST_ID = "x-request-id"
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
LINGER_BYTES = 8 * 1024**2
LINGER_SECONDS = 5.0
_GOOD_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)


class InternalError(ServiceError):
    """Something went wrong inside the service; the log has the details under this request's id."""

    code = "internal_error"


class RequestLog:
    """Gives each request an id, logs its outcome, and answers what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _GOOD_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        began, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:  # noqa: BLE001 - the API edge: the last place where an error can become an answer
            _log_failure(error, request_id)
            if status == 0:
                unexpected = error if isinstance(error, OllmError) else InternalError(remedy=f"Report it with {request_id}.")
                await error_response(unexpected)(scope, receive, send_named)
            # Of an answer that has begun, the rest is missing: the server then cuts the connection, which the client sees.
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
            }
            _log.log(logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO, "request", extra=fields)


def _log_failure(error: Exception, request_id: str) -> None:
    """Where it failed and with what type; an exception's text could quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    detail = error.message if isinstance(error, OllmError) else f"{type(error).__name__}\n{frames}"
    _log.error("request-failed", extra={"request_id": request_id, "error": detail})


class Doorkeeper:
    """Lets in who has a key. Without keys, only those who reach us by a loopback name, and pages that came from there.

    Only the keys' hashes are kept, and all of them are compared, in constant time.
    """

    def __init__(self, app: ASGIApp, *, key_hashes: Sequence[bytes]) -> None:
        self._app = app
        self._key_hashes = tuple(key_hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it before its body is read."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> OllmError | None:
        headers = Headers(scope=scope)
        if not self._key_hashes:
            return _refusal_of_strangers(headers)
        if scope["path"] in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hash_key(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._key_hashes]
        if scheme.lower() == "bearer" and any(matches):
            return None
        return AuthenticationFailed(remedy="Send the header Authorization: Bearer KEY with a key from OLLM_API_KEYS.")


def key_hashes(api_keys: str) -> list[bytes]:
    """What is kept of a comma-separated list of API keys; empty where there are none."""
    return [hash_key(key.strip()) for key in api_keys.split(",") if key.strip()]


def hash_key(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refusal_of_strangers(headers: Headers) -> OllmError | None:
    """A web page elsewhere must not reach a service without keys through its visitor's browser, by rebinding or directly."""
    origin = headers.get("origin")
    if is_loopback(_host_of(f"//{headers.get('host', '')}")) and (origin is None or is_loopback(_host_of(origin))):
        return None
    return Forbidden(
        "Without API keys this service answers on loopback names only.", remedy="Use http://127.0.0.1, or set OLLM_API_KEYS."
    )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class BodyLimit:
    """Refuses a body over the limit as soon as that is known, whether its length was announced or it comes in chunks."""

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; reading too much of its body raises BodyTooLarge."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._most_bytes:
            if "expect" not in headers:
                await _linger(receive)
            await error_response(self._too_large())(scope, receive, send)
            return
        seen = 0

        async def receive_limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most_bytes:
                if message.get("more_body", False):
                    await _linger(receive)
                raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The body is over the limit of {self._most_bytes:,} bytes.",
            remedy="Split it into several jobs, or raise OLLM_MAX_BODY_BYTES.",
        )


async def _linger(receive: Receive) -> None:
    """Swallow some of what is still coming: a client that is cut off while it writes may never read its answer."""
    swallowed = 0
    with anyio.move_on_after(LINGER_SECONDS):
        while swallowed < LINGER_BYTES:
            message = await receive()
            swallowed += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return
