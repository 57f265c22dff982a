"""How does a worker take work, keep it, and hand results in? The one narrow interface between an agent and what is remembered.

Every verb is one transaction, guarded by the lease: a plan record's results and state can be written by the holder of its lease
only. Each verb may be repeated with the same arguments when its reply was lost; the store itself repeats one whose COMMIT got no
answer, and the repeated verb asks by lease id what has become of the first.
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ollm_service.core.capabilities import Capabilities, LiveState
from ollm_service.core.leasing import (
    Assignment,
    AttemptReport,
    LeaseLost,
    PlanClass,
    Recorded,
    Released,
    Renewal,
    RowError,
    RowResult,
)
from ollm_service.core.lifecycle import Event, ExecutionState
from ollm_service.core.requirements import Requirements
from ollm_service.core.retry import Failure, GiveUp, decide
from ollm_service.core.wire import to_json
from ollm_service.store import claiming, presence, reaping
from ollm_service.store.columns import as_text, now_ms
from ollm_service.store.engine import Database
from ollm_service.store.mapping import decoded_or_none, shown_columns
from ollm_service.store.tables import attempts, exclusions, plan_classes, runtime_plans
from ollm_service.store.transitions import end_attempt, end_early, event_of, lock_by_lease, move, write_results

# How long a failed node stays away once the retry is due: several idle polls (1-2 s) of every other worker.
EXCLUDED_AFTER_FAILURE_MS = 6_000
RUNNER_CRASHED = "runner_crashed"


class Leases:
    """The verbs. `draw` returns a random number in [0, 1) for the jitter of retries. `lease_ms` is the lease of a small fleet."""

    def __init__(self, database: Database, *, lease_ms: int, draw: Callable[[], float]) -> None:
        self._database, self.lease_ms, self._draw = database, lease_ms, draw

    # --- being there

    def register(self, worker_id: str, capabilities: Capabilities, live: LiveState, pid: int) -> None:
        """Make this worker known, or known again with other capabilities."""
        self._database.write(lambda connection: presence.register(connection, worker_id, capabilities, live, pid))

    def heartbeat(
        self, worker_id: str, live: LiveState, lease_ids: Collection[str], running: int, *, lease_ms: int | None = None
    ) -> Renewal:
        """Say that this worker is alive, and renew exactly these leases: those whose work is alive in it.

        They last `lease_ms` from now, or as long as they would have anyway.
        """
        asked_ms = lease_ms or self.lease_ms
        return self._database.write(
            lambda connection: presence.heartbeat(connection, worker_id, live, lease_ids, running, asked_ms)
        )

    def retire(self, worker_id: str) -> None:
        """This worker ends and holds nothing any more."""
        self._database.write(lambda connection: presence.retire(connection, worker_id))

    def new_classes(self, after_seq: int) -> tuple[PlanClass, ...]:
        """The classes numbered above `after_seq`, in the order in which they were committed; 0 for all."""
        columns = (plan_classes.c.class_id, plan_classes.c.seq, as_text(plan_classes.c.requirements))
        query = select(*columns).where(plan_classes.c.seq > after_seq).order_by(plan_classes.c.seq)
        rows = self._database.look(lambda connection: connection.execute(query).all())
        return tuple(
            PlanClass(class_id=row.class_id, seq=row.seq, requirements=decoded_or_none(Requirements, row.requirements))
            for row in rows
        )

    # --- taking work

    def claim(
        self,
        worker_id: str,
        lease_id: str,
        class_ids: Collection[str],
        *,
        warm: Collection[str] = (),
        lease_ms: int | None = None,
    ) -> Assignment | None:
        """Lease the best plan of these classes under `lease_id`, a new random UUID; None when there is none for this worker.

        A worker that is draining, unknown or gone gets nothing, and no plan whose exclusion names its node. `warm` are the
        classes for which nothing has to be loaded: their plans start with the claim. The lease lasts `lease_ms`.
        """
        if not class_ids:
            return None
        asked_ms = lease_ms or self.lease_ms

        def has_work(connection: Connection) -> bool:
            return bool(claiming.best_classes(connection, class_ids, worker_id))

        # On SQLite a look without the write lock, so that idle workers do not stand in the way of the one that writes.
        if self._database.is_sqlite and not self._database.read(has_work):
            return None
        try:
            return self._database.write(
                lambda connection: claiming.claim(connection, worker_id, lease_id, class_ids, asked_ms, warm=warm),
                recover=lambda connection: claiming.assignment_of(connection, lease_id),
            )
        except IntegrityError as error:  # the lease was used before: by this very claim, whose first COMMIT came late
            claimed = self.claimed(lease_id)
            if claimed is None:
                raise ValueError(f"the lease {lease_id} was used before") from error
            return claimed

    def claimed(self, lease_id: str) -> Assignment | None:
        """What this lease holds: asked when the reply to a claim was lost."""
        return self._database.read(lambda connection: claiming.assignment_of(connection, lease_id))

    def start(self, lease_id: str) -> bool:
        """The work begins. False: the lease is lost. Saying it twice changes nothing."""

        def work(connection: Connection) -> bool:
            plan = lock_by_lease(connection, lease_id)
            if plan is None:
                return False
            move(connection, plan, Event.START, kind="start", condition=None)
            return True

        return self._database.write(work)

    # --- handing results in

    def record(self, lease_id: str, results: Sequence[RowResult], report: AttemptReport | None = None) -> Recorded | LeaseLost:
        """Write results; rows that have one already are skipped. The last one ends the plan as succeeded.

        How an attempt really runs is settled by its report with its first row; later ones bring newer measurements. Raises
        ValueError for a row that is not the plan's.
        """

        def work(connection: Connection) -> Recorded | LeaseLost:
            plan = lock_by_lease(connection, lease_id)
            if plan is None:
                is_done = _ended_attempt(connection, lease_id, "record") is not None
                return Recorded(inserted=0, is_finished=True) if is_done else LeaseLost()
            inserted, failed = write_results(connection, plan, results)
            values = _progress(plan, inserted, failed)
            history: list[dict[str, Any]] = []
            told = {} if report is None else _told(plan, report)
            if report is not None and "runtime_plan" in told and inserted:
                shown, history = _show(plan, report, told["runtime_plan"])
                values |= shown
            is_finished = plan.rows_done + inserted == plan.row_count
            event, kind = (Event.FINISH, "finish") if is_finished else (Event.RECORD, "record")
            move(connection, plan, event, kind=kind, condition=None, history=history, **values)
            if is_finished:
                end_attempt(connection, plan, outcome=ExecutionState.SUCCEEDED.value, ended_by="record", **told)
            else:
                _keep(connection, plan, told)
            return Recorded(inserted=inserted, is_finished=is_finished)

        return self._database.write(work)

    # --- handing the plan back

    def fail(self, lease_id: str, failure: Failure, report: AttemptReport | None = None) -> Released | LeaseLost:
        """The attempt failed: tried again later and elsewhere, or given up; cancelled if its user asked for that."""

        def work(connection: Connection, plan: Row[Any]) -> str:
            if report is not None:
                _keep(connection, plan, _told(plan, report))
            failures, reason = plan.failures + 1, f"{failure.code}: {failure.message}"
            if plan.cancel_requested:
                return _end_cancelled(connection, plan, "fail")
            decision = decide(failure, failures, self._draw)
            if isinstance(decision, GiveUp):
                return end_early(connection, plan, Event.GIVE_UP, kind="fail", message=reason, failures=failures)
            wait_ms = decision.after_ms
            _exclude(connection, plan, wait_ms + EXCLUDED_AFTER_FAILURE_MS, is_decline=False, reason=reason)
            end_attempt(connection, plan, outcome="failed", ended_by="fail")
            return move(connection, plan, Event.REQUEUE, kind="fail", reason=reason, failures=failures, wait_ms=wait_ms)

        return self._hand_back(lease_id, "fail", work)

    def crash(self, lease_id: str, rows_in_flight: Sequence[int], reason: str) -> Released | LeaseLost:
        """The runner died while it worked on these rows; queued again at once, wiser.

        Several rows: the plan keeps half as many as its micro-batch limit. One row: the plan remembers it, and the second time
        the row gets the error `runner_crashed` and the others their whole micro-batch back. No rows: it died for another reason,
        which is a failure.
        """
        if not rows_in_flight:
            return self.fail(lease_id, Failure(code=RUNNER_CRASHED, message=reason))

        def work(connection: Connection, plan: Row[Any]) -> str:
            values: dict[str, Any] = {}
            lone, crashed_alone = rows_in_flight[0], json.loads(plan.lone_crashes)
            if len(rows_in_flight) > 1:
                most = min(len(rows_in_flight), plan.micro_batch_limit or len(rows_in_flight))
                values["micro_batch_limit"] = max(1, most // 2)
            elif lone not in crashed_alone:
                values["lone_crashes"] = [*crashed_alone, lone]
            else:
                error = RowError(code=RUNNER_CRASHED, message=f"The runner crashed twice on this row alone: {reason}")
                inserted, failed = write_results(connection, plan, [RowResult(row=lone, error=error)])
                # Every crash but the row's own may have been its doing; others that crash runners halve the limit again.
                values = _progress(plan, inserted, failed) | ({"micro_batch_limit": None} if inserted else {})
            if values.get("rows_done") == plan.row_count:
                end_attempt(connection, plan, outcome=ExecutionState.SUCCEEDED.value, ended_by="crash")
                return move(connection, plan, Event.FINISH, kind="finish", reason=reason, **values)
            if plan.cancel_requested:
                _store(connection, plan, values)
                changed = lock_by_lease(connection, lease_id)
                assert changed is not None, "this transaction holds the plan's lock"
                return _end_cancelled(connection, changed, "crash")
            end_attempt(connection, plan, outcome="crashed", ended_by="crash")
            return move(connection, plan, Event.REQUEUE, kind="crash", reason=reason, **values)

        return self._hand_back(lease_id, "crash", work)

    def release(self, lease_id: str, *, reason: str, decline_ms: int | None = None) -> Released | LeaseLost:
        """Hand the plan back unharmed: nothing is burned. With `decline_ms` its node does not get it again for that long."""
        kind = "release" if decline_ms is None else "decline"

        def work(connection: Connection, plan: Row[Any]) -> str:
            if plan.cancel_requested:
                return _end_cancelled(connection, plan, kind)
            declines = plan.declines
            if decline_ms is not None:
                declines += 1
                _exclude(connection, plan, decline_ms, is_decline=True, reason=reason)
            end_attempt(connection, plan, outcome="released" if decline_ms is None else "declined", ended_by=kind)
            return move(connection, plan, Event.REQUEUE, kind=kind, reason=reason, declines=declines)

        return self._hand_back(lease_id, kind, work)

    def _hand_back(self, lease_id: str, verb: str, work: Callable[[Connection, Row[Any]], str]) -> Released | LeaseLost:
        def guarded(connection: Connection) -> Released | LeaseLost:
            plan = lock_by_lease(connection, lease_id)
            if plan is not None:
                return Released(state=work(connection, plan))
            state = _ended_attempt(connection, lease_id, verb)
            return LeaseLost() if state is None else Released(state=state)

        return self._database.write(guarded)

    # --- what the coordinators do about leases

    def reap(self, limit: int = 100) -> int:
        """Requeue (or end) the plans whose leases ran out, and count out workers that fell silent; how many plans."""
        return reaping.reap(self._database, lease_ms=self.lease_ms, limit=limit)

    def expire(self, limit: int = 100) -> int:
        """End the plans whose deadline has passed; how many."""
        return reaping.expire(self._database, limit=limit)

    def hold_off_reaping(self) -> bool:
        """After an outage: let one full lease pass before anything is reaped, so that workers can renew first.

        Shared by all coordinators. Granted at most once in a minute (or two leases, if that is longer); says whether it was.
        """
        return reaping.hold_off(self._database, lease_ms=self.lease_ms)


_KEEP_REPORT = update(attempts).where(attempts.c.plan_id == bindparam("plan"), attempts.c.number == bindparam("attempt"))


def _told(plan: Row[Any], report: AttemptReport) -> dict[str, Any]:
    """The attempt's columns for what it tells of itself: how it runs only until it has recorded a row, which settles that."""
    told: dict[str, Any] = {"measured": dict(report.measured)}
    if plan.finalized_by != plan.attempt:
        told |= {"runtime_plan": to_json(report.runtime_plan), "placement": dict(report.placement)}
    return told


