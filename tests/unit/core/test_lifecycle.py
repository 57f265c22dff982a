"""Do plan records move as the table says, and nowhere else?"""

from itertools import product

import pytest

from ollm_service.core.lifecycle import (
    FINAL_STATES,
    HELD_STATES,
    TRANSITIONS,
    Event,
    ExecutionState,
    IllegalTransition,
    JobState,
    diagram,
    job_state,
    states_before,
    step,
)

S, E = ExecutionState, Event


def test_step_agrees_with_the_table_everywhere() -> None:
    """Every state and event: the table's row, or IllegalTransition naming both."""
    for state, event in product(S, E):
        if (state, event) in TRANSITIONS:
            assert step(state, event) is TRANSITIONS[state, event]
        else:
            with pytest.raises(IllegalTransition, match=f"{event} cannot happen to a plan that is {state}"):
                step(state, event)


def test_final_states_are_final() -> None:
    """No event moves a final state, and every other state can still reach each final one."""
    assert {state for state in S if state.is_final} == FINAL_STATES
    assert not {state for state, _ in TRANSITIONS} & FINAL_STATES
    for start in set(S) - FINAL_STATES:
        reached = {start}
        while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
            reached |= more
        assert reached >= FINAL_STATES


def test_only_a_claim_hands_a_plan_to_a_worker() -> None:
    """From queued, nothing but a claim leads to a held state; held states alone can record, start or be requeued."""
    assert {state for state in S if state.is_held} == HELD_STATES
    ways_in = {event for (before, event), after in TRANSITIONS.items() if before is S.QUEUED and after.is_held}
    assert ways_in == {E.CLAIM}
    for event in (E.START, E.RECORD, E.REQUEUE, E.GIVE_UP, E.BURY):
        assert set(states_before(event)) == HELD_STATES
    assert states_before(E.CLAIM) == (S.QUEUED,)


def test_cancel_and_deadline_reach_every_unfinished_plan() -> None:
    """Whatever is not final can be cancelled and can expire."""
    assert set(states_before(E.CANCEL)) == set(states_before(E.EXPIRE)) == set(S) - FINAL_STATES


def test_the_happy_path() -> None:
    """queued, leased, running, succeeded."""
    state = S.QUEUED
    for event in (E.CLAIM, E.START, E.RECORD, E.FINISH):
        state = step(state, event)
    assert state is S.SUCCEEDED


@pytest.mark.parametrize(
    ("plans", "job"),
    [
        ([S.QUEUED, S.QUEUED], JobState.QUEUED),
        ([S.QUEUED, S.LEASED], JobState.RUNNING),
        ([S.QUEUED, S.SUCCEEDED], JobState.RUNNING),
        ([S.RUNNING, S.FAILED], JobState.RUNNING),
        ([S.CANCELLED, S.RUNNING], JobState.RUNNING),
        ([S.SUCCEEDED, S.SUCCEEDED], JobState.SUCCEEDED),
        ([S.SUCCEEDED, S.FAILED], JobState.FAILED),
        ([S.SUCCEEDED, S.DEAD], JobState.FAILED),
        ([S.DEAD, S.EXPIRED], JobState.EXPIRED),
        ([S.EXPIRED, S.CANCELLED, S.FAILED], JobState.CANCELLED),
    ],
)
def test_a_jobs_state_follows_from_its_plans(plans: list[ExecutionState], job: JobState) -> None:
    """The published table, whatever the order of the plans."""
    assert job_state(plans) is job_state(reversed(plans)) is job
    assert job.is_final is all(state.is_final for state in plans)


def test_the_diagram_shows_every_arrow_once() -> None:
    """Every row of the table stands in the drawing, and nothing else does."""
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> queued: submit"]
    drawn: set[tuple[str, str, str]] = set()
    for line in lines[2:]:
        arrow, _, events = line.strip().partition(": ")
        before, after = arrow.split(" --> ")
        if after != "[*]":
            drawn |= {(before, event, after) for event in events.split(", ")}
    assert drawn == {(before.value, event.value, after.value) for (before, event), after in TRANSITIONS.items()}
    assert {line.split()[0] for line in lines if line.endswith("--> [*]")} == {state.value for state in FINAL_STATES}
