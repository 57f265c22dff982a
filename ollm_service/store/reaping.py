"""What becomes of plans whose holder fell silent or whose time is up?

Each plan has a transaction of its own that looks again under the lock, so that any number of coordinators may do this at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, select, update

from ollm_service.core.leasing import lease_ms_in
from ollm_service.core.lifecycle import FINAL_STATES, HELD_STATES, Event
from ollm_service.core.retry import MOST_LOSSES
from ollm_service.store.columns import now_ms
from ollm_service.store.engine import Database
from ollm_service.store.presence import GONE, count_inventory_change, fleet_size
from ollm_service.store.tables import counters, runtime_plans, workers
from ollm_service.store.transitions import LIGHT_COLUMNS, end_attempt, end_early, move

HOLD_EVERY_MS = 60_000
_PLAN = runtime_plans.c


def reap(database: Database, *, lease_ms: int, limit: int) -> int:
    """Take back what silent workers held. Nothing happens while reaping is held off.

    `lease_ms` is that of a small fleet; in a larger one workers are heard of less often.
    """
    if database.read(_is_held_off):
        return 0
    # Only those with something to do write: on SQLite the others would still take the one write lock.
    if database.read(lambda connection: connection.execute(_silent(connection, lease_ms).limit(1)).first()):
        database.write(lambda connection: _count_out(connection, lease_ms))
    ran_out = _PLAN.state.in_(HELD_STATES) & (_PLAN.lease_expires_ms < now_ms())
    return _for_each(database, ran_out, _PLAN.lease_expires_ms, _take_back, limit)


def expire(database: Database, *, limit: int) -> int:
    """End what has passed its deadline; results stay."""
    due = _PLAN.state.not_in(FINAL_STATES) & _PLAN.deadline_ms.is_not(None) & (_PLAN.deadline_ms <= now_ms())
    return _for_each(database, due, _PLAN.deadline_ms, _expire, limit)


def hold_off(database: Database, *, lease_ms: int) -> bool:
    """Let a lease pass before the next reaping; refused when that was granted a short while ago."""

    def work(connection: Connection) -> bool:
        longest_ms = lease_ms_in(fleet_size(connection), lease_ms)
        granted = update(counters).where(
            counters.c.name == "reap_held_ms", counters.c.value <= now_ms() - max(HOLD_EVERY_MS, 2 * longest_ms)
        )
        if not connection.execute(granted.values(value=now_ms())).rowcount:
            return False
        later = update(counters).where(counters.c.name == "reap_from_ms")
        connection.execute(later.values(value=now_ms() + longest_ms))
        return True

    return database.write(work)


def _is_held_off(connection: Connection) -> bool:
    query = select(counters.c.value > now_ms()).where(counters.c.name == "reap_from_ms")
    return bool(connection.scalar(query))


def _silent(connection: Connection, lease_ms: int) -> Select[Any]:
    longest_ms = lease_ms_in(fleet_size(connection), lease_ms)
    return select(workers.c.id).where(workers.c.state != GONE, workers.c.heartbeat_ms < now_ms() - longest_ms)


def _count_out(connection: Connection, lease_ms: int) -> None:
    silent = [row.id for row in connection.execute(_silent(connection, lease_ms).order_by(workers.c.id).with_for_update())]
    if silent:
        connection.execute(update(workers).where(workers.c.id.in_(silent)).values(state=GONE, running=0))
        count_inventory_change(connection)


def _for_each(
    database: Database,
    condition: ColumnElement[bool],
    order: ColumnElement[Any],
    work: Callable[[Connection, Row[Any]], None],
    limit: int,
) -> int:
    found = select(_PLAN.id).where(condition).order_by(order).limit(limit)
    plan_ids = database.read(lambda connection: connection.execute(found).scalars().all())

    def one(connection: Connection, plan_id: str) -> bool:
        locked = select(*LIGHT_COLUMNS).where(_PLAN.id == plan_id, condition)
        plan = connection.execute(locked.with_for_update(key_share=True, skip_locked=True)).one_or_none()
        if plan is not None:
            work(connection, plan)
        return plan is not None

    return sum(database.write(partial(one, plan_id=plan_id)) for plan_id in plan_ids)


def _take_back(connection: Connection, plan: Row[Any]) -> None:
    reason = f"{plan.worker_node} fell silent"
    losses = plan.losses + 1
    if plan.cancel_requested:
        end_early(connection, plan, Event.CANCEL, kind="reap", message="The job was cancelled.")
    elif losses >= MOST_LOSSES:
        message = f"{losses} workers were lost with it without a new result; the last was {plan.worker_node}"
        end_early(connection, plan, Event.BURY, kind="reap", message=message, losses=losses)
    else:
        end_attempt(connection, plan, outcome="lost", ended_by="reap")
        move(connection, plan, Event.REQUEUE, kind="reap", reason=reason, losses=losses)


def _expire(connection: Connection, plan: Row[Any]) -> None:
    end_early(connection, plan, Event.EXPIRE, kind="expire", message="The job's deadline passed.")
