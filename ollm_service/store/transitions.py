"""How does a plan record change its state? Every change goes through here: the table decides, and an event tells of it.

The caller holds the plan's lock (and takes the job's after it). FOR NO KEY UPDATE is enough, and does not block the foreign keys
of concurrent inserts.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, bindparam, func, insert, literal, select, update

from ollm_service.core.leasing import RowResult
from ollm_service.core.lifecycle import HELD_STATES, Event, ExecutionState, step
from ollm_service.store.columns import now_ms, undecoded
from ollm_service.store.tables import attempts, job_rows, jobs, plan_events, results, runtime_plans

_HEAVY = {"planned", "finalized", "profile", "config"}
# Nothing is decoded: whoever ends or moves a plan can do so though it cannot be read.
LIGHT_COLUMNS = undecoded(column for column in runtime_plans.c if column.name not in _HEAVY)
INSERT_BATCH = 1_000

# Statements are built once: at a few hundred plans per second, building them anew costs more than the database does.
_PLAN = runtime_plans.c
_LOCK = select(*LIGHT_COLUMNS).with_for_update(key_share=True)
_LOCK_BY_LEASE = _LOCK.where(_PLAN.lease_id == bindparam("lease"), _PLAN.state.in_(HELD_STATES))
_LOCK_BY_ID = _LOCK.where(_PLAN.id == bindparam("plan"))
_MOVE = update(runtime_plans).where(_PLAN.id == bindparam("plan"), _PLAN.state == bindparam("before"))
_MOVE_TO_HELD = _MOVE.values(started_ms=func.coalesce(_PLAN.started_ms, now_ms()))
_MOVE_TO_QUEUED = _MOVE.values(queued_ms=now_ms(), available_ms=now_ms() + bindparam("wait", type_=BigInteger))
_MOVE_TO_END = _MOVE.values(finished_ms=now_ms())
_APPEND = insert(plan_events).values(at_ms=now_ms())
_END_ATTEMPT = update(attempts).where(
    attempts.c.plan_id == bindparam("plan"), attempts.c.number == bindparam("attempt"), attempts.c.ended_ms.is_(None)
)
_END_ATTEMPT = _END_ATTEMPT.values(ended_ms=now_ms())
_HAS_RESULT = (results.c.job_id == job_rows.c.job_id) & (results.c.row == job_rows.c.row)
_KNOWN_ROWS = (
    select(job_rows.c.row, results.c.seq)
    .join_from(job_rows, results, _HAS_RESULT, isouter=True)
    .where(job_rows.c.plan_id == bindparam("plan"), job_rows.c.row.in_(bindparam("rows", expanding=True)))
)
_COUNT = (
    update(jobs)
    .where(jobs.c.id == bindparam("job"))
    .values(
        seq=jobs.c.seq + bindparam("new"),
        succeeded=jobs.c.succeeded + bindparam("new") - bindparam("wrong"),
        failed=jobs.c.failed + bindparam("wrong"),
        prompt_tokens=jobs.c.prompt_tokens + bindparam("prompt"),
        completion_tokens=jobs.c.completion_tokens + bindparam("completion"),
    )
    .returning(jobs.c.seq)
)
_INSERT_RESULTS = insert(results).values(created_ms=now_ms())


def lock_by_lease(connection: Connection, lease_id: str) -> Row[Any] | None:
    """The plan that this lease holds, locked; None when the lease holds nothing (any more). The guard of every worker's write."""
    return connection.execute(_LOCK_BY_LEASE, {"lease": lease_id}).one_or_none()


def lock_by_id(connection: Connection, plan_id: str) -> Row[Any] | None:
    """The plan record, locked."""
    return connection.execute(_LOCK_BY_ID, {"plan": plan_id}).one_or_none()


