"""Does a runner answer right after other plans? A model after another of its family, and a job after a first."""

from pathlib import Path

import pytest

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.wire import Loaded
from tests.exactness.cells import Cell, Residency, extras_of, kv_of
from tests.exactness.collecting import collected
from tests.exactness.families import FAMILIES
from tests.exactness.reference import plain_answer, some_text
from tests.exactness.shelf import HeldFolder, Shelf
from tests.runner.commands import only, results_of, run, work_row
from workers.runner.engine import Engine

NEW_TOKENS = 6
FIRST = tuple(some_text(length, seed=1000 + length) for length in (9, 140, 33, 70))
SECOND = tuple(some_text(length, seed=2000 + length) for length in (260, 12, 58))


def streamed(family: str) -> Cell:
    """All that can act at once: every layer from disk, pages, and the family's own passes."""
    return Cell(family=family, extra=extras_of(family)[-1], kv=kv_of(family)[-1], residency=Residency.STREAMED, batch=3)


def resident(family: str) -> Cell:
    """Nothing acts."""
    return Cell(family=family, kv=KVCacheStrategy.RESIDENT, residency=Residency.RESIDENT, batch=3)


@pytest.mark.parametrize("family", collected(FAMILIES))
def test_plans_follow_each_other_in_one_runner(shelf: Shelf, tmp_path: Path, family: str) -> None:
    """Two jobs on one model, one on another with the family's other weights, and one on the first again: each as if alone."""
    one, other = shelf.model(family), shelf.model(family, seed=1)
    engine = Engine()
    plans = [
        (one, streamed(family), FIRST, False),
        (one, streamed(family), SECOND, True),
        (other, streamed(family), FIRST, False),
        (other, resident(family), SECOND, False),
        (one, resident(family), FIRST, False),
        (one, resident(family), SECOND, True),
    ]
    for model, cell, prompts, is_warm in plans:
        rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(prompts)]
        messages = run(engine, shelf.command(model, cell, rows, tmp_path))
        assert [result.text for _, result in sorted(results_of(messages).items())] == plain(model, prompts)
        assert only(messages, Loaded).was_warm is is_warm
    assert plain(one, FIRST) != plain(other, FIRST)


def plain(model: HeldFolder, prompts: tuple[str, ...]) -> list[str]:
    """What plain transformers answers."""
    return [plain_answer(model.folder, prompt, NEW_TOKENS).text for prompt in prompts]
