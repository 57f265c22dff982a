"""How does one request reach the service, and what happens when it does not? Every request here may safely be sent twice.

A service that has never answered is given a few seconds, since it is probably not there at all. One that has answered is
given longer, since it is probably being started again. Nothing waits forever.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx

from ollm_service.client.errors import error_from
from ollm_service.core.errors import OllmError, RequestError, ServiceError

T = TypeVar("T")

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
PATIENCE_WITH_STRANGERS = 2.0
PATIENCE_WITH_RESTARTS = 60.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
# The request may have been acted on or not; asking again tells. 408 and 429 ask for that themselves.
WORTH_REPEATING = frozenset({408, 429, 500, 502, 503, 504})


class ServiceUnreachable(ServiceError):
    """The service does not answer."""

    code = "service_unreachable"
    status = 503


class Transport:
    """Requests to one service. Thread-safe, as httpx's client is."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                # A proxy for the outside world has no business between us and this machine.
                trust_env=not _is_loopback(self.base_url),
            )
            is_web = httpx.URL(self.base_url).scheme in ("http", "https") and bool(httpx.URL(self.base_url).host)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise RequestError(f"The service's address or API key is malformed: {error}.") from error
        if not is_web:
            raise RequestError(f"`{base_url}` is not the address of a service.", remedy="Write it like http://127.0.0.1:8000.")
        self._has_answered = False

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON answer to GET. Raises OllmError."""
        return self._persist(lambda: self._once("GET", path, params=_given(params)))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to POST; the caller makes sure that sending it twice does no harm. Raises OllmError."""
        content = None if body is None else encode(body)
        return self._persist(lambda: self._once("POST", path, content=content))

    @contextmanager
    def stream(self, path: str, *, read_seconds: float, **params: Any) -> Iterator[Iterator[bytes]]:
        """The lines of a streamed answer, once: a broken connection raises ServiceUnreachable.

        Lines end at a line feed and nowhere else: JSON may hold the other separators of Unicode. An unfinished last line is
        never handed out.
        """
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, read=read_seconds)
        try:
            with self._http.stream("GET", path, params=_given(params), timeout=timeout) as answer:
                if answer.status_code >= 400:
                    answer.read()
                self._check(answer)
                yield _lines(answer.iter_bytes())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def patience_with(self, error: OllmError) -> "Patience":
        """How long to go on after this error. Raises it where asking again cannot help."""
        if error.status not in WORTH_REPEATING:
            raise error
        # An internal error most often comes again; a service or a database that is away comes back.
        is_away = self._has_answered and error.status != 500
        return Patience(PATIENCE_WITH_RESTARTS if is_away else PATIENCE_WITH_STRANGERS)

    def _persist(self, ask: Callable[[], T]) -> T:
        patience: Patience | None = None
        while True:
            try:
                return ask()
            except OllmError as error:
                again = self.patience_with(error)
                patience = patience or again
                patience.pause_or_raise(error)

    def _once(self, method: str, path: str, *, params: Mapping[str, Any] | None = None, content: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            answer = self._http.request(method, path, params=params, content=content, headers=headers)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        self._check(answer)
        try:
            return answer.json()
        except ValueError as error:
            raise ServiceError(
                f"What answers at {self.base_url} is not ollm_service: {method} {path} gave no JSON.",
                remedy="Check OLLM_BASE_URL.",
            ) from error

    def _check(self, answer: httpx.Response) -> None:
        self._has_answered = self._has_answered or answer.status_code < 500
        if answer.status_code < 300:
            return
        if answer.status_code < 400:
            raise ServiceError(f"{self.base_url} redirects to {answer.headers.get('location')}.", remedy="Check OLLM_BASE_URL.")
        try:
            body = answer.json()
        except ValueError:
            body = None
        raise error_from(answer.status_code, body)

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnreachable:
        why = str(error) or type(error).__name__
        return ServiceUnreachable(
            f"No service answers at {self.base_url} ({why}).",
            remedy="Start one on this machine with `ollm-service up`, or point OLLM_BASE_URL to one that runs.",
        )


class Patience:
    """How much longer one request is worth repeating: growing pauses with jitter within a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = FIRST_PAUSE
        self._alarm = threading.Event()

    def pause_or_raise(self, error: OllmError) -> None:
        """Wait a little; raises `error` when the patience is used up."""
        pause = self._pause * random.uniform(0.5, 1.0)
        if time.monotonic() + pause > self._deadline:
            raise error
        self._alarm.wait(pause)
        self._pause = min(LONGEST_PAUSE, self._pause * 2)


def encode(body: Any) -> bytes:
    """JSON in ASCII, so that half a surrogate pair travels as the escape that it came as. Raises RequestError."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The request cannot be written as JSON: {error}.") from error


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _is_loopback(base_url: str) -> bool:
    host = httpx.URL(base_url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
