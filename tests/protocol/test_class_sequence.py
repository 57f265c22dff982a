"""Does every worker come to know every class? The argument for numbering classes in commit order.

Two submissions each bring a class of their own. A worker remembers the highest class number that it has seen, asks only
for higher ones, matches those against itself, and claims from the classes that matched.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import pytest

from tests.protocol.explorer import Explorer, Step, Verdict


class Submission(NamedTuple):
    """A submission's transaction, and the number that its class has drawn."""

    phase: Literal["absent", "open", "committed", "claimed"] = "absent"
    number: int = 0


class State(NamedTuple):
    """The two submissions, and one worker's knowledge of classes."""

    submissions: tuple[Submission, ...] = (Submission(), Submission())
    highest_seen: int = 0
    matched: frozenset[int] = frozenset()
    is_capable: bool = True


def explore(*, start: State, numbers_in_commit_order: bool, looks_again_when_changed: bool) -> Verdict:
    """Every interleaving of the submissions and the worker."""

    def steps(state: State) -> Iterator[Step]:
        for which, submission in enumerate(state.submissions):
            others = [other for index, other in enumerate(state.submissions) if index != which]
            if submission.phase == "absent":
                blocked = numbers_in_commit_order and any(other.phase == "open" for other in others)
                drawn = Submission("open", 1 + max(other.number for other in state.submissions))
                if not blocked:
                    yield Step(f"submission {which}", "draws a number", put(state, which, drawn))
            elif submission.phase == "open":
                yield Step(f"submission {which}", "commits", put(state, which, submission._replace(phase="committed")))
            elif submission.phase == "committed" and which in state.matched:
                yield Step("worker", f"claims {which}", put(state, which, submission._replace(phase="claimed")))
        visible = [s.number for s in state.submissions if s.phase in ("committed", "claimed")]
        if fresh := [number for number in visible if number > state.highest_seen]:
            new = {which for which, s in enumerate(state.submissions) if s.number in fresh}
            matched = state.matched | new if state.is_capable else state.matched
            yield Step("worker", "matches new classes", state._replace(highest_seen=max(fresh), matched=matched))
        if not state.is_capable:
            seen = 0 if looks_again_when_changed else state.highest_seen
            yield Step("worker", "finishes hashing its model", state._replace(is_capable=True, highest_seen=seen))

    def put(state: State, which: int, submission: Submission) -> State:
        submissions = list(state.submissions)
        submissions[which] = submission
        return state._replace(submissions=tuple(submissions))

    done = {"claimed"}
    return Explorer(
        start,
        steps,
        judge=lambda _before, _step: None,
        is_done=lambda state: {submission.phase for submission in state.submissions} == done,
    ).run()


@pytest.mark.parametrize("is_capable", [True, False])
def test_numbers_in_commit_order_reach_every_worker(is_capable: bool) -> None:
    """With a number that stays locked until its transaction commits, and a new look after a change, no class is missed."""
    start = State(is_capable=is_capable)
    verdict = explore(start=start, numbers_in_commit_order=True, looks_again_when_changed=True)
    assert verdict.violation is None, str(verdict)


def test_a_database_sequence_hides_a_class() -> None:
    """Numbers that commit out of order let a worker skip a class for ever."""
    verdict = explore(start=State(), numbers_in_commit_order=False, looks_again_when_changed=True)
    assert verdict.violation is not None
    assert "stuck" in verdict.violation


def test_a_worker_that_changes_must_look_at_old_classes_again() -> None:
    """A worker that was not yet capable when it saw a class would never claim from it."""
    verdict = explore(start=State(is_capable=False), numbers_in_commit_order=True, looks_again_when_changed=False)
    assert verdict.violation is not None
    assert "stuck" in verdict.violation
