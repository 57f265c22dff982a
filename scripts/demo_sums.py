"""What does the demo ask, and which answers are right? Sums of two numbers below 100."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollm_service.client import Job, Result
from ollm_service.core.options import GenerationConfig
from scripts.demo_stage import promise

DEMO = Path(__file__).resolve().parent.parent / "demo"
QUESTIONS, ANSWERS = DEMO / "heldout.jsonl", DEMO / "heldout_answers.json"
SHORT = GenerationConfig(max_new_tokens=8)
LEAST_RIGHT = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Questions as rows, and their answers by custom_id."""

    rows: tuple[Mapping[str, Any], ...]
    answers: Mapping[str, str]

    def question(self, custom_id: str) -> str:
        """What was asked, for people."""
        row = next(row for row in self.rows if row["custom_id"] == custom_id)
        return str(row["prompt"] if "prompt" in row else row["messages"][-1]["content"])

    def right(self, results: Sequence[Result]) -> int:
        """How many answers are right."""
        return sum((result.text or "").strip() == self.answers[result.custom_id] for result in results)


def heldout_sums(most: int) -> Sums:
    """Questions that the model was not trained on."""
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()[:most]]
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return Sums(rows=tuple(lines), answers={line["custom_id"]: answers[line["custom_id"]] for line in lines})


def random_sums(number: int) -> Sums:
    """Any sums of two numbers below 100."""
    dice = random.Random(7)
    pairs = {f"sum-{index:03}": (dice.randrange(100), dice.randrange(100)) for index in range(number)}
    rows = tuple({"custom_id": name, "prompt": f"{a}+{b}="} for name, (a, b) in pairs.items())
    return Sums(rows=rows, answers={name: str(a + b) for name, (a, b) in pairs.items()})


def results_of(job: Job, sums: Sums) -> list[Result]:
    """The job's results in row order. Raises NotAsPromised unless every row was answered exactly once."""
    results = sorted(job.refresh().results(), key=lambda result: result.row)
    promise([result.custom_id for result in results] == [row["custom_id"] for row in sums.rows], "rows are lost or doubled")
    failed = next((result for result in results if result.error is not None), None)
    promise(failed is None, f"row {failed.custom_id} failed: {failed.error}" if failed else "")
    return results


def tell_right(sums: Sums, results: Sequence[Result]) -> str:
    """`200 of 200 answers are right.` Raises NotAsPromised below 95 %."""
    right = sums.right(results)
    promise(right >= LEAST_RIGHT * len(results), f"only {right} of {len(results)} answers are right")
    return f"{right} of {len(results)} answers are right."
