"""Can any JSON or name at all make the API fail instead of refusing? Bodies of every shape, on both databases."""

import json
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ollm_service.api.app import create_app
from ollm_service.store.schema import upgrade
from tests.coordinator.services import open_service
from tests.store.samples import new_worker

# Every code point, NUL and halves of surrogate pairs included: JSON can carry them all.
TEXTS = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ["\0", "\ud800", "tiny", "a/b", "hf:a/b@c", "path:../x", "'", "%s"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": VALUES}) | VALUES, max_size=2)
ROWS = st.fixed_dictionaries(
    {}, optional={"custom_id": VALUES, "prompt": TEXTS | VALUES, "messages": MESSAGES, "generation": VALUES, "n": VALUES}
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("tiny") | TEXTS, "rows": st.lists(ROWS | VALUES, min_size=1, max_size=4)},
    optional={
        "runtime": st.dictionaries(st.sampled_from(["device", "backend", "kv_cache_window_tokens"]) | TEXTS, VALUES, max_size=2),
        "generation": st.dictionaries(st.sampled_from(["stop", "seed", "temperature"]) | TEXTS, VALUES, max_size=2),
        "priority": st.integers(),
        "where": TEXTS | st.sampled_from(['zone == "\0"', "a == 1"]),
        "deadline_seconds": st.floats(allow_nan=False, allow_infinity=False),
        "idempotency_key": TEXTS,
        "extra": VALUES,
    },
)


def test_every_body_is_accepted_or_refused(database_url: str, tmp_path: Path) -> None:
    """Whatever is sent, the answer is a job or an error of the caller's, and an accepted job can be read back."""
    upgrade(database_url)
    service = open_service(database_url, tmp_path)
    new_worker(service.store)
    http = TestClient(create_app(service), base_url="http://127.0.0.1")

    @example(body={"model": "tiny", "rows": [{"\ud800": None}]}, path="/v1/plans/preview")
    @given(body=BODIES | VALUES, path=st.sampled_from(["/v1/jobs", "/v1/plans/preview"]))
    def hold(body: Any, path: str) -> None:
        answered = http.post(path, content=json.dumps(body))
        assert answered.status_code in (200, 201, 400, 404, 409, 413, 422), answered.text
        told = answered.json()
        if answered.status_code == 201:
            assert http.get(f"/v1/jobs/{told['id']}").json()["row_count"] == told["row_count"]
            lines = http.get(f"/v1/jobs/{told['id']}/results").text.splitlines()
            assert len([json.loads(line) for line in lines]) == told["counts"]["failed"]
        elif answered.status_code >= 400:
            assert set(told["error"]) == {"message", "type", "param", "code", "remedy"}

    hold()
    for name in ("%00", "%ed%a0%80", "%ff", "a" * 3000, "..%2f..", "'%20or%201=1", "%F0%9F%98%80"):
        for asked in (f"/v1/jobs/{name}", f"/v1/jobs/{name}/results", f"/v1/plans/{name}", f"/v1/downloads/{name}"):
            assert http.get(asked).json()["error"]["code"] == "not_found", asked
        model = http.get(f"/v1/models/{name}")
        assert (model.status_code, model.json()["error"]["code"]) in ((404, "model_not_found"), (400, "invalid_model_reference"))
        assert http.post(f"/v1/workers/{name}/drain").json()["error"]["code"] == "not_found"
        assert http.get(f"/v1/jobs?after={name}").json()["error"]["code"] == "not_found"
    service.close()
