"""Does every KV strategy that a user may ask for answer right through the whole service, and show what it did?"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.fleet import DEMO_MODELS, REPOSITORY, Fleet, counts, one_real_worker
from tests.e2e.scripted_jobs import MODEL, answers

QUESTIONS: list[dict[str, Any]] = [
    json.loads(line) for line in (REPOSITORY / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:40]
]
RIGHT: dict[str, str] = json.loads((REPOSITORY / "demo" / "heldout_answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker with a real runner."""
    directory = tmp_path_factory.mktemp("strategies")
    with one_real_worker(directory, DEMO_MODELS) as fleet:
        yield fleet


@pytest.mark.parametrize(
    ("runtime", "shown"),
    [
        ({"kv_cache_strategy": "paged"}, " pages)"),
        ({"kv_cache_strategy": "quantized-cold-tier"}, "of int8, for "),
        ({"kv_cache_strategy": "sliding-window-ring-buffer"}, "the newest 256 tokens kept, 0 evicted"),
        ({"kv_cache_window_tokens": 200}, "the newest 200 tokens kept, 0 evicted"),
    ],
    ids=["paged", "quantized-cold-tier", "ring", "window"],
)
def test_a_strategy_that_was_asked_for_answers_right(service: Fleet, runtime: dict[str, Any], shown: str) -> None:
    """At least 95 of 100 questions, and the evidence says what became of keys and values."""
    job = service.calls.submit(MODEL, QUESTIONS, generation={"max_new_tokens": 8}, runtime=runtime)
    ended = service.calls.wait_final(job["id"], timeout=60)
    assert counts(ended) == (len(QUESTIONS), 0, 0), ended
    found = answers(service.calls.results(job["id"]))
    assert sum((text or "").strip() == RIGHT[name] for name, text in found.items()) >= 0.95 * len(QUESTIONS)
    plan = ended["plans"][0]["runtime_plan"]
    assert plan["specialization_state"] == "applied", plan["fallback_reason"]
    assert shown in plan["details"]["pass_disk_cache"]


def test_a_window_that_is_too_short_says_what_it_evicted(service: Fleet) -> None:
    """Whoever asks for a few tokens gets other answers, and the attempt counts what was let go."""
    runtime = {"kv_cache_window_tokens": 4}
    job = service.calls.submit(MODEL, QUESTIONS[:8], generation={"max_new_tokens": 8}, runtime=runtime)
    ended = service.calls.wait_final(job["id"], timeout=60)
    assert counts(ended) == (8, 0, 0), ended
    attempt = service.calls.get(f"/v1/plans/{ended['plans'][0]['id']}").json()["attempts"][-1]
    assert attempt["measured"]["kv_tokens_evicted"] > 0
