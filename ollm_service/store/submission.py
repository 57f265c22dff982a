"""How does a job come into being? Everything in one transaction, and once per idempotency key."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sqlalchemy import JSON, Connection, Insert, Integer, Text, bindparam, cast, column, func, insert, select, update

from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import Event, ExecutionState, step
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import PLAN_SCHEMA_VERSION, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, class_id
from ollm_service.core.wire import to_json
from ollm_service.store.columns import encode_json, now_ms
from ollm_service.store.mapping import job_view, shown_columns
from ollm_service.store.tables import counters, job_rows, jobs, plan_classes, plan_events, results, runtime_plans
from ollm_service.store.transitions import INSERT_BATCH
from ollm_service.store.views import JobView


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A row as submitted: `request` holds `prompt` or `messages`, and `generation`. With `error` it is invalid by itself."""

    row: int
    custom_id: str
    request: Mapping[str, Any]
    error: RowError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPlan:
    """A plan record to be: the numbers of its rows, and how they are intended to run."""

    plan_id: str
    rows: tuple[int, ...]
    runtime_plan: RuntimePlan
    profile: ModelProfile | None
    config: RuntimeConfig
    requirements: Requirements
    condition: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be. Every row belongs to exactly one plan. `deadline_ms` is a duration from the database's now.

    `quoted` is what its preview said of its time: `seconds`, `fastest_seconds`, `slowest_seconds` and `is_measured`.
    """

    job_id: str
    model: str
    rows: Sequence[NewRow]
    plans: Sequence[NewPlan]
    config: RuntimeConfig
    generation: GenerationConfig
    body_digest: str
    inventory_seq: int
    tenant_id: str = "default"
    priority: int = 0
    where: str | None = None
    deadline_ms: int | None = None
    idempotency_key: str | None = None
    retry_of: str | None = None
    quoted: Mapping[str, Any] | None = None
    # Which plan each row belongs to, worked out once.
    plan_of_row: Mapping[int, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plan_of_row = {row: plan.plan_id for plan in self.plans for row in plan.rows}
        assigned = sum(len(plan.rows) for plan in self.plans)
        if assigned != len(self.rows) or plan_of_row.keys() != {row.row for row in self.rows}:
            raise ValueError("every row of a job belongs to exactly one plan")
        object.__setattr__(self, "plan_of_row", plan_of_row)


_INSERT_JOB, _INSERT_ROWS, _INSERT_RESULTS = insert(jobs), insert(job_rows), insert(results)
_INSERT_PLANS, _INSERT_EVENTS, _INSERT_CLASS = insert(runtime_plans), insert(plan_events), insert(plan_classes)
# A placeholder for each value costs PostgreSQL's driver more time than the rest of a large submission: one text holds them all.
_ROWS_IN_TEXT = (
    func.json_to_recordset(cast(bindparam("rows", type_=Text), JSON))
    .table_valued(column("row", Integer), *(column(name, Text) for name in ("plan_id", "custom_id", "request")))
    .render_derived(with_types=True)
)
_INSERT_ROWS_IN_TEXT = insert(job_rows).from_select(
    ["job_id", *_ROWS_IN_TEXT.c.keys()], select(bindparam("of_job", type_=Text), *_ROWS_IN_TEXT.c)
)
_NOW = select(now_ms())
_KNOWN_CLASSES = select(plan_classes.c.class_id).where(plan_classes.c.class_id.in_(bindparam("wanted", expanding=True)))
_IS_CLASS_COUNTER = counters.c.name == "class_seq"
_LOCK_CLASS_COUNTER = select(counters.c.value).where(_IS_CLASS_COUNTER).with_for_update()
_SET_CLASS_COUNTER = update(counters).where(_IS_CLASS_COUNTER).values(value=bindparam("newest"))


def insert_job(connection: Connection, job: NewJob) -> JobView:
    """Insert the job with all that belongs to it. Raises IntegrityError for an id or idempotency key that is taken."""
    at_ms = int(connection.execute(_NOW).scalar_one())
    invalid = [row for row in job.rows if row.error is not None]
    deadline = None if job.deadline_ms is None else at_ms + job.deadline_ms
    values = {
        "id": job.job_id,
        "tenant_id": job.tenant_id,
        "model": job.model,
        "config": to_json(job.config),
        "generation": to_json(job.generation),
        "priority": job.priority,
        "where_clause": job.where,
        "idempotency_key": job.idempotency_key,
        "body_digest": job.body_digest,
        "retry_of": job.retry_of,
        "quoted": None if job.quoted is None else dict(job.quoted),
        "row_count": len(job.rows),
        "plans_total": len(job.plans),
        "seq": len(invalid),
        "succeeded": 0,
        "failed": len(invalid),
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "created_ms": at_ms,
        "deadline_ms": deadline,
    }
    connection.execute(_INSERT_JOB, values)
    _insert_rows(connection, job)
    _insert_invalid(connection, job, invalid, at_ms)
    states = _insert_plans(connection, job, {row.row for row in invalid}, at_ms, deadline)
    # Last, since a new class keeps the counter locked until the commit.
    ensure_classes(connection, [plan.requirements for plan in job.plans])
    texts = {name: encode_json(values[name]) for name in ("config", "generation", "quoted")}
    return job_view(SimpleNamespace(**values | texts), states, at_ms)


def _insert_all(connection: Connection, statement: Insert, values: Sequence[dict[str, Any]]) -> None:
    for start in range(0, len(values), INSERT_BATCH):
        batch = values[start : start + INSERT_BATCH]
        connection.execute(statement, batch[0] if len(batch) == 1 else batch)


def _insert_rows(connection: Connection, job: NewJob) -> None:
    for start in range(0, len(job.rows), INSERT_BATCH):
        batch = job.rows[start : start + INSERT_BATCH]
        if connection.dialect.name == "postgresql":
            texts = [_row_texts(job, row) for row in batch]
            connection.execute(_INSERT_ROWS_IN_TEXT, {"of_job": job.job_id, "rows": encode_json(texts)})
        else:
            connection.execute(_INSERT_ROWS, [_row_values(job, row) for row in batch])


def _row_values(job: NewJob, row: NewRow) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "row": row.row,
        "plan_id": job.plan_of_row[row.row],
        "custom_id": row.custom_id,
        "request": row.request,
    }


def _row_texts(job: NewJob, row: NewRow) -> dict[str, Any]:
    """What is stored of a row, its JSON columns as the text that they keep."""
    return {
        "row": row.row,
        "plan_id": job.plan_of_row[row.row],
        "custom_id": encode_json(row.custom_id),
        "request": encode_json(row.request),
    }


def _insert_invalid(connection: Connection, job: NewJob, invalid: Sequence[NewRow], at_ms: int) -> None:
    values = [
        {
            "job_id": job.job_id,
            "row": row.row,
            "seq": seq,
            "plan_id": job.plan_of_row[row.row],
            "attempt": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "error_code": row.error.code,
            "error_message": row.error.message,
            "created_ms": at_ms,
        }
        for seq, row in enumerate(invalid, start=1)
        if row.error is not None
    ]
    _insert_all(connection, _INSERT_RESULTS, values)


def _insert_plans(connection: Connection, job: NewJob, invalid: set[int], at_ms: int, deadline: int | None) -> Mapping[str, int]:
    """How many plans begin in which state."""
    config = to_json(job.config)
    values, events = [], []
    for number, plan in enumerate(job.plans):
        failed = len(invalid.intersection(plan.rows))
        state = ExecutionState.QUEUED
        if failed == len(plan.rows):  # nothing is left to run: it is born final
            state = step(state, Event.FINISH)
        values.append(
            {
                "id": plan.plan_id,
                "tenant_id": job.tenant_id,
                "job_id": job.job_id,
                "number": number,
                "model": job.model,
                "class_id": class_id(plan.requirements),
                "priority": job.priority,
                "state": state.value,
                "condition": plan.condition,
                "planned": to_json(plan.runtime_plan),
                "schema_version": PLAN_SCHEMA_VERSION,
                "profile": None if plan.profile is None else to_json(plan.profile),
                "config": config if plan.config is job.config else to_json(plan.config),
                "inventory_seq": job.inventory_seq,
                **shown_columns(plan.runtime_plan),
                "row_count": len(plan.rows),
                "rows_done": failed,
                "rows_failed": failed,
                "cancel_requested": False,
                **dict.fromkeys(("attempt", "failures", "losses", "declines"), 0),
                "lone_crashes": [],
                **dict.fromkeys(("created_ms", "available_ms", "queued_ms"), at_ms),
                "deadline_ms": deadline,
                "finished_ms": at_ms if state.is_final else None,
            }
        )
        identity = {"tenant_id": job.tenant_id, "job_id": job.job_id, "plan_id": plan.plan_id, "at_ms": at_ms}
        events.append({**identity, "kind": "submit", "from_state": None, "to_state": ExecutionState.QUEUED.value})
        if state.is_final:
            events.append({**identity, "kind": "finish", "from_state": ExecutionState.QUEUED.value, "to_state": state.value})
    _insert_all(connection, _INSERT_PLANS, values)
    _insert_all(connection, _INSERT_EVENTS, events)
    return Counter(plan["state"] for plan in values)


def ensure_classes(connection: Connection, requirements: Sequence[Requirements]) -> None:
    """Number the classes that are not known yet.

    The counter stays locked until the commit, so that classes are numbered in the order in which they become visible: a worker
    that has seen a number has seen every lower one. A database sequence would not do that.
    """
    wanted = {class_id(item): item for item in requirements}
    if not _unknown(connection, wanted):
        return
    seq = int(connection.execute(_LOCK_CLASS_COUNTER).scalar_one())
    missing = _unknown(connection, wanted)
    for number, name in enumerate(missing, start=seq + 1):
        values = {"class_id": name, "seq": number, "requirements": to_json(wanted[name])}
        connection.execute(_INSERT_CLASS, values)
    connection.execute(_SET_CLASS_COUNTER, {"newest": seq + len(missing)})


def _unknown(connection: Connection, wanted: Iterable[str]) -> list[str]:
    known = connection.execute(_KNOWN_CLASSES, {"wanted": list(wanted)}).scalars()
    return sorted(set(wanted).difference(known))
