"""What passes between a worker and the store: work that is leased out, and what comes back. Plain data, no database."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements

BEATS_A_LEASE = 6
MOST_BEATS_A_SECOND = 50  # of a whole fleet: each is a transaction of the one database


def lease_ms_in(fleet_size: int, base_ms: int) -> int:
    """How long a lease is asked for where so many workers send a heartbeat each sixth of it: so long that the beats stay few.

    It is `base_ms` in small fleets: at 30 s in those of up to 250 workers.
    """
    return max(base_ms, fleet_size * BEATS_A_LEASE * 1000 // MOST_BEATS_A_SECOND)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkRow:
    """One row to answer: `prompt` or `messages`, and its generation settings merged with the job's."""

    row: int
    custom_id: str
    prompt: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    generation: GenerationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Why one row has no answer."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """The answer to one row, or its error. Token counts are zero where nothing ran."""

    row: int
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: RowError | None = None

    def __post_init__(self) -> None:
        if (self.error is None) == (self.text is None):
            raise ValueError("a result holds a text or an error, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A plan record that this worker has leased, with the rows that have no result yet.

    `micro_batch_limit` and `lone_crashes` are what earlier attempts learnt from crashes: the most rows at a time, and the rows
    that crashed a runner while they were alone. `is_started`: it is running already, since its model was warm.
    """

    plan_id: str
    job_id: str
    lease_id: str
    class_id: str
    attempt: int
    runtime_plan: RuntimePlan
    profile: ModelProfile
    config: RuntimeConfig
    requirements: Requirements
    rows: tuple[WorkRow, ...]
    micro_batch_limit: int | None = None
    lone_crashes: frozenset[int] = frozenset()
    is_started: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """What the first Record of an attempt, and its end, tell about it. All maps are JSON."""

    runtime_plan: RuntimePlan
    placement: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The results were written. `is_finished`: they were the last ones, and the plan has succeeded."""

    inserted: int
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseLost:
    """The lease is no longer this worker's; nothing was written, and its work on the plan must stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The plan record left this worker; `state` is what it is now."""

    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """The answer to one heartbeat.

    `held` are the leases that were renewed, `cancelled` those of them whose user asked to stop. `must_drain`: the operator asked
    this worker to finish and leave. `is_registered` false: the store does not know the worker (any more); register again.
    `fleet_size` counts the workers that send heartbeats: `lease_ms_in` says what that means for the next ones.
    """

    is_registered: bool
    held: frozenset[str] = frozenset()
    cancelled: frozenset[str] = frozenset()
    must_drain: bool = False
    fleet_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanClass:
    """A class of plans with equal requirements, None where those cannot be decoded; `seq` numbers classes in commit order."""

    class_id: str
    seq: int
    requirements: Requirements | None
