"""Does the demo model add, and does it add the same in any company?"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import GenerationConfig, KVCacheStrategy
from ollm_service.core.plan import PassId
from tests.runner.commands import answers, make_command
from tests.runner.models import DEMO_MODEL, HELDOUT, HELDOUT_ANSWERS
from workers.runner.engine import Engine


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """The held-out questions."""
    return [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]


def heldout_rows(questions: list[dict[str, Any]]) -> list[WorkRow]:
    """Every question as a row."""
    return [
        WorkRow(
            row=index,
            custom_id=question["custom_id"],
            prompt=question.get("prompt"),
            messages=tuple(question["messages"]) if "messages" in question else None,
            generation=GenerationConfig(max_new_tokens=8),
        )
        for index, question in enumerate(questions)
    ]


def test_heldout_sums_are_right(engine: Engine, questions: list[dict[str, Any]]) -> None:
    """At least 95 % of 200 questions that were never trained on are answered right, and end by themselves."""
    found = answers(engine, make_command(DEMO_MODEL, heldout_rows(questions), micro_batch=64))
    right_answers = json.loads(HELDOUT_ANSWERS.read_text(encoding="utf-8"))
    right = sum(found[index].text == right_answers[question["custom_id"]] for index, question in enumerate(questions))
    assert len(questions) == 200
    assert right >= 190
    assert {result.finish_reason for result in found.values()} == {"stop"}


def test_company_changes_no_answer(engine: Engine, questions: list[dict[str, Any]], tmp_path: Path) -> None:
    """Alone, in a left-padded batch, with the cache in files and with the MLP in chunks: the same tokens for every row."""
    rows = heldout_rows(questions)[:64]
    alone = answers(engine, make_command(DEMO_MODEL, rows, micro_batch=1))
    together = answers(engine, make_command(DEMO_MODEL, rows, micro_batch=64))
    specialized = make_command(
        DEMO_MODEL,
        rows,
        passes=(PassId.DISK_CACHE, PassId.MLP_CHUNKING),
        micro_batch=64,
        kv=KVCacheStrategy.PAGED,
        chunk_rows=50,
        cache_dir=tmp_path,
    )
    assert alone == together == answers(engine, specialized)


def test_the_model_is_small_and_whole() -> None:
    """Float32 weights of at most 4 MB, with tokenizer, chat template and generation defaults beside them."""
    weights = DEMO_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with safe_open(weights, framework="pt") as tensors:
        assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {"torch.float32"}  # noqa: SIM118 - not a dict
    names = {path.name for path in DEMO_MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
