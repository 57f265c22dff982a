"""Does any mixture of rows, beginnings, caches and layers from disk change a token? Random jobs beside plain transformers.

Float32 throughout. A seed makes a job: rows that are equal, begin as others end, are one character, or one of which crashed a
runner before, in whatever company and with whatever cache.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from tests.runner.commands import make_command, texts, work_row
from tests.runner.models import plain_greedy
from workers.runner.engine import Engine

LETTERS = "abcdefgh ijk"
answer_alone = cache(plain_greedy)


def some_rows(chance: random.Random) -> list[WorkRow]:
    """Up to nine rows, most of which begin like another; some prompts are the whole beginning of others, some are equal."""
    beginnings = ["".join(chance.choices(LETTERS, k=chance.choice((1, 16, 17, 40, 300)))) for _ in range(2)]
    endings = ("", "a", "abc" * 8, "".join(chance.choices("ab", k=chance.choice((3, 60)))))
    return [
        work_row(number, chance.choice(beginnings) + chance.choice(endings), max_new_tokens=chance.choice((1, 2, 6, 14)))
        for number in range(chance.randint(2, 9))
    ]


def some_command(chance: random.Random, model: Path, draft: Path, cache_dir: Path) -> Execute:
    """The rows in some company, with some cache, and the layers somewhere."""
    rows, disk_layers = some_rows(chance), chance.choice(((), (0,), (0, 1)))
    passes = (PassId.DISK_CACHE, PassId.CPU_OFFLOAD) if disk_layers else (PassId.DISK_CACHE,)
    command = make_command(
        model,
        rows,
        passes=passes,
        kv=chance.choice((KVCacheStrategy.RESIDENT, KVCacheStrategy.PAGED)),
        cache_dir=cache_dir,
        disk_layers=disk_layers,
        micro_batch=chance.choice((1, 2, 3, 8)),
    )
    suspects = frozenset(chance.sample(range(len(rows)), chance.randint(0, 1)))
    drafted = {"draft_dir": str(draft), "draft_digest": "a draft"} if chance.random() < 0.3 else {}
    return replace(command, suspects=suspects, **drafted)  # type: ignore[arg-type]  # strings for both


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next", "gpt-oss"])
@pytest.mark.parametrize("seed", range(5))
def test_any_job_is_answered_row_by_row_as_alone(
    engine: Engine, families: Callable[[str], Path], tmp_path: Path, family: str, seed: int
) -> None:
    """Every row has the tokens that plain transformers gives it alone."""
    chance = random.Random(f"{family} {seed}")
    command = some_command(chance, families(family), families("llama"), tmp_path)
    expected = {row.row: answer_alone(families(family), str(row.prompt), row.generation.max_new_tokens) for row in command.rows}
    assert texts(engine, command) == expected
