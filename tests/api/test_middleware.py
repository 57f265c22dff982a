"""What does a client see when an endpoint breaks, before its answer has begun and in the middle of it?"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from ollm_service.api.logs import FieldFormatter
from ollm_service.api.middleware import RequestLog
from tests.servers import LOOPBACK, free_port
from tests.waiting import wait_for

SECRET = "what the user asked"


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that breaks: at once, or at /late after the first part of its answer."""
    if scope["path"] == "/late":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]})
        await send({"type": "http.response.body", "body": b'{"row":0}\n', "more_body": True})
    raise ValueError(SECRET)


@contextmanager
def serving() -> Iterator[str]:
    """The URL of that app on a real server."""
    port = free_port()
    config = uvicorn.Config(RequestLog(broken), host=LOOPBACK, port=port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started, timeout=20, what="the server to listen")
    yield f"http://{LOOPBACK}:{port}"
    server.should_exit = True
    thread.join(timeout=20)


def test_a_fault_of_ours_is_a_500_in_the_envelope_and_keeps_secrets(caplog: pytest.LogCaptureFixture) -> None:
    """The answer names the request's id, the log has the place under that id, and neither quotes the exception."""
    with caplog.at_level(logging.INFO), serving() as base:
        answered = httpx.get(base, headers={"x-request-id": "mine"}, trust_env=False)
    error = answered.json()["error"]
    assert (answered.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "mine" in error["remedy"]
    (failure,) = [record for record in caplog.records if record.getMessage() == "request-failed"]
    line = FieldFormatter().format(failure)
    assert "request_id=mine" in line
    assert "test_middleware.py" in line
    assert SECRET not in answered.text + caplog.text + line


def test_an_answer_that_breaks_off_is_seen_as_broken_off() -> None:
    """A client never takes the part of a stream for the whole: its end is missing."""
    with serving() as base, httpx.stream("GET", f"{base}/late", trust_env=False) as answered:
        assert answered.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            answered.read()


def test_log_lines_are_one_line_each_whatever_they_hold() -> None:
    """Values that could break a line or colour a terminal are quoted."""
    record = logging.makeLogRecord({"msg": "request", "path": "/a\nb\x1b[31m", "status": 200, "name_": "", "x": "a b"})
    line = FieldFormatter().format(record)
    assert line.isprintable()
    assert line.endswith(r"request path='/a\nb\x1b[31m' status=200 name_='' x='a b'")