def _keep(connection: Connection, plan: Row[Any], told: dict[str, Any]) -> None:
    if told:
        connection.execute(_KEEP_REPORT, {"plan": plan.id, "attempt": plan.attempt, **told})


def _show(plan: Row[Any], report: AttemptReport, finalized: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The plan's columns and the event that show how its newest attempt really runs."""
    ran = report.runtime_plan
    before, after = plan.specialization_state, ran.specialization_state.value
    reason = ran.fallback_reason or ran.reason
    events = [event_of(plan, after, from_state=before, to_state=after, reason=reason)] if after != before else []
    return {"finalized": finalized, "finalized_by": plan.attempt, **shown_columns(ran)}, events


def _progress(plan: Row[Any], inserted: int, failed: int) -> dict[str, Any]:
    """The plan's columns after new rows; only a new row makes its failures and losses forgotten."""
    if not inserted:
        return {}
    done = {"rows_done": plan.rows_done + inserted, "rows_failed": plan.rows_failed + failed}
    return done | {"failures": 0, "losses": 0}


def _store(connection: Connection, plan: Row[Any], values: dict[str, Any]) -> None:
    if values:
        connection.execute(update(runtime_plans).where(runtime_plans.c.id == plan.id).values(**values))


def _end_cancelled(connection: Connection, plan: Row[Any], verb: str) -> str:
    return end_early(connection, plan, Event.CANCEL, kind=verb, message="The job was cancelled.")


def _exclude(connection: Connection, plan: Row[Any], for_ms: int, *, is_decline: bool, reason: str) -> None:
    here = (exclusions.c.plan_id == plan.id) & (exclusions.c.node == plan.worker_node)
    connection.execute(delete(exclusions).where(here))
    values = {"plan_id": plan.id, "node": plan.worker_node, "is_decline": is_decline, "reason": reason}
    connection.execute(insert(exclusions).values(until_ms=now_ms() + for_ms, **values))


def _ended_attempt(connection: Connection, lease_id: str, verb: str) -> str | None:
    """The plan's state, if this verb has ended the lease already: its first reply was lost."""
    query = (
        select(runtime_plans.c.state)
        .join_from(attempts, runtime_plans, runtime_plans.c.id == attempts.c.plan_id)
        .where(attempts.c.lease_id == lease_id, attempts.c.ended_by == verb)
    )
    return connection.execute(query).scalar_one_or_none()
