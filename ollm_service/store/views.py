"""What may the rest of the service see of what is stored? Frozen read models; times are epoch milliseconds of the database."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements
from ollm_service.core.worker_quote import RowSize


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job. `succeeded`, `failed` and `pending` count rows and always sum to `row_count`.

    `config` and `generation` are None where what is stored cannot be decoded, as after a newer release wrote it.
    """

    job_id: str
    tenant_id: str
    model: str
    state: JobState
    row_count: int
    succeeded: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    plans_total: int
    priority: int
    where: str | None
    config: RuntimeConfig | None
    generation: GenerationConfig | None
    retry_of: str | None
    quoted: Mapping[str, Any] | None
    created_ms: int
    finished_ms: int | None
    deadline_ms: int | None

    @property
    def pending(self) -> int:
        """Rows without a result."""
        return self.row_count - self.succeeded - self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """A plan record. `runtime_plan` is that of the newest attempt that recorded a row, else `planned`, the intended one.

    `condition` says why a queued plan does not move: `no-capable-worker`, `declined-everywhere` or `model-not-present`.
    `worker_id` and `node` name the lease holder, of a final plan the last one. `reason` explains the newest change.
    """

    plan_id: str
    job_id: str
    number: int
    model: str
    state: ExecutionState
    condition: str | None
    class_id: str
    row_count: int
    rows_done: int
    rows_failed: int
    runtime_plan: RuntimePlan
    planned: RuntimePlan
    profile: ModelProfile | None
    config: RuntimeConfig
    requirements: Requirements
    inventory_seq: int
    attempt: int
    failures: int
    losses: int
    declines: int
    worker_id: str | None
    node: str | None
    cancel_requested: bool
    created_ms: int
    available_ms: int
    started_ms: int | None
    finished_ms: int | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingPlans:
    """Queued plans of one job that ask for the same. `plan` is the first of them; `rows_left` counts rows without a result."""

    plan: PlanView
    plan_ids: tuple[str, ...]
    rows_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadablePlan:
    """A plan record that cannot be decoded; `error` names why without its contents. The first claim ends it."""

    plan_id: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """One line of a plan record's history. `event_id` grows along each plan's history."""

    event_id: int
    plan_id: str
    job_id: str
    at_ms: int
    kind: str
    from_state: str | None
    to_state: str | None
    worker_id: str | None
    node: str | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """One worker's try. `outcome` is `running` until it ends; the maps are JSON, empty until reported."""

    number: int
    worker_id: str
    node: str
    outcome: str
    runtime_plan: RuntimePlan | None
    placement: Mapping[str, Any]
    measured: Mapping[str, Any]
    started_ms: int
    ended_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDetail:
    """A plan record with its whole history, oldest first."""

    plan: PlanView
    events: tuple[EventView, ...]
    attempts: tuple[AttemptView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultView:
    """One row's result. `cursor` numbers the results of a job in the order in which they were committed, without gaps."""

    row: int
    custom_id: str
    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: RowError | None
    plan_id: str
    attempt: int
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker. `state` is `active`, `draining` or `gone`; `running` counts the plans whose leases it holds."""

    worker_id: str
    node: str
    state: str
    pid: int
    capabilities: Capabilities
    live: LiveState
    running: int
    warm_model: str | None
    heartbeat_age_ms: int
    started_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassBacklog:
    """The queued plans of one class, of the first 128. `available` may be claimed now; the others wait for their back-off.

    `requirements` is None where they cannot be decoded: then no worker can satisfy them.
    """

    class_id: str
    requirements: Requirements | None
    queued: int
    available: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlansAhead:
    """Plans of one class that come before those of a new job, and their rows without a result.

    `plan` is the first of them and `sample` the sizes of some of their rows. `queued_rows` is an estimate where very many are
    queued; `held_rows` are those of plans that workers hold, by the worker's id.
    """

    plan: PlanView
    queued_plans: int
    queued_rows: int
    held_plans: int
    held_rows: Mapping[str, int]
    sample: tuple[RowSize, ...]
