"""Are the engine's tokens in bfloat16 those of plain transformers wherever rounding leaves no doubt? Teacher-forced.

Plain transformers answers in bfloat16, and the engine goes the same way: where it gives another token, that difference is
noted, and it goes on after the reference's token. So every token is compared after the same tokens, and one doubt does not hide
the rest.

A difference is allowed where rounding can explain it. What rounding does to these weights is measured, not guessed: E is the
most by which plain transformers' own logits in bfloat16 lie off those in float32, over all the family's answers. An engine that
orders its sums differently rounds differently, but no more. If both lie within E of the float32 logits t, and one prefers token a
and the other token b, then t[a] ≥ t[b] - 2 E and t[b] ≥ t[a] - 2 E. So the two may differ where |t[a] - t[b]| ≤ 2 E, and nowhere
else.

A rounding that sends a token to another expert moves logits by leaps, in transformers as in the engine. So that E stays small,
the models with experts ask all of them here; that the right ones are chosen is the float32 grid's affair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute
from tests.exactness.cells import Cell, Residency, kv_of
from tests.exactness.collecting import collected
from tests.exactness.families import FAMILIES
from tests.exactness.reference import forced_logits, plain_answer, some_text, token_ids
from tests.exactness.shelf import HeldFolder, Shelf
from tests.runner.commands import results_of, run, work_row
from workers.runner.engine import Engine

NEW_TOKENS = 16
PROMPTS = tuple(some_text(length, seed=3000 + length) for length in (200, 5, 64, 129, 1, 31))
# E in standard deviations of the logits, at most. Small models with random weights magnify rounding.
MOST_ROUNDING = 0.5
# Of all tokens, so many may hang on rounding.
MOST_DIFFERENCES = 0.05
# Transformers' own bfloat16 moves the logits of a random Qwen3-Next by more than their deviation, which leaves nothing to hold.
ROUNDED = [family for family in FAMILIES if family != "qwen3-next"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One token that is not the reference's, and how far apart the two are in float32, in units of E."""

    prompt: int
    position: int
    in_roundings: float


@dataclass(frozen=True, slots=True)
class Teacher:
    """Plain transformers' answers in bfloat16, and the float32 logits along them."""

    model: HeldFolder

    def answer(self, prompt: int) -> str:
        """The reference's tokens."""
        return plain_answer(self.model.folder, PROMPTS[prompt], NEW_TOKENS).text

    def exact(self, prompt: int) -> torch.Tensor:
        """Float32 logits [N, V] of the same weights after the same tokens."""
        return forced_logits(self.model.folder, PROMPTS[prompt], self.answer(prompt), torch.float32)

    @property
    def rounding(self) -> float:
        """E: the most by which bfloat16 moves a logit."""
        rounded = (plain_answer(self.model.folder, prompt, NEW_TOKENS).logits for prompt in PROMPTS)
        return max(float((one - self.exact(index)).abs().max()) for index, one in enumerate(rounded))

    @property
    def spread(self) -> float:
        """The standard deviation of the logits."""
        return float(torch.cat([self.exact(index) for index in range(len(PROMPTS))]).std())

    def gap(self, prompt: int, position: int, token: str) -> float:
        """How far apart this token's float32 logit and that of the reference's token are there."""
        exact = self.exact(prompt)[position]
        one, other = token_ids(self.model.folder, token + self.answer(prompt)[position])
        return float((exact[one] - exact[other]).abs())


def differences(engine: Engine, command: Execute, teacher: Teacher) -> list[Difference]:
    """Where the engine's tokens differ, each after the reference's tokens."""
    found: list[Difference] = []
    known = dict.fromkeys(range(len(PROMPTS)), 0)
    while known:
        rows = tuple(
            work_row(prompt, PROMPTS[prompt] + teacher.answer(prompt)[:given], max_new_tokens=NEW_TOKENS - given)
            for prompt, given in known.items()
        )
        texts = {row: result.text or "" for row, result in results_of(run(engine, replace(command, rows=rows))).items()}
        known, before = {}, known
        for prompt, given in before.items():
            position = first_difference(teacher.answer(prompt), given, texts[prompt])
            if position is not None:
                gap = teacher.gap(prompt, position, texts[prompt][position - given])
                found.append(Difference(prompt=prompt, position=position, in_roundings=gap / teacher.rounding))
                if position + 1 < NEW_TOKENS:
                    known[prompt] = position + 1
    return found


def first_difference(answer: str, given: int, text: str) -> int | None:
    """The first position from `given` at which the text, which begins there, is another than the answer."""
    assert len(text) == len(answer) - given
    return next((given + index for index, token in enumerate(text) if token != answer[given + index]), None)


def cells(family: str) -> Mapping[str, Cell]:
    """Everything in memory, and everything out of it."""
    resident = Cell(family=family, kv=KVCacheStrategy.RESIDENT, residency=Residency.RESIDENT, batch=3)
    away = replace(resident, kv=kv_of(family)[-1], residency=Residency.STREAMED, batch=8)
    return {"resident": resident, "streamed": away}


@pytest.mark.parametrize("where", ["resident", "streamed"])
@pytest.mark.parametrize("family", collected(ROUNDED))
def test_bfloat16_differs_by_rounding_alone(engine: Engine, shelf: Shelf, tmp_path: Path, family: str, where: str) -> None:
    """Every token that differs from the reference's is one that rounding may turn; those are few, and rounding is small."""
    teacher = Teacher(shelf.bfloat16_model(family))
    assert teacher.rounding <= MOST_ROUNDING * teacher.spread
    command = shelf.command(teacher.model, cells(family)[where], (), tmp_path)
    found = differences(engine, command, teacher)
    assert all(difference.in_roundings <= 2 for difference in found), found
    assert len(found) <= MOST_DIFFERENCES * len(PROMPTS) * NEW_TOKENS


def test_the_bound_tells_a_fault_from_rounding(engine: Engine, shelf: Shelf, tmp_path: Path) -> None:
    """Attention to eight tokens instead of all gives tokens that rounding does not explain."""
    teacher = Teacher(shelf.bfloat16_model("llama"))
    exact = shelf.command(teacher.model, cells("llama")["streamed"], (), tmp_path)
    ring = KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER
    command = replace(
        exact,
        config=RuntimeConfig(kv_cache_strategy=ring, kv_cache_window_tokens=8),
        placement=replace(exact.placement, kv_cache_strategy=ring),
    )
    assert PassId.DISK_CACHE in command.runtime_plan.specialization_pass_ids
    assert any(difference.in_roundings > 2 for difference in differences(engine, command, teacher))