def move(
    connection: Connection,
    plan: Row[Any],
    event: Event,
    *,
    kind: str,
    reason: str | None = None,
    wait_ms: int = 0,
    history: Sequence[dict[str, Any]] = (),
    **values: Any,
) -> str:
    """Move a locked plan by an event of the table and append it to the history, behind the events in `history`.

    `values` are other columns to set; a requeued plan is available after `wait_ms`. Returns the new state. Raises
    IllegalTransition where the table has no row.
    """
    before = ExecutionState(plan.state)
    after = step(before, event)
    values |= {"state": after.value, "reason": reason, "plan": plan.id, "before": before.value}
    if before.is_held and not after.is_held:
        values |= {"lease_id": None, "lease_expires_ms": None}
    statement = _MOVE_TO_HELD
    if after is ExecutionState.QUEUED:
        statement = _MOVE_TO_QUEUED
        values |= {"worker_id": None, "worker_node": None, "wait": wait_ms}
    elif after.is_final:
        statement = _MOVE_TO_END
        values |= {"cancel_requested": False}
    connection.execute(statement, values)
    events = list(history)
    if after is not before:
        events.append(event_of(plan, kind, from_state=before, to_state=after, reason=reason))
    if events:
        append_events(connection, events)
    return after.value


def event_of(
    plan: Row[Any], kind: str, *, from_state: str | None, to_state: str | None, reason: str | None = None
) -> dict[str, Any]:
    """One line of a plan's history, to be appended."""
    return {
        "tenant_id": plan.tenant_id,
        "job_id": plan.job_id,
        "plan_id": plan.id,
        "kind": kind,
        "from_state": from_state,
        "to_state": to_state,
        "worker_id": plan.worker_id,
        "worker_node": plan.worker_node,
        "reason": reason,
    }


def append_event(
    connection: Connection, plan: Row[Any], kind: str, *, from_state: str | None, to_state: str | None, reason: str | None = None
) -> None:
    """Append one line to a plan's history, at the database's time."""
    append_events(connection, [event_of(plan, kind, from_state=from_state, to_state=to_state, reason=reason)])


def append_events(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Append lines made by `event_of`, at the database's time."""
    # One alone not as a list: PostgreSQL's driver makes several round trips of a list.
    connection.execute(_APPEND, events[0] if len(events) == 1 else list(events))


def end_attempt(connection: Connection, plan: Row[Any], *, outcome: str, ended_by: str, **values: Any) -> None:
    """Close the running attempt of a plan that leaves its holder, and set `values` on it."""
    values |= {"plan": plan.id, "attempt": plan.attempt, "outcome": outcome, "ended_by": ended_by}
    connection.execute(_END_ATTEMPT, values)


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
    known = connection.execute(_KNOWN_ROWS, {"plan": plan.id, "rows": list(wanted)}).all() if wanted else []
    if len(known) != len(wanted):
        raise ValueError(f"plan {plan.id} has no such rows: {sorted(set(wanted) - {row.row for row in known})}")
    fresh = sorted((wanted[row.row] for row in known if row.seq is None), key=lambda answer: answer.row)
    if not fresh:
        return 0, 0
    failed = sum(answer.error is not None for answer in fresh)
    newest = _count_on_job(
        connection,
        plan.job_id,
        new=len(fresh),
        wrong=failed,
        prompt=sum(answer.prompt_tokens for answer in fresh),
        completion=sum(answer.completion_tokens for answer in fresh),
    )
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
        }
        for seq, answer in enumerate(fresh, start=newest - len(fresh) + 1)
    ]
    for start in range(0, len(rows), INSERT_BATCH):
        batch = rows[start : start + INSERT_BATCH]
        connection.execute(_INSERT_RESULTS, batch[0] if len(batch) == 1 else batch)
    return len(fresh), failed


def write_errors(connection: Connection, plan: Row[Any], *, code: str, message: str) -> int:
    """Give every row of a locked plan that has no result this error; returns how many there were."""
    missing: int = plan.row_count - plan.rows_done
    if not missing:
        return 0
    newest = _count_on_job(connection, plan.job_id, new=missing, wrong=missing)
    has_result = select(results.c.row).where(_HAS_RESULT)
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


def _count_on_job(connection: Connection, job_id: str, *, new: int, wrong: int, prompt: int = 0, completion: int = 0) -> int:
    """Count new results on the job, which locks it until the commit, and return the newest cursor."""
    values = {"job": job_id, "new": new, "wrong": wrong, "prompt": prompt, "completion": completion}
    newest: int = connection.execute(_COUNT, values).scalar_one()
    return newest
