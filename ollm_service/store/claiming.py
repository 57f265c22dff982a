"""Which queued plan does a worker get?

Priority first, then age. Two steps, so that the number of queued plans does not matter: look at the top of each class by its
index, then take the best of those tops that nobody else is taking (SKIP LOCKED; on SQLite there is one writer at a time).
"""

import json
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    CompoundSelect,
    Connection,
    Row,
    Select,
    bindparam,
    func,
    insert,
    select,
    union_all,
    update,
)

from ollm_service.core.leasing import Assignment
from ollm_service.core.lifecycle import HELD_STATES, Event, ExecutionState, step
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.plan import PLAN_SCHEMA_VERSION, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements
from ollm_service.store.columns import as_text, now_ms
from ollm_service.store.mapping import UNREADABLE, decoded, work_row
from ollm_service.store.tables import attempts, exclusions, job_rows, jobs, plan_classes, results, runtime_plans, workers
from ollm_service.store.transitions import append_events, end_early, event_of, lock_by_id

T = TypeVar("T")
_PLAN = runtime_plans.c
BEST_FIRST = (_PLAN.priority.desc(), _PLAN.created_ms, _PLAN.number, _PLAN.id)
_CLASSES_A_QUERY = 128  # SQLite takes 500 terms in one UNION


_IS_WORKER = workers.c.id == bindparam("worker")
# Uncorrelated, so that the database looks it up once; without an active worker nothing is claimable.
_NODE = select(workers.c.node).where(_IS_WORKER, workers.c.state == "active").scalar_subquery()
_IS_EXCLUDED = (
    select(exclusions.c.plan_id)
    .where(exclusions.c.plan_id == _PLAN.id, exclusions.c.node == _NODE, exclusions.c.until_ms > now_ms())
    .exists()
)
CLAIMABLE = (
    (_PLAN.state == ExecutionState.QUEUED.value)
    & ~_PLAN.cancel_requested
    & (_PLAN.available_ms <= now_ms())
    & _PLAN.profile.is_not(None)
    & (_PLAN.schema_version <= PLAN_SCHEMA_VERSION)
    & _NODE.is_not(None)
    & ~_IS_EXCLUDED
)


def top_of_class(name: str) -> Select[Any]:
    """The best plan of the class in the parameter `name` that `worker` may claim; walks the claim index from its top."""
    columns = (_PLAN.id, _PLAN.class_id, _PLAN.priority, _PLAN.created_ms, _PLAN.number)
    return select(*columns).where(_PLAN.class_id == bindparam(name), CLAIMABLE).order_by(*BEST_FIRST).limit(1)


# Read as text: what many plans share is decoded once for all of them.
_SHARED = tuple(
    as_text(column) for column in (_PLAN.planned, _PLAN.profile, _PLAN.config, jobs.c.generation, plan_classes.c.requirements)
)
_WORK_COLUMNS = (
    *(_PLAN.id, _PLAN.job_id, _PLAN.class_id, _PLAN.attempt, _PLAN.state),
    *(_PLAN.micro_batch_limit, as_text(_PLAN.lone_crashes), *_SHARED),
)
_ENDED_A_CLAIM = 10  # unreadable plans; a claim's transaction stays short
_LEASED = step(ExecutionState.QUEUED, Event.CLAIM)
_RUNNING = step(_LEASED, Event.START)
_LEASE = (
    update(runtime_plans)
    .where(_PLAN.id == bindparam("plan"), _PLAN.state == ExecutionState.QUEUED.value)
    .values(
        state=_LEASED.value,
        lease_id=bindparam("lease"),
        lease_expires_ms=now_ms() + bindparam("lease_ms", type_=BigInteger),
        worker_id=bindparam("worker"),
        worker_node=_NODE,
        attempt=_PLAN.attempt + 1,
        reason=None,
    )
    .returning(_PLAN.id, _PLAN.tenant_id, _PLAN.job_id, _PLAN.attempt, _PLAN.worker_id, _PLAN.worker_node)
)
_LEASE_AND_START = _LEASE.values(state=_RUNNING.value, started_ms=func.coalesce(_PLAN.started_ms, now_ms()), condition=None)
_BEGIN_ATTEMPT = insert(attempts).values(started_ms=now_ms(), outcome="running")
_WORK: Select[Any] = (
    select(*_WORK_COLUMNS)
    .join_from(runtime_plans, jobs, jobs.c.id == _PLAN.job_id)
    .join(plan_classes, plan_classes.c.class_id == _PLAN.class_id)
)
# The row is locked before it is updated: a plain UPDATE would wait for whoever is just claiming the same plan.
_TAKE = _WORK.where(_PLAN.class_id == bindparam("class"), CLAIMABLE).order_by(*BEST_FIRST).limit(1)
_TAKE = _TAKE.with_for_update(skip_locked=True, key_share=True, of=runtime_plans)
_WORK_BY_LEASE = _WORK.where(_PLAN.lease_id == bindparam("lease"), _PLAN.state.in_(HELD_STATES))
_HAS_RESULT = select(results.c.row).where(results.c.job_id == job_rows.c.job_id, results.c.row == job_rows.c.row).exists()
_ROWS = select(job_rows).where(job_rows.c.plan_id == bindparam("plan"), ~_HAS_RESULT).order_by(job_rows.c.row)


