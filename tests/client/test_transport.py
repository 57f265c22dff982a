"""What does the client make of broken connections, outages and answers that are not ours?"""

import json
import shutil
from pathlib import Path

import pytest

from ollm_service.client import Client, Result
from ollm_service.client.errors import error_from
from ollm_service.coordinator.service import Service
from ollm_service.core.errors import (
    BodyTooLarge,
    DatabaseUnavailable,
    InvalidOption,
    OllmError,
    RequestError,
    ServiceError,
)
from ollm_service.core.leasing import RowResult
from tests.client.live import CuttingProxy, LiveService, ScriptedServer
from tests.coordinator.services import answer, claim_one, open_service
from tests.store.samples import REPORT

ROWS = 200
OUTAGE = json.dumps({"error": {"message": "away", "code": "database_unavailable", "param": None, "remedy": "wait"}}).encode()
BUG = json.dumps({"error": {"message": "a bug", "code": "internal_error", "param": None, "remedy": None}}).encode()


def test_results_survive_every_cut_without_loss_or_doubling(live: LiveService, service: Service, worker_id: str) -> None:
    """However often the connection breaks, in the middle of a line too, every row arrives exactly once and in order."""
    with Client(live.url) as client:
        job_id = client.submit("tiny", [f"row {number}" for number in range(ROWS)]).id
    answer(service, claim_one(service, worker_id))
    with CuttingProxy(live.port, cut=[9_000, 0, 700, 701, 5_000, 10_000, 333]) as proxy, Client(proxy.url) as client:
        received = list(client.job(job_id).results())
        assert proxy.connections > 5
    assert [result.row for result in received] == list(range(ROWS))
    assert [result.cursor for result in received] == list(range(1, ROWS + 1))


@pytest.mark.parametrize("after", [0, 1, 40, 400])
def test_a_submission_whose_answer_was_lost_is_not_stored_twice(live: LiveService, worker_id: str, after: int) -> None:
    """The job is submitted again with the same key, and there is one job."""
    with CuttingProxy(live.port, cut=[after]) as proxy, Client(proxy.url) as client:
        job = client.submit("tiny", ["a"])
        assert proxy.connections == 2
        assert [found.id for found in client.jobs()] == [job.id]


def test_an_outage_is_waited_out_and_the_same_body_is_sent_again() -> None:
    """503 is not the end of a request: it is repeated, byte for byte, until it is answered."""
    with ScriptedServer((503, OUTAGE), (503, OUTAGE), (200, b'{"workers": 3}')) as server, Client(server.url) as client:
        assert client.drain("attic") == {"workers": 3}
        assert len(set(server.requests)) == 1
        assert len(server.requests) == 3


def test_an_internal_error_is_told_within_seconds() -> None:
    """A bug in the service comes again: the client does not insist for long."""
    with ScriptedServer((500, BUG)) as server, Client(server.url) as client:
        with pytest.raises(OllmError, match="a bug") as raised:
            client.workers()
        assert raised.value.code == "internal_error"
        assert 1 < len(server.requests) < 12


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (302, b""), (404, b"nothing here"), (502, b"<html>bad gateway</html>"), (418, b'["x"]')],
)
def test_what_is_not_our_service_is_told_as_such(status: int, body: bytes) -> None:
    """Another server at the address gives an error in words, never a traceback of ours."""
    with ScriptedServer((status, body)) as server, Client(server.url) as client, pytest.raises(OllmError) as raised:
        client.workers()
    assert raised.value.status == (status if status >= 400 else 500)


def test_lines_end_at_line_feeds_only() -> None:
    """Unicode's other line separators inside a text do not break a result in two."""
    text = "a\u2028b\u2029c\x85d\x0be"
    line = {"row": 0, "custom_id": "x", "text": text, "usage": {}, "error": None, "plan_id": "p", "attempt": 1, "cursor": 1}
    job = {"id": "job_1", "state": "succeeded", "row_count": 1, "plans_total": 0}
    counts = {"counts": {"succeeded": 1, "failed": 0, "pending": 0}}
    results = json.dumps(line, ensure_ascii=False).encode() + b"\n"
    with (
        ScriptedServer((200, json.dumps(job | counts).encode()), (200, results), (200, b"")) as server,
        Client(server.url) as client,
    ):
        assert [result.text for result in client.job("job_1").results()] == [text]


def test_half_a_surrogate_pair_travels_to_the_judge(live: LiveService, worker_id: str) -> None:
    """What JSON can carry is sent, and the service refuses that row by itself."""
    with Client(live.url) as client:
        job = client.submit("tiny", ["\ud800", "fine"])
    assert (job.counts.failed, job.counts.pending) == (1, 1)


@pytest.mark.parametrize("row", [{"prompt": float("nan")}, {"prompt": object()}, {"prompt": {1, 2}}])
def test_what_is_no_json_is_refused_before_it_is_sent(live: LiveService, row: dict[str, object]) -> None:
    """A row that cannot be written as JSON raises RequestError."""
    with Client(live.url) as client, pytest.raises(RequestError, match="JSON"):
        client.submit("tiny", [row])


def test_an_envelope_becomes_the_exception_that_it_came_from() -> None:
    """Known codes become their classes; unknown ones tell by their status whose fault it is, and keep their code."""
    envelope = {"message": "device: no. Allowed: cpu.", "code": "invalid_option", "param": "device", "remedy": "Allowed: cpu."}
    option = error_from(400, {"error": envelope})
    assert isinstance(option, InvalidOption)
    assert (str(option), option.message, option.param, option.remedy) == (
        envelope["message"],
        envelope["message"],
        "device",
        "Allowed: cpu.",
    )
    assert isinstance(error_from(503, json.loads(OUTAGE)), DatabaseUnavailable)
    assert isinstance(error_from(413, {"error": {"code": "body_too_large", "message": "x"}}), BodyTooLarge)
    unknown = error_from(429, {"error": {"code": "too_many", "message": "slow down"}})
    assert type(unknown) is RequestError
    assert (unknown.code, unknown.status) == ("too_many", 429)
    assert type(error_from(504, None)) is ServiceError


def test_the_last_result_seen_is_where_a_stream_goes_on(live: LiveService, service: Service, worker_id: str) -> None:
    """A result that is recorded while a connection is down is delivered by the next one."""
    with CuttingProxy(live.port, cut=[]) as proxy, Client(proxy.url) as client:
        job = client.submit("tiny", ["a", "b"])
        work = claim_one(service, worker_id)
        service.store.leases.record(work.lease_id, [RowResult(row=0, text="A", finish_reason="stop")], REPORT)
        stream = job.results()
        first: Result = next(stream)
        service.store.leases.record(work.lease_id, [RowResult(row=1, text="B", finish_reason="stop")], None)
        assert [first.text, *(result.text for result in stream)] == ["A", "B"]


@pytest.mark.parametrize("length", [5_000, 50_000_000])
def test_a_body_that_is_too_large_is_told_as_such(migrated_file: Path, tmp_path: Path, length: int) -> None:
    """The refusal is read, whether the server listened to the end or hung up in the middle of a long body."""
    shutil.copy(migrated_file, tmp_path / "small.db")
    service = open_service(f"sqlite:///{tmp_path}/small.db", tmp_path, max_body_bytes=4096)
    with LiveService(service) as live, Client(live.url) as client, pytest.raises(BodyTooLarge):
        client.submit("tiny", ["x" * length])
    service.close()
