"""Do results stream while the job runs, from any cursor, without holding anything while they wait?"""

import asyncio
import json
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from ollm_service.api import results as streaming
from ollm_service.api.results import result_line, stream_results
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import submit
from ollm_service.core.leasing import RowResult
from ollm_service.store.views import ResultView
from tests.coordinator.services import answer, claim_one, submission


def lines_of(text: str) -> list[dict[str, Any]]:
    """The objects of an NDJSON text."""
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_has_the_pinned_fields(http: TestClient, service: Service, worker_id: str) -> None:
    """A success has text and usage, a failure its error; wrong rows are there from the start."""
    job_id = submit(service, submission([{"prompt": "a", "custom_id": "x"}, 7])).job.job_id
    early = http.get(f"/v1/jobs/{job_id}/results")
    assert (early.headers["content-type"], early.headers["x-job-state"]) == ("application/x-ndjson", "queued")
    assert [line["custom_id"] for line in lines_of(early.text)] == ["row-1"]
    assignment = claim_one(service, worker_id)
    answer(service, assignment)
    late = http.get(f"/v1/jobs/{job_id}/results")
    assert late.headers["x-job-state"] == "succeeded"
    wrong, right = lines_of(late.text)
    assert right == {
        "row": 0,
        "custom_id": "x",
        "text": "said a",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "error": None,
        "plan_id": assignment.plan_id,
        "attempt": 1,
        "cursor": 2,
    }
    assert (wrong["error"]["code"], wrong["text"], wrong["cursor"]) == ("invalid_row", None, 1)


def test_a_reader_goes_on_from_its_cursor(http: TestClient, service: Service, worker_id: str) -> None:
    """`cursor` and `limit` cut the same sequence anywhere, also across the pages in which it is read."""
    count = 2 * streaming.ROWS_PER_PAGE + 3
    job_id = submit(service, submission([{"prompt": str(number)} for number in range(count)])).job.job_id
    for _ in range(-(-count // 256)):
        answer(service, claim_one(service, worker_id))
    everything = lines_of(http.get(f"/v1/jobs/{job_id}/results").text)
    assert [line["cursor"] for line in everything] == list(range(1, count + 1))
    for cursor, limit in [
        (0, 1),
        (5, 7),
        (0, streaming.ROWS_PER_PAGE),
        (3, streaming.ROWS_PER_PAGE + 4),
        (count - 1, 9),
        (count, 9),
    ]:
        part = lines_of(http.get(f"/v1/jobs/{job_id}/results", params={"cursor": cursor, "limit": limit}).text)
        assert part == everything[cursor : cursor + limit]


def test_a_long_poll_returns_with_the_first_row(http: TestClient, service: Service, worker_id: str) -> None:
    """A reader that has everything waits, and gets the next rows as soon as they are recorded."""
    job_id = submit(service, submission()).job.job_id
    assignment = claim_one(service, worker_id)
    got: list[str] = []
    reader = threading.Thread(
        target=lambda: got.append(http.get(f"/v1/jobs/{job_id}/results", params={"wait_seconds": 60}).text), daemon=True
    )
    reader.start()
    service.store.leases.record(assignment.lease_id, [RowResult(row=1, text="2", finish_reason="stop")])
    reader.join(timeout=20)
    assert [line["row"] for line in lines_of(got[0])] == [1]


def test_a_long_poll_ends_with_its_time_the_job_or_the_process(http: TestClient, service: Service, worker_id: str) -> None:
    """None of the three leaves a reader waiting for rows that cannot come."""
    job_id = submit(service, submission()).job.job_id
    assert http.get(f"/v1/jobs/{job_id}/results", params={"wait_seconds": 0.05}).text == ""
    answer(service, claim_one(service, worker_id))
    assert http.get(f"/v1/jobs/{job_id}/results", params={"wait_seconds": 60, "cursor": 2}).text == ""
    other = submit(service, submission()).job.job_id
    service.stopping.set()
    assert http.get(f"/v1/jobs/{other}/results", params={"wait_seconds": 60}).text == ""


def test_waiting_readers_hold_neither_threads_nor_connections(service: Service, worker_id: str) -> None:
    """A hundred long polls wait at once, more than there are worker threads or pooled connections, and all are served."""
    job_id = submit(service, submission()).job.job_id
    assignment = claim_one(service, worker_id)

    async def read() -> bytes:
        response = await asyncio.to_thread(stream_results, service, job_id, DEFAULT_TENANT, cursor=0, limit=None, wait_seconds=60)
        parts = [part async for part in response.body_iterator]  # type: ignore[attr-defined]  # it is a StreamingResponse
        return b"".join(parts)

    async def read_all() -> list[bytes]:
        readers = [asyncio.ensure_future(read()) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.to_thread(answer, service, assignment)
        return await asyncio.wait_for(asyncio.gather(*readers), timeout=60)

    assert all(len(lines_of(text.decode())) == 2 for text in asyncio.run(read_all()))


def test_a_line_is_ascii_and_one_line() -> None:
    """Text with line separators of every kind stays on its line for every reader."""
    text = "a\nb\u2028c\u0085d\U0001f600"
    line = result_line(
        ResultView(
            row=0,
            custom_id="x\u2029",
            text=text,
            finish_reason="stop",
            prompt_tokens=1,
            completion_tokens=1,
            error=None,
            plan_id="plan_1",
            attempt=1,
            cursor=1,
        )
    )
    assert line.isascii()
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line)["text"] == text


def test_nothing_comes_after_a_cursor_of_any_size(http: TestClient, service: Service, worker_id: str) -> None:
    """Also after one that no database could store."""
    job_id = submit(service, submission([7])).job.job_id
    answer = http.get(f"/v1/jobs/{job_id}/results", params={"cursor": 10**30})
    assert (answer.status_code, answer.text) == (200, "")


@pytest.mark.parametrize("params", [{"cursor": -1}, {"cursor": "x"}, {"limit": 0}, {"wait_seconds": 1000}])
def test_a_wrong_query_is_a_400_that_names_the_parameter(http: TestClient, params: dict[str, Any]) -> None:
    """Also for numbers out of their range."""
    refused = http.get("/v1/jobs/job_x/results", params=params)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(params)))