@cache
def _tops(count: int) -> CompoundSelect[Any]:
    """The tops of that many classes, in the parameters `class_0`, `class_1`, …"""
    return union_all(*(select(top_of_class(f"class_{number}").subquery()) for number in range(count)))


def best_classes(connection: Connection, class_ids: Collection[str], worker_id: str) -> list[str]:
    """The classes that have plans which this worker may claim, that with the best plan first."""
    tops: set[Row[Any]] = set()
    for some in _chunks(sorted(set(class_ids))):
        # Padded to a power of two with its own last class, so that few statements serve any number of classes.
        size = 1 << (len(some) - 1).bit_length()
        padded = {f"class_{number}": some[min(number, len(some) - 1)] for number in range(size)}
        tops |= set(connection.execute(_tops(size), {"worker": worker_id, **padded}).all())
    best_first = sorted(tops, key=lambda top: (-top.priority, top.created_ms, top.number, top.id))
    return [top.class_id for top in best_first]


def _chunks(items: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(items)
    while some := list(islice(iterator, _CLASSES_A_QUERY)):
        yield some


def claim(
    connection: Connection,
    worker_id: str,
    lease_id: str,
    class_ids: Collection[str],
    lease_ms: int,
    *,
    warm: Collection[str] = (),
) -> Assignment | None:
    """Lease the best plan to this worker, or nothing. A plan of a `warm` class starts in the same transaction.

    A plan that cannot be decoded ends as failed, and the next one is taken.
    """
    names = list(class_ids) if len(class_ids) == 1 else best_classes(connection, class_ids, worker_id)
    holder = {"worker": worker_id, "lease": lease_id, "lease_ms": lease_ms}
    unreadable = 0
    for name in names:
        while unreadable < _ENDED_A_CLAIM:
            top = connection.execute(_TAKE, {"worker": worker_id, "class": name}).one_or_none()
            if top is None:
                break
            try:
                work = _assignment(connection, top, lease_id)
            except UNREADABLE as error:  # every worker would stumble over it, again and again
                _give_up(connection, top.id, worker_id, type(error).__name__)
                unreadable += 1
                continue
            attempt = _lease(connection, top.id, holder, digest=work.profile.digest, is_warm=name in warm)
            return replace(work, attempt=attempt, is_started=name in warm)
    return None


def _lease(connection: Connection, plan_id: str, holder: dict[str, Any], *, digest: str | None, is_warm: bool) -> int:
    """Lease a plan that is locked; returns the attempt's number."""
    plan = connection.execute(_LEASE_AND_START if is_warm else _LEASE, {"plan": plan_id, **holder}).one()
    attempt = {"plan_id": plan.id, "number": plan.attempt, "lease_id": holder["lease"], "model_digest": digest}
    connection.execute(_BEGIN_ATTEMPT, attempt | {"worker_id": plan.worker_id, "worker_node": plan.worker_node})
    events = [event_of(plan, "claim", from_state=ExecutionState.QUEUED, to_state=_LEASED)]
    if is_warm:
        events.append(event_of(plan, "start", from_state=_LEASED, to_state=_RUNNING))
    append_events(connection, events)
    number: int = plan.attempt
    return number


def _give_up(connection: Connection, plan_id: str, worker_id: str, error: str) -> None:
    """End a locked plan that cannot be read, under a lease that nobody hears of. The error's text might hold a prompt."""
    holder = {"worker": worker_id, "lease": str(uuid.uuid4()), "lease_ms": 0}
    _lease(connection, plan_id, holder, digest=None, is_warm=False)
    plan = lock_by_id(connection, plan_id)
    assert plan is not None, "this transaction holds the plan's lock"
    end_early(connection, plan, Event.GIVE_UP, kind="fail", message=f"The stored plan or its rows cannot be read ({error}).")


def assignment_of(connection: Connection, lease_id: str) -> Assignment | None:
    """The work under this lease: the plan and its rows without a result. None when the lease holds nothing."""
    plan = connection.execute(_WORK_BY_LEASE, {"lease": lease_id}).one_or_none()
    return None if plan is None else _assignment(connection, plan, lease_id)


def _assignment(connection: Connection, plan: Row[Any], lease_id: str) -> Assignment:
    generation = decoded(GenerationConfig, plan.generation)
    rows = connection.execute(_ROWS, {"plan": plan.id}).all()
    return Assignment(
        plan_id=plan.id,
        job_id=plan.job_id,
        lease_id=lease_id,
        class_id=plan.class_id,
        attempt=plan.attempt,
        runtime_plan=decoded(RuntimePlan, plan.planned),
        profile=decoded(ModelProfile, plan.profile),
        config=decoded(RuntimeConfig, plan.config),
        requirements=decoded(Requirements, plan.requirements),
        rows=tuple(work_row(row, generation) for row in rows),
        micro_batch_limit=plan.micro_batch_limit,
        lone_crashes=frozenset(json.loads(plan.lone_crashes)),
        is_started=plan.state == _RUNNING,
    )
