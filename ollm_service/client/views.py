"""What does a user see of plans, results, workers and models? Frozen views; `raw` is the service's own JSON for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.plan import ResolvedModel, RuntimePlan
from ollm_service.core.wire import from_json

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A job's rows: answered, ended with an error, and still without a result."""

    succeeded: int
    failed: int
    pending: int

    @property
    def done(self) -> int:
        """Rows that have a result, good or not."""
        return self.succeeded + self.failed

    @property
    def total(self) -> int:
        """Every row of the job."""
        return self.done + self.pending


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEvent:
    """One step in a plan's history. `before` and `after` are execution states."""

    at: datetime
    kind: str
    before: str | None
    after: str | None
    worker: str | None
    node: str | None
    reason: str | None

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(
            at=datetime.fromisoformat(raw["at"]),
            kind=raw["kind"],
            before=raw.get("from"),
            after=raw.get("to"),
            worker=raw.get("worker"),
            node=raw.get("node"),
            reason=raw.get("reason"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One worker's try. `runtime_plan` is the plan as it really ran, once the attempt recorded a row."""

    number: int
    worker: str
    node: str | None
    outcome: str | None
    runtime_plan: RuntimePlan | None
    placement: Json
    estimate: Json
    measured: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one worker could take a plan; `reasons` are why not."""

    node: str
    worker_id: str
    eligible: bool
    reasons: tuple[str, ...]

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        reasons = tuple(raw.get("reasons") or ())
        return cls(node=raw["node"], worker_id=raw["worker_id"], eligible=raw["eligible"], reasons=reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan record.

    `events` and `attempts` are its history, `verdicts` what each worker says to one that waits; they are filled where one plan
    was asked for by its id.
    """

    id: str
    state: ExecutionState
    condition: str | None
    class_id: str
    row_count: int
    runtime_plan: RuntimePlan
    requirements: Json
    attempt: int
    worker: str | None
    events: tuple[PlanEvent, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @property
    def reason(self) -> str:
        """Why it runs the way it does."""
        return self.runtime_plan.reason

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        resolved = resolved_from(raw)
        return cls(
            id=raw["id"],
            state=ExecutionState(raw["state"]),
            condition=raw.get("condition"),
            class_id=raw["class_id"],
            row_count=raw["row_count"],
            runtime_plan=RuntimePlan.from_dict(raw["runtime_plan"], resolved_model=resolved),
            requirements=raw["requirements"],
            attempt=raw["attempt"],
            worker=raw.get("worker"),
            events=tuple(PlanEvent.from_raw(event) for event in raw.get("events", ())),
            attempts=tuple(_attempt(attempt, resolved) for attempt in raw.get("attempts", ())),
            verdicts=tuple(Verdict.from_raw(verdict) for verdict in raw.get("workers", ())),
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row's answer or its error. `cursor` numbers a job's results in the order in which they were written."""

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
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From one line of the results."""
        error, usage = raw.get("error"), raw.get("usage") or {}
        return cls(
            row=raw["row"],
            custom_id=raw["custom_id"],
            text=raw.get("text"),
            finish_reason=raw.get("finish_reason"),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            error=RowError(code=error["code"], message=error["message"]) if error else None,
            plan_id=raw["plan_id"],
            attempt=raw["attempt"],
            cursor=raw["cursor"],
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What would be planned, and who could run it. No class and no id where the plan is not executable.

    `id` names it to a submission. `quote` is JSON: when it would be done, by whom and how; None without rows.
    """

    id: str | None
    runtime_plan: RuntimePlan
    requirements: Json | None
    class_id: str | None
    condition: str | None
    workers: tuple[Verdict, ...]
    quote: Json | None = None
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(
            id=raw.get("id"),
            quote=raw.get("quote"),
            runtime_plan=RuntimePlan.from_dict(raw["runtime_plan"], resolved_model=resolved_from(raw)),
            requirements=raw.get("requirements"),
            class_id=raw.get("class_id"),
            condition=raw.get("condition"),
            workers=tuple(Verdict.from_raw(verdict) for verdict in raw["workers"]),
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process. `capabilities` and `live` are what it offers and what it has free, in bytes."""

    id: str
    node: str
    state: str
    running: int
    warm_model: str | None
    capabilities: Json
    live: Json
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @property
    def usable_models(self) -> tuple[str, ...]:
        """The names of its models, without those that it refuses."""
        return tuple(model["name"] for model in self.capabilities.get("models", ()) if not model.get("unsafe_because"))

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(
            id=raw["id"],
            node=raw["node"],
            state=raw["state"],
            running=raw.get("running", 0),
            warm_model=raw.get("warm_model"),
            capabilities=raw.get("capabilities") or {},
            live=raw.get("live") or {},
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that workers have, or an alias that they may fetch."""

    id: str
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(id=raw["id"], raw=raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job as it was when the service was asked. `plans` are its first hundred."""

    id: str
    model: str
    state: JobState
    row_count: int
    counts: Counts
    plans_total: int
    plans: tuple[Plan, ...]
    raw: Json = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        counts = raw["counts"]
        return cls(
            id=raw["id"],
            model=raw.get("model", ""),
            state=JobState(raw["state"]),
            row_count=raw["row_count"],
            counts=Counts(succeeded=counts["succeeded"], failed=counts["failed"], pending=counts["pending"]),
            plans_total=raw["plans_total"],
            plans=tuple(Plan.from_raw(plan) for plan in raw.get("plans", ())),
            raw=raw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Amended:
    """What an amendment changed: plans that wait with the new options now, unfinished ones that keep the old, rows given up."""

    plans_amended: int
    plans_kept: int
    rows_skipped: int

    @classmethod
    def from_raw(cls, raw: Json) -> Self:
        """From the service's JSON."""
        return cls(plans_amended=raw["plans_amended"], plans_kept=raw["plans_kept"], rows_skipped=raw["rows_skipped"])


def resolved_from(raw: Json) -> ResolvedModel:
    """The model that is kept beside a plan."""
    return from_json(ResolvedModel, raw["resolved_model"])


def _attempt(raw: Json, resolved: ResolvedModel) -> Attempt:
    plan = raw.get("runtime_plan")
    return Attempt(
        number=raw["number"],
        worker=raw["worker"],
        node=raw.get("node"),
        outcome=raw.get("outcome"),
        runtime_plan=RuntimePlan.from_dict(plan, resolved_model=resolved) if plan else None,
        placement=raw.get("placement") or {},
        estimate=raw.get("estimate") or {},
        measured=raw.get("measured") or {},
    )
