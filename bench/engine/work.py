"""Which rows do the comparisons run, and what is the least that they can cost? Lengths come from seeds that are fixed here."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.engine.copying import copying_row
from bench.texts import words

JOB_ROWS, JOB_BEGINNING = 192, 256
PROMPT_MEDIAN, ANSWER_MEDIAN, SIGMA = 32, 12, 0.8
AT_A_TIME = 32
PREFIX_ROWS, PREFIX_SHARED, PREFIX_OWN = 16, 896, 64
LONG_PROMPT = 32_768
EXPERT_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt, the most tokens of its answer, and the answer where it is known."""

    prompt: str
    answer_tokens: int
    expected: str | None = None


def work(name: str, *, is_quick: bool = False) -> tuple[Row, ...]:
    """The rows of that name; `is_quick`: far fewer or shorter ones, to see that all runs. Raises KeyError for another name."""
    return WORK[name](is_quick)


def equal_rows(rows: int, prompt_tokens: int, answer_tokens: int) -> tuple[Row, ...]:
    """Rows of one length that have nothing in common."""
    return tuple(Row(prompt=words(prompt_tokens, seed), answer_tokens=answer_tokens) for seed in range(rows))


def log_normal(count: int, *, median: float, sigma: float, seed: int) -> list[int]:
    """So many numbers of at least 1, whose logarithms are normal around that of the median."""
    chance = random.Random(seed)
    return [max(1, round(chance.lognormvariate(math.log(median), sigma))) for _ in range(count)]


def job(is_quick: bool) -> tuple[Row, ...]:
    """A whole job as users have them: one beginning for all rows, own parts and answers of very different lengths."""
    beginning = words(JOB_BEGINNING, seed=1_000_000)
    own = log_normal(JOB_ROWS, median=PROMPT_MEDIAN, sigma=SIGMA, seed=1)
    answers = log_normal(JOB_ROWS, median=ANSWER_MEDIAN, sigma=SIGMA, seed=2)
    rows = tuple(
        Row(prompt=f"{beginning} {words(prompt, seed)}", answer_tokens=answer)
        for seed, (prompt, answer) in enumerate(zip(own, answers, strict=True))
    )
    return rows[:40] if is_quick else rows


def prefixed(*, is_shared: bool) -> tuple[Row, ...]:
    """Rows of one length that have most of their prompt in common, or nothing. One token each: only prompts are computed."""
    return tuple(
        Row(prompt=f"{words(PREFIX_SHARED, 999 if is_shared else 1000 + row)} {words(PREFIX_OWN, row)}", answer_tokens=1)
        for row in range(PREFIX_ROWS)
    )


def copying(_is_quick: bool) -> tuple[Row, ...]:
    """One text that is to be written again with its capital letters made small."""
    prompt, expected = copying_row(seed=5)
    return (Row(prompt=prompt, answer_tokens=len(expected.split()) + 1, expected=expected),)


# Decode steps are all alike, and those of many rows take seconds: 8 of 32 rows and 4 of 256 stand for longer answers.
WORK: Mapping[str, Callable[[bool], tuple[Row, ...]]] = {
    "warm-up": lambda _: equal_rows(1, 2, 2),
    "1x128": lambda _: equal_rows(1, 128, 17),
    "32x128": lambda _: equal_rows(32, 128, 9),
    "256x32": lambda quick: equal_rows(64 if quick else 256, 32, 5),
    "job": job,
    "copying": copying,
    "copying warm-up": lambda _: (Row(prompt=copying_row(seed=6)[0], answer_tokens=2),),
    "shared": lambda _: prefixed(is_shared=True),
    "apart": lambda _: prefixed(is_shared=False),
    "expert prompt": lambda _: equal_rows(1, 32, 1),
    "expert steps": lambda _: equal_rows(1, 32, 1 + EXPERT_STEPS),
    "1x128 short": lambda _: equal_rows(1, 128, 5),
    "long": lambda quick: equal_rows(1, 4096 if quick else LONG_PROMPT, 4),
}


def fewest_passes(answers: Sequence[int], at_a_time: int) -> int:
    """The least number of passes for answers of so many tokens, at most `at_a_time` rows in each: no place is ever empty, or
    one row is longer than all that."""
    return max(-(-sum(answers) // at_a_time), *answers)


def shared_work_ratio(rows: int, shared: int, own: int) -> float:
    """How many times fewer prompt tokens are computed where rows share a beginning of so many tokens."""
    return rows * (shared + own) / (shared + rows * own)


def batches(rows: Sequence[Row], at_a_time: int) -> list[Sequence[Row]]:
    """Static batches in the order of arrival."""
    return [rows[first : first + at_a_time] for first in range(0, len(rows), at_a_time)]
