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


def cell(family: str, exact_pass: PassId | None, kv: KVCacheStrategy, residency: Residency, batch: int) -> Cell:
    """A cell that the grid has, too."""
    return Cell(family=family, exact_pass=exact_pass, kv=kv, residency=residency, batch=batch)


RESIDENT, PAGED = KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED
LONG = [
    cell("llama", None, RESIDENT, Residency.RESIDENT, 3),
    cell("llama", PassId.MLP_CHUNKING, PAGED, Residency.STREAMED, 8),
    cell("gemma3-text", None, PAGED, Residency.PARTLY, 3),
    cell("qwen3-next", None, PAGED, Residency.STREAMED, 8),
    cell("gpt-oss", None, RESIDENT, Residency.STREAMED, 3),
    cell("gpt2", None, PAGED, Residency.RESIDENT, 1),
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
