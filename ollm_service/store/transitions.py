"""How does a plan record change its state? Every change goes through here: the table decides, and an event tells of it.

The caller holds the plan's lock (and takes the job's after it). FOR NO KEY UPDATE is enough, and does not block the foreign keys
of concurrent inserts.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, literal, select, update

from ollm_service.core.leasing import RowResult
from ollm_service.core.lifecycle import HELD_STATES, Event, ExecutionState, step
from ollm_service.store.columns import now_ms
from ollm_service.store.tables import attempts, job_rows, jobs, plan_events, results, runtime_plans

_HEAVY = {"planned", "finalized", "profile", "config"}
LIGHT_COLUMNS = tuple(column for column in runtime_plans.c if column.name not in _HEAVY)
INSERT_BATCH = 1_000


def lock_by_lease(connection: Connection, lease_id: str) -> Row[Any] | None:
    """The plan that this lease holds, locked; None when the lease holds nothing (any more). The guard of every worker's write."""
    guard = (runtime_plans.c.lease_id == lease_id) & runtime_plans.c.state.in_(HELD_STATES)
    return connection.execute(select(*LIGHT_COLUMNS).where(guard).with_for_update(key_share=True)).one_or_none()


def lock_by_id(connection: Connection, plan_id: str) -> Row[Any] | None:
    """The plan record, locked."""
    query = select(*LIGHT_COLUMNS).where(runtime_plans.c.id == plan_id).with_for_update(key_share=True)
    return connection.execute(query).one_or_none()


def move(connection: Connection, plan: Row[Any], event: Event, *, kind: str, reason: str | None = None, **values: Any) -> str:
    """Move a locked plan by an event of the table and append it to the history; `values` are other columns to set.

    Returns the new state. Raises IllegalTransition where the table has no row.
    """
    before = ExecutionState(plan.state)
    after = step(before, event)
    if before.is_held and not after.is_held:
        values |= {"lease_id": None, "lease_expires_ms": None}
    if after is ExecutionState.QUEUED:
        values |= {"worker_id": None, "worker_node": None, "queued_ms": now_ms()}
    if after.is_final:
        values |= {"finished_ms": now_ms(), "cancel_requested": False}
    changed = update(runtime_plans).where(runtime_plans.c.id == plan.id, runtime_plans.c.state == before)
    connection.execute(changed.values(state=after.value, reason=reason, **values))
    worker = {name: values.get(name) or getattr(plan, name) for name in ("worker_id", "worker_node")}
    if after is not before or event not in (Event.RECORD, Event.START):
        append_event(connection, plan, kind, from_state=before, to_state=after, reason=reason, **worker)
    return after.value


def append_event(
    connection: Connection,
    plan: Row[Any],
    kind: str,
    *,
    from_state: str | None,
    to_state: str | None,
    reason: str | None = None,
    worker_id: str | None = None,
    worker_node: str | None = None,
) -> None:
    """One line of the plan's history, at the database's time."""
    values = {"from_state": from_state, "to_state": to_state, "worker_id": worker_id, "worker_node": worker_node}
    identity = {"tenant_id": plan.tenant_id, "job_id": plan.job_id, "plan_id": plan.id}
    connection.execute(insert(plan_events).values(at_ms=now_ms(), kind=kind, reason=reason, **identity, **values))


def end_attempt(connection: Connection, plan: Row[Any], *, outcome: str, ended_by: str) -> None:
    """Close the running attempt of a plan that leaves its holder."""
    current = (attempts.c.plan_id == plan.id) & (attempts.c.number == plan.attempt) & attempts.c.ended_ms.is_(None)
    connection.execute(update(attempts).where(current).values(outcome=outcome, ended_by=ended_by, ended_ms=now_ms()))


def end_early(connection: Connection, plan: Row[Any], event: Event, *, kind: str, message: str, **values: Any) -> str:
    """End a locked plan before all its rows are answered: each row without a result gets the final state as its error."""
    after = step(ExecutionState(plan.state), event)
    missing = write_errors(connection, plan, code=after.value, message=message)
    done = {"rows_done": plan.row_count, "rows_failed": plan.rows_failed + missing}
    move(connection, plan, event, kind=kind, reason=message, **(values | done))
    if ExecutionState(plan.state).is_held:
        end_attempt(connection, plan, outcome=after.value, ended_by=kind)
    return after.value


