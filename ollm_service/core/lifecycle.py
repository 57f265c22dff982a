"""Which states can a plan record be in, and what moves it from one to another? One table; the diagram is drawn from it."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType


class ExecutionState(StrEnum):
    """The state of one plan record.

    queued      waits for a worker; a claim moves it on, or a cancel, its deadline, or nothing while no worker is capable
    leased      one worker holds its lease and loads the model; the first start, a failure or the end of the lease moves it on
    running     the lease holder generates; its last recorded row, a failure or the end of the lease moves it on
    succeeded   every row has a result; final
    failed      it failed three times without a new row, or permanently; its other rows carry that error; final
    cancelled   its user asked for that; its other rows carry that error; final
    expired     its deadline passed; its other rows carry that error; final
    dead        three workers were lost with it without a new row; its other rows carry that error; final
    """

    QUEUED = "queued"
    LEASED = "leased"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def is_final(self) -> bool:
        """Whether nothing moves it on any more."""
        return self in FINAL_STATES

    @property
    def is_held(self) -> bool:
        """Whether a worker holds its lease."""
        return self in HELD_STATES


class Event(StrEnum):
    """What happens to a plan record."""

    CLAIM = "claim"
    START = "start"
    RECORD = "record"
    FINISH = "finish"
    REQUEUE = "requeue"
    GIVE_UP = "give-up"
    BURY = "bury"
    CANCEL = "cancel"
    EXPIRE = "expire"


class JobState(StrEnum):
    """The state of a job, derived from its plans by `job_state`."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether every plan of the job is final."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


_S, _E = ExecutionState, Event
HELD_STATES = frozenset({_S.LEASED, _S.RUNNING})
FINAL_STATES = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED, _S.EXPIRED, _S.DEAD})

TRANSITIONS: Mapping[tuple[ExecutionState, Event], ExecutionState] = MappingProxyType(
    {
        (_S.QUEUED, _E.CLAIM): _S.LEASED,
        (_S.QUEUED, _E.CANCEL): _S.CANCELLED,
        (_S.QUEUED, _E.EXPIRE): _S.EXPIRED,
        (_S.QUEUED, _E.FINISH): _S.SUCCEEDED,  # every row was invalid by itself at submission, or was skipped
        (_S.LEASED, _E.START): _S.RUNNING,
        (_S.RUNNING, _E.START): _S.RUNNING,  # the reply to the first start was lost
        (_S.LEASED, _E.RECORD): _S.RUNNING,
        (_S.RUNNING, _E.RECORD): _S.RUNNING,
        **{(held, _E.FINISH): _S.SUCCEEDED for held in (_S.LEASED, _S.RUNNING)},
        **{(held, _E.REQUEUE): _S.QUEUED for held in (_S.LEASED, _S.RUNNING)},
        **{(held, _E.GIVE_UP): _S.FAILED for held in (_S.LEASED, _S.RUNNING)},
        **{(held, _E.BURY): _S.DEAD for held in (_S.LEASED, _S.RUNNING)},
        **{(held, _E.CANCEL): _S.CANCELLED for held in (_S.LEASED, _S.RUNNING)},
        **{(held, _E.EXPIRE): _S.EXPIRED for held in (_S.LEASED, _S.RUNNING)},
    }
)


class IllegalTransition(ValueError):
    """This event cannot happen in this state."""


def step(state: ExecutionState, event: Event) -> ExecutionState:
    """The state after the event. Raises IllegalTransition where the table has no row."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event} cannot happen to a plan that is {state}") from None


def states_before(event: Event) -> tuple[ExecutionState, ...]:
    """The states in which an event may happen: the guard of its statement."""
    return tuple(state for state, candidate in TRANSITIONS if candidate is event)


def job_state(plan_states: Iterable[ExecutionState]) -> JobState:
    """What a job's plans say about the job.

    All plans final: cancelled if any was, else expired if any did, else failed if any failed or died, else succeeded. Not all
    final: queued while every unfinished plan is queued and none has ended, else running.
    """
    states = set(plan_states)
    if states <= FINAL_STATES:
        if _S.CANCELLED in states:
            return JobState.CANCELLED
        if _S.EXPIRED in states:
            return JobState.EXPIRED
        return JobState.FAILED if states & {_S.FAILED, _S.DEAD} else JobState.SUCCEEDED
    return JobState.QUEUED if states == {_S.QUEUED} else JobState.RUNNING


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    arrows: dict[tuple[ExecutionState, ExecutionState], list[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        arrows.setdefault((before, after), []).append(event.value)
    lines = ["stateDiagram-v2", "    [*] --> queued: submit"]
    lines += [f"    {before} --> {after}: {', '.join(events)}" for (before, after), events in arrows.items()]
    lines += [f"    {state} --> [*]" for state in ExecutionState if state.is_final]
    return "\n".join(lines)
