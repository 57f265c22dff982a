"""Which queued plan does a worker get?

Priority first, then age. Two steps, so that the number of queued plans does not matter: look at the top of each class by its
index, then take the best of those tops that nobody else is taking (SKIP LOCKED; on SQLite there is one writer at a time).
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, insert, select, union_all, update

from ollm_service.core.leasing import Assignment
from ollm_service.core.lifecycle import HELD_STATES, Event, ExecutionState, step
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements
from ollm_service.core.wire import from_json
from ollm_service.store.columns import now_ms
from ollm_service.store.mapping import work_row
from ollm_service.store.tables import attempts, exclusions, job_rows, jobs, plan_classes, results, runtime_plans, workers
from ollm_service.store.transitions import append_event

_PLAN = runtime_plans.c
_BEST_FIRST = (_PLAN.priority.desc(), _PLAN.created_ms, _PLAN.number, _PLAN.id)
_CLASSES_A_QUERY = 100  # SQLite takes 500 terms in one UNION


def claimable(node: str) -> ColumnElement[bool]:
    """The guard of a claim, for a worker on this node."""
    excluded = select(exclusions.c.plan_id).where(
        exclusions.c.plan_id == _PLAN.id, exclusions.c.node == node, exclusions.c.until_ms > now_ms()
    )
    return (
        (_PLAN.state == ExecutionState.QUEUED.value)
        & ~_PLAN.cancel_requested
        & (_PLAN.available_ms <= now_ms())
        & _PLAN.profile.is_not(None)
        & ~excluded.exists()
    )


def node_of(connection: Connection, worker_id: str) -> str | None:
    """The node of a worker that may claim; None for one that is unknown, draining or gone."""
    query = select(workers.c.node).where(workers.c.id == worker_id, workers.c.state == "active")
    return connection.execute(query).scalar_one_or_none()


def top_of_class(class_id: str, node: str) -> Select[Any]:
    """The best claimable plan of one class; walks the claim index from its top."""
    columns = (_PLAN.id, _PLAN.class_id, _PLAN.priority, _PLAN.created_ms, _PLAN.number)
    return select(*columns).where(_PLAN.class_id == class_id, claimable(node)).order_by(*_BEST_FIRST).limit(1)


def best_classes(connection: Connection, class_ids: Collection[str], node: str) -> list[str]:
    """The classes that have claimable plans, that with the best plan first."""
    tops: list[Row[Any]] = []
    for some in _chunks(sorted(set(class_ids))):
        heads = union_all(*(select(top_of_class(class_id, node).subquery()) for class_id in some))
        tops += connection.execute(heads).all()
    tops.sort(key=lambda top: (-top.priority, top.created_ms, top.number, top.id))
    return [top.class_id for top in tops]


def _chunks(items: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(items)
    while some := list(islice(iterator, _CLASSES_A_QUERY)):
        yield some


def claim(connection: Connection, worker_id: str, lease_id: str, class_ids: Collection[str], lease_ms: int) -> Assignment | None:
    """Lease the best plan to this worker, or nothing."""
    node = node_of(connection, worker_id)
    if node is None:
        return None
    for class_id in best_classes(connection, class_ids, node):
        top = top_of_class(class_id, node).with_for_update(skip_locked=True, key_share=True, of=runtime_plans)
        taken = connection.execute(top).one_or_none()
        if taken is not None:
            _lease(connection, taken.id, worker_id, node, lease_id, lease_ms)
            return assignment_of(connection, lease_id, lease_ms)
    return None


def _lease(connection: Connection, plan_id: str, worker_id: str, node: str, lease_id: str, lease_ms: int) -> None:
    after = step(ExecutionState.QUEUED, Event.CLAIM)
    leased = update(runtime_plans).where(_PLAN.id == plan_id, _PLAN.state == ExecutionState.QUEUED.value)
    leased = leased.values(
        state=after.value,
        lease_id=lease_id,
        lease_expires_ms=now_ms() + lease_ms,
        worker_id=worker_id,
        worker_node=node,
        attempt=_PLAN.attempt + 1,
        reason=None,
    )
    plan = connection.execute(leased.returning(_PLAN.id, _PLAN.tenant_id, _PLAN.job_id, _PLAN.attempt)).one()
    holder = {"worker_id": worker_id, "worker_node": node}
    attempt = {"plan_id": plan_id, "number": plan.attempt, "lease_id": lease_id, "outcome": "running", **holder}
    connection.execute(insert(attempts).values(started_ms=now_ms(), **attempt))
    append_event(connection, plan, "claim", from_state=ExecutionState.QUEUED, to_state=after, **holder)


def assignment_of(connection: Connection, lease_id: str, lease_ms: int) -> Assignment | None:
    """The work under this lease: the plan and its rows without a result. None when the lease holds nothing."""
    query = (
        select(runtime_plans, jobs.c.generation, plan_classes.c.requirements)
        .join_from(runtime_plans, jobs, jobs.c.id == _PLAN.job_id)
        .join(plan_classes, plan_classes.c.class_id == _PLAN.class_id)
        .where(_PLAN.lease_id == lease_id, _PLAN.state.in_(HELD_STATES))
    )
    plan = connection.execute(query).one_or_none()
    if plan is None:
        return None
    generation = from_json(GenerationConfig, plan.generation)
    answered = select(results.c.row).where(results.c.job_id == job_rows.c.job_id, results.c.row == job_rows.c.row)
    rows = select(job_rows).where(job_rows.c.plan_id == plan.id, ~answered.exists()).order_by(job_rows.c.row)
    return Assignment(
        plan_id=plan.id,
        job_id=plan.job_id,
        lease_id=lease_id,
        class_id=plan.class_id,
        attempt=plan.attempt,
        runtime_plan=from_json(RuntimePlan, plan.planned),
        profile=from_json(ModelProfile, plan.profile),
        config=from_json(RuntimeConfig, plan.config),
        requirements=from_json(Requirements, plan.requirements),
        rows=tuple(work_row(row, generation) for row in connection.execute(rows)),
        lease_ms=lease_ms,
        micro_batch_limit=plan.micro_batch_limit,
        lone_crashes=frozenset(plan.lone_crashes),
    )