def write_results(connection: Connection, plan: Row[Any], answers: Sequence[RowResult]) -> tuple[int, int]:
    """Insert what is new among the answers and count it on the job; returns (inserted, of these failed).

    The plan's lock makes `fresh` exact: nobody else writes results for its rows. Raises ValueError for a row of another plan.
    """
    wanted = {answer.row: answer for answer in answers}
    answered = (results.c.job_id == job_rows.c.job_id) & (results.c.row == job_rows.c.row)
    query = select(job_rows.c.row, results.c.seq).join_from(job_rows, results, answered, isouter=True)
    known = connection.execute(query.where(job_rows.c.plan_id == plan.id, job_rows.c.row.in_(wanted))).all()
    if len(known) != len(wanted):
        raise ValueError(f"plan {plan.id} has no such rows: {sorted(set(wanted) - {row.row for row in known})}")
    fresh = [wanted[row.row] for row in known if row.seq is None]
    if not fresh:
        return 0, 0
    failed = sum(answer.error is not None for answer in fresh)
    newest = _count_on_job(
        connection,
        plan.job_id,
        succeeded=len(fresh) - failed,
        failed=failed,
        prompt_tokens=sum(answer.prompt_tokens for answer in fresh),
        completion_tokens=sum(answer.completion_tokens for answer in fresh),
    )
    first = newest - len(fresh) + 1
    at_ms = connection.scalar(select(now_ms()))
    rows = [
        {
            "job_id": plan.job_id,
            "row": answer.row,
            "seq": seq,
            "plan_id": plan.id,
            "attempt": plan.attempt,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "error_code": answer.error.code if answer.error else None,
            "error_message": answer.error.message if answer.error else None,
            "created_ms": at_ms,
        }
        for seq, answer in enumerate(sorted(fresh, key=lambda answer: answer.row), start=first)
    ]
    for start in range(0, len(rows), INSERT_BATCH):
        connection.execute(insert(results), rows[start : start + INSERT_BATCH])
    return len(fresh), failed


def write_errors(connection: Connection, plan: Row[Any], *, code: str, message: str) -> int:
    """Give every row of a locked plan that has no result this error; returns how many there were."""
    missing: int = plan.row_count - plan.rows_done
    if not missing:
        return 0
    newest = _count_on_job(connection, plan.job_id, failed=missing)
    has_result = select(results.c.row).where(results.c.job_id == job_rows.c.job_id, results.c.row == job_rows.c.row)
    names = ("job_id", "row", "seq", "plan_id", "attempt", "prompt_tokens", "completion_tokens")
    source = select(
        job_rows.c.job_id,
        job_rows.c.row,
        newest - missing + func.row_number().over(order_by=job_rows.c.row),
        job_rows.c.plan_id,
        literal(plan.attempt),
        literal(0),
        literal(0),
        literal(code),
        literal(message, results.c.error_message.type),
        now_ms(),
    ).where(job_rows.c.plan_id == plan.id, ~has_result.exists())
    copied = insert(results).from_select([*names, "error_code", "error_message", "created_ms"], source)
    written = connection.execute(copied, execution_options={"preserve_rowcount": True})
    if written.rowcount != missing:
        raise RuntimeError(f"plan {plan.id} counts {missing} rows without a result, but has {written.rowcount}")
    return missing


def _count_on_job(
    connection: Connection,
    job_id: str,
    *,
    succeeded: int = 0,
    failed: int = 0,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
) -> int:
    """Count new results on the job, which locks it until the commit, and return the newest cursor."""
    column = jobs.c
    counted = update(jobs).where(column.id == job_id)
    counted = counted.values(
        seq=column.seq + succeeded + failed,
        succeeded=column.succeeded + succeeded,
        failed=column.failed + failed,
        prompt_tokens=column.prompt_tokens + prompt_tokens,
        completion_tokens=column.completion_tokens + completion_tokens,
    )
    newest: int = connection.execute(counted.returning(column.seq)).scalar_one()
    return newest
