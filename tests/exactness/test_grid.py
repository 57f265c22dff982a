"""Do all families, passes, KV strategies, placements and batch sizes keep the tokens of plain transformers? See cells.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ollm_service.core.leasing import WorkRow
from ollm_service.core.passes import Applied, Failed
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Finished
from tests.exactness.cells import Cell, all_cells, covering_cells, kv_of
from tests.exactness.collecting import collected
from tests.exactness.families import FAMILIES, SHOWN
from tests.exactness.reference import Shown, plain_answer, some_text
from tests.exactness.shelf import HeldFolder, Shelf, by_hand, planned
from tests.runner.commands import chat_row, first_outcomes, of_kind, results_of, run, work_row
from tests.runner.media_answers import contents_of
from tests.runner.media_models import text_part
from workers.runner.engine import Engine

# In no order of length. Two fill more than two pages of the paged cache, one with its leading token exactly one page.
PROMPTS = tuple(some_text(length, seed=length) for length in (5, 300, 17, 127, 1, 42, 290, 64))
# Rows end at different times, so that they leave their batch one by one.
NEW_TOKENS = tuple(6 + index % 4 for index in range(len(PROMPTS)))
MOST_TOKENS = max(NEW_TOKENS)
# In standard deviations of the logits. Sums of float32 in another order were seen to move a logit by 0.00004 at the most.
LEAST_MARGIN = 1e-4


# Each image and sound stands in two rows, before different texts.
MESSAGES: Mapping[str, tuple[Shown, ...]] = {
    family: tuple(
        Shown([*content, text_part(some_text(length, seed=length))]) for length in (3, 150) for content in contents_of(family)
    )
    for family in SHOWN
}


def prompts_of(cell: Cell) -> Sequence[str | Shown]:
    """Text, or messages with images or sounds where the pass for them acts."""
    return MESSAGES[cell.family] if PassId.MULTIMODAL_SHELL in cell.extra else PROMPTS


def row_of(index: int, prompt: str | Shown) -> WorkRow:
    """The row that asks it."""
    if isinstance(prompt, Shown):
        return chat_row(index, prompt.content, max_new_tokens=NEW_TOKENS[index])
    return work_row(index, prompt, max_new_tokens=NEW_TOKENS[index])


def expected(model: HeldFolder, prompts: Sequence[str | Shown]) -> dict[int, str]:
    """The plain answer to each prompt, as long as its row may be."""
    answers = [plain_answer(model.folder, prompt, MOST_TOKENS).text for prompt in prompts]
    return {index: answer[: NEW_TOKENS[index]] for index, answer in enumerate(answers)}


@pytest.mark.parametrize("cell", collected(all_cells(), covering_cells()))
def test_the_tokens_are_those_of_plain_transformers(engine: Engine, shelf: Shelf, tmp_path: Path, cell: Cell) -> None:
    """Each row's tokens are those that its prompt gets alone, and every pass that the cell is about took effect."""
    model = shelf.model(cell.family)
    rows = [row_of(index, prompt) for index, prompt in enumerate(prompts_of(cell))]
    messages = run(engine, shelf.command(model, cell, rows, tmp_path))
    assert of_kind(messages, Finished), messages[-1]
    results = results_of(messages)
    assert {row: result.text for row, result in results.items()} == expected(model, prompts_of(cell))
    assert all(result.completion_tokens == NEW_TOKENS[row] for row, result in results.items())
    outcomes = first_outcomes(messages)
    assert set(cell.acting) <= {pass_id for pass_id, outcome in outcomes.items() if isinstance(outcome, Applied)}, outcomes
    assert not any(isinstance(outcome, Failed) for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("family", "most_kv"),
    [("llama", 2), ("gemma3-text", 2), ("gemma3", 2), ("voxtral", 2), ("qwen3-next", 2), ("qwen3-moe", 2), ("gpt-oss", 1)],
)
def test_native_families_run_as_the_planner_plans_them(shelf: Shelf, family: str, most_kv: int) -> None:
    """No plan of theirs is written by hand, but where the planner keeps GPT-OSS's cache out of files."""
    profile = shelf.model(family).profile
    cells = [cell for cell in all_cells() if cell.family == family and cell.kv in kv_of(family)[:most_kv]]
    assert not any(planned(profile, cell) == by_hand(profile, cell) for cell in cells)


@pytest.mark.parametrize("family", collected(FAMILIES, FAMILIES))
def test_the_questions_are_fair(shelf: Shelf, family: str) -> None:
    """No plain answer hangs on a logit so near the next that float32's rounding could turn it; and they differ."""
    folder = shelf.model(family).folder
    for prompts in (PROMPTS, *([MESSAGES[family]] if family in SHOWN else [])):
        answers = [plain_answer(folder, prompt, MOST_TOKENS) for prompt in prompts]
        assert min(answer.smallest_margin for answer in answers) >= LEAST_MARGIN
        assert all(len(answer.text) == MOST_TOKENS for answer in answers)
        assert len({answer.text for answer in answers}) > len(prompts) / 2
