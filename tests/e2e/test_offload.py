"""Does a model that does not fit the memory it may have answer right through the whole service, and is it said how?"""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.deepen_demo_model import deepen
from scripts.demo_offload import most_memory
from tests.e2e.fleet import DEMO_MODELS, REPOSITORY, Fleet, counts, one_real_worker
from tests.e2e.scripted_jobs import answers
from tests.runner.models import plain_greedy, save_model
from tests.waiting import wait_for
from workers.runner.weights.export import export_model

MODEL, EXPERTS, DRAFT = "sum-deep", "gpt-oss-deep", "sum-chat"
PROMPTS = ["one two", "a somewhat longer prompt, so that rows are padded", "3"]
LIMIT_GB = 0.55  # 12 layers of 12 MiB do not fit beside what a runner takes
QUESTIONS: list[dict[str, Any]] = [
    json.loads(line) for line in (REPOSITORY / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:24]
]
RIGHT: dict[str, str] = json.loads((REPOSITORY / "demo" / "heldout_answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A worker with a real runner that may take less memory than the model has."""
    directory = tmp_path_factory.mktemp("small")
    deepen(directory / "models" / MODEL, width=8192)
    shutil.copytree(DEMO_MODELS / DRAFT, directory / "models" / DRAFT)
    wide = save_model(
        directory / "models" / EXPERTS,
        "gpt-oss",
        hidden_size=512,
        intermediate_size=512,
        num_local_experts=16,
        num_hidden_layers=6,
        initializer_range=0.05,
    )
    export_model(wide)
    with one_real_worker(directory, directory / "models", OLLM_MEMORY_LIMIT_GB=str(LIMIT_GB)) as fleet:
        yield fleet


def test_layers_that_do_not_fit_come_from_disk(small_machine: Fleet) -> None:
    """The right answers, placed with some layers on disk; the pass shows what was read, and memory stays within the limit."""
    job = small_machine.calls.submit(MODEL, QUESTIONS, generation={"max_new_tokens": 8})
    ended = small_machine.calls.wait_final(job["id"], timeout=120)
    assert counts(ended) == (len(QUESTIONS), 0, 0), ended
    found = answers(small_machine.calls.results(job["id"]))
    right = sum((text or "").strip() == RIGHT[name] for name, text in found.items())
    assert right >= 0.95 * len(QUESTIONS)
    plan = ended["plans"][0]
    assert plan["runtime_plan"]["specialization_state"] == "applied", plan["runtime_plan"]["fallback_reason"]
    assert "from disk; brought" in plan["runtime_plan"]["details"]["pass_cpu_offload"]
    attempt = small_machine.calls.get(f"/v1/plans/{plan['id']}").json()["attempts"][-1]
    placement, measured = attempt["placement"], attempt["measured"]
    assert placement["tier"] == "layers streamed from disk"
    assert placement["layers_on_device"] + placement["layers_on_disk"] == 12
    assert placement["layers_on_disk"] > 0
    assert {tier["tier"]: tier["short_of"] for tier in placement["refused"]} == {
        "KV cache in files": "memory",
        "all on device": "memory",
    }
    assert most_memory(measured) < LIMIT_GB * 1024**3


def test_experts_that_do_not_fit_come_from_an_export_when_they_are_hit(small_machine: Fleet) -> None:
    """300 MiB of experts in an export: the tokens of transformers, and each pass shows the bytes that it was about."""
    rows = [{"custom_id": str(index), "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    job = small_machine.calls.submit(EXPERTS, rows, generation={"max_new_tokens": 8})
    ended = small_machine.calls.wait_final(job["id"], timeout=120)
    assert counts(ended) == (len(PROMPTS), 0, 0), ended
    found = answers(small_machine.calls.results(job["id"]))
    model = small_machine.directory / "models" / EXPERTS
    assert found == {str(index): plain_greedy(model, prompt, 8) for index, prompt in enumerate(PROMPTS)}
    plan = ended["plans"][0]
    details = plan["runtime_plan"]["details"]
    assert plan["runtime_plan"]["specialization_state"] == "applied", plan["runtime_plan"]["fallback_reason"]
    assert "from disk; brought" in details["pass_cpu_offload"]
    assert "experts hit; " in details["pass_moe_routing"]
    assert "bytes read from gds_export" in details["pass_gds_export_weights"]
    assert "calls in place of transformers' attention" in details["pass_attention_replacement"]
    measured = small_machine.calls.get(f"/v1/plans/{plan['id']}").json()["attempts"][-1]["measured"]
    assert measured["expert_bytes_read"] <= 1.1 * measured["expert_bytes_routed_ideal"] < measured["expert_bytes_all"]
    assert most_memory(measured) < LIMIT_GB * 1024**3


def test_a_draft_model_guesses_for_one_that_streams(small_machine: Fleet) -> None:
    """The model before it was deepened reads the same tokens: right answers in fewer passes, with the feed-forward part in
    chunks.
    """
    runtime = {"draft_model": DRAFT, "dense_projection_chunk_rows": 7}
    job = small_machine.calls.submit(MODEL, QUESTIONS[:8], generation={"max_new_tokens": 8}, runtime=runtime)
    ended = small_machine.calls.wait_final(job["id"], timeout=120)
    assert counts(ended) == (8, 0, 0), ended
    found = answers(small_machine.calls.results(job["id"]))
    assert sum((text or "").strip() == RIGHT[name] for name, text in found.items()) >= 7
    details = ended["plans"][0]["runtime_plan"]["details"]
    assert " chunks of at most 7 rows" in details["pass_mlp_chunking"]
    measured = small_machine.calls.get(f"/v1/plans/{ended['plans'][0]['id']}").json()["attempts"][-1]["measured"]
    assert measured["tried_tokens"] > 0


def test_a_draft_model_that_nobody_has_waits_with_that_reason(small_machine: Fleet) -> None:
    """The plan is not run without it; its history says what is missing."""
    job = small_machine.calls.submit(MODEL, QUESTIONS[:1], runtime={"draft_model": "nowhere"})
    plan_id = job["plans"][0]["id"]

    def reasons() -> list[str]:
        return [str(event["reason"]) for event in small_machine.calls.plan(plan_id)["events"]]

    lacking = "the draft model nowhere is not in this worker's models folder"
    wait_for(lambda: any(lacking in reason for reason in reasons()), timeout=30, what="the reason")
    small_machine.calls.cancel(job["id"])
