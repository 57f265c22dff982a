"""Which jobs do the tests with scripted runners submit, and what must come back?"""

from collections.abc import Iterable, Mapping
from typing import Any

MODEL = "sum-chat"


def rows_of(count: int, name: str, script: str = "") -> list[dict[str, str]]:
    """Rows whose prompts are `NAME 0`, `NAME 1`, …, each with the words that steer the scripted runner."""
    steering = f" {script}" if script else ""
    return [{"custom_id": f"{name}-{number}", "prompt": f"{name} {number}{steering}"} for number in range(count)]


def expected(rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What the scripted runner answers: the prompt in capitals."""
    return {row["custom_id"]: row["prompt"].upper() for row in rows}


def answers(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The texts by custom id. Raises AssertionError where a custom id comes twice."""
    found: dict[str, str] = {}
    for result in results:
        assert result["custom_id"] not in found, f"{result['custom_id']} was answered twice"
        found[result["custom_id"]] = result["text"]
    return found
