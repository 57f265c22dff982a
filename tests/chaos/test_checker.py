"""Does the checker see what it is there to see? A good history, and the same with one promise broken."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import violations
from tests.chaos.history import Acknowledged, History

JOB, PLAN = "job_a", "plan_a"


def _event(number: int, kind: str, before: str | None, after: str | None) -> dict[str, Any]:
    return {
        "id": number, "plan_id": PLAN, "at_ms": number * 10, "kind": kind, "from_state": before, "to_state": after,
        "worker_id": None,
    }  # fmt: skip


def _result(row: int, seq: int, attempt: int, at_ms: int) -> dict[str, Any]:
    return {
        "job_id": JOB, "row": row, "seq": seq, "plan_id": PLAN, "attempt": attempt, "text": f"answer {row}",
        "error_code": None, "prompt_tokens": 3, "completion_tokens": 2, "created_ms": at_ms,
    }  # fmt: skip


def _attempt(number: int, node: str, started_ms: int, ended_ms: int | None) -> dict[str, Any]:
    return {
        "plan_id": PLAN, "number": number, "lease_id": f"lease-{number}", "worker_id": f"wkr-{node}", "worker_node": node,
        "outcome": "lost", "started_ms": started_ms, "ended_ms": ended_ms,
    }  # fmt: skip


def _good() -> History:
    """Two rows, one answered by the first attempt, the other by the second after the first worker was lost."""
    return History(
        jobs=(
            {"id": JOB, "row_count": 2, "seq": 2, "succeeded": 2, "failed": 0, "prompt_tokens": 6, "completion_tokens": 4},
        ),
        rows=({"job_id": JOB, "row": 0, "plan_id": PLAN}, {"job_id": JOB, "row": 1, "plan_id": PLAN}),
        plans=(
            {
                "id": PLAN, "job_id": JOB, "state": "succeeded", "attempt": 2, "lease_id": None, "row_count": 2, "rows_done": 2,
                "rows_failed": 0,
            },
        ),
        results=(_result(0, 1, 1, 25), _result(1, 2, 2, 65)),
        attempts=(_attempt(1, "north", 20, 40), _attempt(2, "south", 50, 70)),
        events=(
            _event(1, "submit", None, "queued"),
            _event(2, "claim", "queued", "leased"),
            _event(3, "record", "leased", "running"),
            _event(4, "requeue", "running", "queued"),
            _event(5, "claim", "queued", "leased"),
            _event(6, "start", "leased", "running"),
            _event(7, "finish", "running", "succeeded"),
        ),
    )  # fmt: skip


def _told() -> dict[str, Acknowledged]:
    return {JOB: Acknowledged(row_count=2, nodes=frozenset({"north", "south"}), seen={1: (0, "answer 0")})}


def _with(history: History, table: str, index: int, **changes: Any) -> History:
    rows = list(getattr(history, table))
    rows[index] = {**rows[index], **changes}
    return replace(history, **{table: tuple(rows)})


def _without(history: History, table: str, index: int) -> History:
    rows = getattr(history, table)
    return replace(history, **{table: rows[:index] + rows[index + 1 :]})


BREAKS: dict[str, Callable[[History], History]] = {
    "was acknowledged and is gone": lambda history: replace(history, jobs=()),
    "was acknowledged with 2 rows and has 1": lambda history: _without(history, "rows", 1),
    "has 1 results for 2 rows": lambda history: _without(history, "results", 1),
    "row 0 has 2 results": lambda history: replace(history, results=(*history.results, _result(0, 3, 2, 66))),
    "which it does not have": lambda history: _with(history, "results", 1, row=7),
    "which does not own it": lambda history: _with(history, "results", 1, plan_id="plan_b"),
    "counts 1 + 0": lambda history: _with(history, "jobs", 0, succeeded=1),
    "counts other tokens": lambda history: _with(history, "jobs", 0, prompt_tokens=7),
    "counts 1 rows (0 failed)": lambda history: _with(history, "plans", 0, rows_done=1),
    "gaps or duplicates": lambda history: _with(history, "results", 1, seq=3),
    "is at cursor 5": lambda history: _with(history, "jobs", 0, seq=5),
    "which never was": lambda history: _with(history, "results", 1, attempt=3),
    "written outside attempt 1": lambda history: _with(history, "results", 0, created_ms=45),
    "began before attempt 1 had ended": lambda history: _with(history, "attempts", 0, ended_ms=55),
    "had attempts [1, 3]": lambda history: _with(history, "attempts", 1, number=3),
    "was used for 2 attempts": lambda history: _with(history, "attempts", 1, lease_id="lease-1"),
    "the plan was succeeded": lambda history: replace(history, events=(*history.events, _event(8, "claim", "queued", "leased"))),
    "succeeded → queued by requeue is not allowed": lambda history: replace(
        history, events=(*history.events, _event(8, "requeue", "succeeded", "queued"))
    ),
    "its events end at running": lambda history: _without(history, "events", 6),
    "with lease lease-2": lambda history: _with(history, "plans", 0, lease_id="lease-2"),
    "was read as (0, 'answer 0')": lambda history: _with(history, "results", 0, text="another answer"),
    "which may not run it": lambda history: _with(history, "attempts", 1, worker_node="west"),
}


def test_a_good_history_breaks_no_promise() -> None:
    """A job that lost a worker and went on elsewhere is fine."""
    assert violations(_good(), _told()) == []


@pytest.mark.parametrize("words", BREAKS)
def test_each_broken_promise_is_named(words: str) -> None:
    """A history with one broken promise is reported in words that say which."""
    found = violations(BREAKS[words](_good()), _told())
    assert any(words in problem for problem in found), found


def test_an_unfinished_job_is_fine_while_it_is_not_required_to_be_complete() -> None:
    """In the middle of a run rows may be missing; nothing else may be wrong."""
    running = _with(_good(), "plans", 0, state="running", lease_id="lease-2", rows_done=1)
    running = _with(_without(running, "results", 1), "jobs", 0, seq=1, succeeded=1, prompt_tokens=3, completion_tokens=2)
    running = _with(_without(running, "events", 6), "attempts", 1, ended_ms=None)
    assert violations(running, _told(), must_be_complete=False) == []
