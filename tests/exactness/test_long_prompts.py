"""Do prompts of more than two prefill blocks, which are at most 1,024 tokens each, keep the tokens of plain transformers?"""

from pathlib import Path

import pytest

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.passes import Applied
from ollm_service.core.plan import PassId
from tests.exactness.cells import Cell, Residency
from tests.exactness.collecting import collected
from tests.exactness.reference import plain_answer, some_text
from tests.exactness.shelf import Shelf
from tests.runner.commands import first_outcomes, results_of, run, work_row
from workers.runner.engine import Engine

NEW_TOKENS = 4
# The leading token makes the first two blocks full to the last token; the next two end within a third.
PROMPTS = tuple(some_text(length, seed=length) for length in (2047, 2100, 2500, 40))


RESIDENT, PAGED = KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED
LONG = [
    Cell(family="llama", kv=RESIDENT, residency=Residency.RESIDENT, batch=3),
    Cell(family="llama", extra=(PassId.MLP_CHUNKING,), kv=PAGED, residency=Residency.STREAMED, batch=8),
    Cell(family="gemma3-text", kv=PAGED, residency=Residency.PARTLY, batch=3),
    Cell(family="qwen3-next", kv=PAGED, residency=Residency.STREAMED, batch=8),
    Cell(family="gpt-oss", kv=RESIDENT, residency=Residency.STREAMED, batch=3),
    Cell(family="gpt2", kv=PAGED, residency=Residency.RESIDENT, batch=1),
]


@pytest.mark.parametrize("cell", collected(LONG, LONG[:3]))
def test_long_prompts_keep_the_tokens(engine: Engine, shelf: Shelf, tmp_path: Path, cell: Cell) -> None:
    """Beside a short row and beside each other they get the tokens that each gets alone."""
    model = shelf.model(cell.family)
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    messages = run(engine, shelf.command(model, cell, rows, tmp_path))
    found = {row: result.text for row, result in results_of(messages).items()}
    assert found == {index: plain_answer(model.folder, prompt, NEW_TOKENS).text for index, prompt in enumerate(PROMPTS)}
    outcomes = first_outcomes(messages)
    assert all(isinstance(outcomes[pass_id], Applied) for pass_id in cell.acting), outcomes
