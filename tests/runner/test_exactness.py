"""Do batches, padding and passes leave the greedy tokens of plain transformers as they are? Float32 throughout."""

import random
import string
from functools import cache
from pathlib import Path

import pytest

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Finished
from tests.runner.commands import first_outcomes, make_command, only, results_of, run, texts, work_row
from tests.runner.models import plain_greedy
from workers.runner.engine import Engine

NEW_TOKENS = 12
DISK, CHUNKS = PassId.DISK_CACHE, PassId.MLP_CHUNKING


def some_text(length: int, seed: int) -> str:
    """Text that no model has a habit about."""
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits + " ", k=length))


# Two are longer than two pages of the paged cache, one fills a page exactly with its leading special token.
PROMPTS = [some_text(length, seed=length) for length in (5, 300, 17, 127, 1, 42, 290, 64)]


@cache
def expected(folder: Path, index: int) -> str:
    """The plain answer to one prompt, computed once."""
    return plain_greedy(folder, PROMPTS[index], NEW_TOKENS)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_batches_keep_the_tokens(engine: Engine, model_dirs: dict[str, Path], family: str, micro_batch: int) -> None:
    """Micro-batches of 1, 3 and 8 left-padded rows get the tokens that each row gets alone from transformers."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    found = texts(engine, make_command(model_dirs[family], rows, micro_batch=micro_batch))
    assert found == {index: expected(model_dirs[family], index) for index in range(len(PROMPTS))}


@pytest.mark.parametrize(
    ("family", "passes"),
    [("llama", (DISK,)), ("llama", (CHUNKS,)), ("llama", (DISK, CHUNKS)), ("qwen2", (DISK, CHUNKS)), ("gpt2", (DISK,))],
)
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_passes_keep_the_tokens(
    engine: Engine, model_dirs: dict[str, Path], tmp_path: Path, family: str, passes: tuple[PassId, ...], micro_batch: int
) -> None:
    """With the cache in files and the MLP in chunks the tokens stay the same, and both passes show what they did."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    command = make_command(
        model_dirs[family],
        rows,
        passes=passes,
        micro_batch=micro_batch,
        kv=KVCacheStrategy.PAGED if DISK in passes else KVCacheStrategy.RESIDENT,
        chunk_rows=7,
        cache_dir=tmp_path,
    )
    messages = run(engine, command)
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: expected(model_dirs[family], index) for index in range(len(PROMPTS))}
    outcomes = first_outcomes(messages)
    assert list(outcomes) == list(passes)
    assert all(isinstance(outcome, Applied) for outcome in outcomes.values())


@pytest.mark.parametrize("kv", [KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED])
def test_rows_that_finish_early_leave_the_batch(engine: Engine, llama: Path, tmp_path: Path, kv: KVCacheStrategy) -> None:
    """Rows with different limits share a micro-batch; each gets the first tokens of its own plain answer."""
    limits = [1, 3, 12, 7, 2, 12, 5, 4]
    rows = [work_row(index, PROMPTS[index], max_new_tokens=limit) for index, limit in enumerate(limits)]
    found = texts(engine, make_command(llama, rows, passes=(DISK,), kv=kv, cache_dir=tmp_path))
    assert found == {index: expected(llama, index)[:limit] for index, limit in enumerate(limits)}


def test_generating_over_a_page_keeps_the_tokens(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """A tail that fills a page while generating goes to the file, and the tokens stay those of a resident cache."""
    rows = [work_row(0, "abc", max_new_tokens=300), work_row(1, PROMPTS[2], max_new_tokens=280)]
    resident = texts(engine, make_command(llama, rows))
    messages = run(engine, make_command(llama, rows, passes=(DISK,), kv=KVCacheStrategy.PAGED, cache_dir=tmp_path))
    assert {row: result.text for row, result in results_of(messages).items()} == resident
    # Two rows in two layers, each with its prompt's page and two full pages of generated tokens.
    assert only(messages, Finished).measured["kv_pages_written"] == 2 * 2 * 3
