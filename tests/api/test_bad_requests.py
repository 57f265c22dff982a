"""What does a caller see who sends something wrong? The envelope, the field, a remedy; and nothing is stored."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

ROWS = [{"prompt": "a"}]


def body_with(**changes: Any) -> bytes:
    """A submission with these changes; None takes a field away."""
    body = {"model": "tiny", "rows": ROWS} | changes
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_request", None),
        (b"{", 400, "invalid_request", None),
        (b"[1]", 400, "invalid_request", None),
        (b'"text"', 400, "invalid_request", None),
        (b"\xff\xfe\x00", 400, "invalid_request", None),
        (b'{"model": NaN}', 400, "invalid_request", None),
        (b"[" * 3000, 400, "invalid_request", None),
        (body_with(model=None), 400, "invalid_request", "model"),
        (body_with(rows=None), 400, "invalid_request", "rows"),
        (body_with(model=7), 400, "invalid_request", "model"),
        (body_with(rows={"prompt": "a"}), 400, "invalid_request", "rows"),
        (body_with(colour="red"), 400, "invalid_request", "colour"),
        (body_with(priority="high"), 400, "invalid_request", "priority"),
        (body_with(priority=10**6), 400, "invalid_request", "priority"),
        (body_with(deadline_seconds=0), 400, "invalid_request", "deadline_seconds"),
        (body_with(deadline_seconds=1e300), 400, "invalid_request", "deadline_seconds"),
        (body_with(idempotency_key=""), 400, "invalid_request", "idempotency_key"),
        (body_with(idempotency_key="\ud800"), 400, "invalid_request", None),
        (body_with(runtime=[1]), 400, "invalid_request", "runtime"),
        (body_with(runtime={"backend": "vllm"}), 400, "invalid_option", "backend"),
        (body_with(runtime={"device": "tpu"}), 400, "invalid_option", "device"),
        (body_with(generation={"temperature": "hot"}), 400, "invalid_option", "temperature"),
        (body_with(generation={"n": 2}), 400, "invalid_option", "generation.n"),
        (body_with(where="zone = 1"), 400, "invalid_expression", "where"),
        (body_with(rows=[]), 400, "invalid_job", "rows"),
        (body_with(model="../../etc"), 400, "invalid_model_reference", "model"),
        (body_with(model="a/b/c"), 400, "invalid_model_reference", "model"),
        (body_with(model="\x1b[31mred"), 400, "invalid_model_reference", "model"),
        (body_with(model="unheard-of"), 404, "model_not_found", "model"),
        (body_with(runtime={"offload_gpu_layers": 3}), 422, "plan_not_executable", "model"),
        (body_with(rows=[{"prompt": "x" * 5000}]), 413, "body_too_large", None),
    ],
)
def test_a_wrong_submission_is_refused_in_the_envelope(
    http: TestClient, worker_id: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    """Message, type, param, code and remedy; no job is stored and nothing of the body's inside is lost in a 500."""
    refused = http.post("/v1/jobs", content=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code", "remedy"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert refused.headers["x-request-id"]
    assert http.get("/v1/jobs").json()["data"] == []


def test_an_option_error_names_the_allowed_values(http: TestClient, worker_id: str) -> None:
    """The remedy of a wrong option lists what it may be."""
    error = http.post("/v1/jobs", content=body_with(runtime={"kv_cache_strategy": "huge"})).json()["error"]
    assert "paged" in error["remedy"]
    unknown = http.post("/v1/jobs", content=body_with(colour="red")).json()["error"]
    assert "idempotency_key" in unknown["remedy"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(http: TestClient, worker_id: str) -> None:
    """A body in chunks is refused while it is read, not after."""
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 100_000:
            sent += 1000
            yield b"x" * 1000

    refused = http.post("/v1/jobs", content=endless())
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_null_fields_are_as_good_as_none(http: TestClient, worker_id: str) -> None:
    """A client that sends null for what it leaves open gets the defaults."""
    fields = dict.fromkeys(("runtime", "generation", "where", "deadline_seconds", "idempotency_key"))
    accepted = http.post("/v1/jobs", json={"model": "tiny", "rows": ROWS, **fields})
    assert accepted.status_code == 201


def test_unknown_paths_and_methods_have_the_envelope_too(http: TestClient) -> None:
    """404 and 405 of the framework look like ours."""
    assert http.get("/v2/jobs").json()["error"]["code"] == "not_found"
    refused = http.put("/v1/jobs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_request_keeps_the_id_that_it_came_with(http: TestClient) -> None:
    """A well-formed x-request-id is echoed, anything else is replaced."""
    assert http.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/healthz", headers={"x-request-id": "a b<"}).headers["x-request-id"].startswith("req_")
