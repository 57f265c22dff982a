"""What do users ask of jobs and plans: submit, look, cancel; and what do coordinators change of those that wait?"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Update, case, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from ollm_service.core.errors import IdempotencyConflict, InvalidJob, NotFound, ServiceError
from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import FINAL_STATES, Event, ExecutionState
from ollm_service.core.plan import PLAN_SCHEMA_VERSION, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, class_id
from ollm_service.core.wire import to_json
from ollm_service.store.amending import Amended, Amendment, amend
from ollm_service.store.columns import as_text, now_ms, undecoded
from ollm_service.store.engine import Database
from ollm_service.store.mapping import attempt_view, event_view, job_view, plan_view_if_readable, shown_columns
from ollm_service.store.submission import NewJob, NewPlan, NewRow, ensure_classes, insert_job
from ollm_service.store.tables import attempts, exclusions, job_rows, jobs, plan_classes, plan_events, results, runtime_plans
from ollm_service.store.transitions import LIGHT_COLUMNS, append_event, end_early, lock_by_id
from ollm_service.store.views import JobView, PlanDetail, PlanView, UnreadablePlan, WaitingPlans
from ollm_service.store.waiting import longest_rows, rows_left, waiting_plans

__all__ = ["Jobs", "NewJob", "NewPlan", "NewRow"]

NO_CAPABLE_WORKER = "no-capable-worker"
DECLINED_EVERYWHERE = "declined-everywhere"
MODEL_NOT_PRESENT = "model-not-present"
# A decline counts for its plan's condition for this long after it ended, so that the condition does not flicker between polls.
_DECLINE_COUNTS_MS = 30_000
_PLAN = runtime_plans.c
_JOBS = select(*undecoded(jobs.c))


class Jobs:
    """Jobs and their plan records."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- submission

    def submit(self, job: NewJob) -> tuple[JobView, bool]:
        """Store the job with its rows, plans and events in one transaction; false: this idempotency key has it already.

        Raises IdempotencyConflict for the same key with another body, InvalidJob for an id that is taken.
        """

        def known(connection: Connection) -> tuple[JobView, bool] | None:
            by_id = _job_or_none(connection, job.job_id, job.tenant_id)
            return None if by_id is None else (by_id, True)

        def work(connection: Connection) -> tuple[JobView, bool]:
            return insert_job(connection, job), True

        try:
            return self._database.write(work, recover=known)
        except IntegrityError as error:
            key = job.idempotency_key
            old = None if key is None else self.find_idempotent(job.tenant_id, key, job.body_digest)
            if old is None:
                raise InvalidJob(f"The job {job.job_id} or one of its plans exists already.") from error
            return old, False

    def find_idempotent(self, tenant_id: str, key: str, body_digest: str) -> JobView | None:
        """The job that this key has made. Raises IdempotencyConflict if that was with another body."""

        query = select(jobs.c.id, jobs.c.body_digest).where(jobs.c.tenant_id == tenant_id, jobs.c.idempotency_key == key)
        found = self._database.look(lambda connection: connection.execute(query).one_or_none())
        if found is None:
            return None
        if found.body_digest != body_digest:
            raise IdempotencyConflict(
                f"The idempotency key was used for job {found.id} with another body.", param="idempotency_key"
            )
        return self.get(found.id, tenant_id)

    # --- looking

    def get(self, job_id: str, tenant_id: str) -> JobView:
        """One job. Raises NotFound, for another tenant's job, too."""
        return self._database.read(lambda connection: _job(connection, job_id, tenant_id))

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 50) -> Sequence[JobView]:
        """The newest jobs first, from behind the job `after`. Raises NotFound when that one is not there."""

        def work(connection: Connection) -> Sequence[JobView]:
            query = _JOBS.where(jobs.c.tenant_id == tenant_id)
            if after is not None:
                last = _job(connection, after, tenant_id)
                older = (jobs.c.created_ms == last.created_ms) & (jobs.c.id < after)
                query = query.where((jobs.c.created_ms < last.created_ms) | older)
            return _job_views(connection, query.order_by(jobs.c.created_ms.desc(), jobs.c.id.desc()).limit(limit))

        return self._database.read(work)

    def plans(self, job_id: str, tenant_id: str, *, after: str | None = None, limit: int = 100) -> Sequence[PlanView]:
        """A job's plans in order, from behind the plan `after`. Raises NotFound for the job or that plan."""
        return self.list_plans(tenant_id, job_id=job_id, after=after, limit=limit)

    def list_plans(
        self,
        tenant_id: str,
        *,
        job_id: str | None = None,
        state: ExecutionState | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Sequence[PlanView]:
        """Plans of the newest jobs first, each job's in order, from behind the plan `after`, whatever state that is in now.

        Of one job, in one state, or all of them; those that cannot be decoded are left out. Raises NotFound for the job or the
        plan `after`.
        """
        # By way of the jobs, whose index is in this order: nothing but one job's plans is ever sorted.
        query = _plans().join(jobs, jobs.c.id == _PLAN.job_id).where(jobs.c.tenant_id == tenant_id)
        query = query.order_by(jobs.c.created_ms.desc(), jobs.c.id.desc(), _PLAN.number)
        if job_id is not None:
            query = query.where(jobs.c.id == job_id)
        if state is not None:
            query = query.where(_PLAN.state == state.value)

        def work(connection: Connection) -> Sequence[PlanView]:
            if job_id is not None:
                _require_job(connection, job_id, tenant_id)
            found: list[PlanView] = []
            last, is_end = after, False
            while len(found) < limit and not is_end:
                page = query if last is None else query.where(_comes_after(connection, last, tenant_id, job_id))
                wanted = limit - len(found)
                views = [plan_view_if_readable(row) for row in connection.execute(page.limit(wanted))]
                found += [view for view in views if isinstance(view, PlanView)]
                is_end = len(views) < wanted
                last = views[-1].plan_id if views else last
            return found

        return self._database.read(work)

    def plan(self, plan_id: str, tenant_id: str) -> PlanDetail:
        """One plan with its events and attempts. Raises NotFound, and ServiceError for one that cannot be decoded."""

        def work(connection: Connection) -> PlanDetail:
            row = connection.execute(_plans().where(_PLAN.id == plan_id, _PLAN.tenant_id == tenant_id)).one_or_none()
            if row is None:
                raise NotFound(f"There is no plan {plan_id}.")
            view = plan_view_if_readable(row)
            if isinstance(view, UnreadablePlan):
                raise ServiceError(f"The stored plan {plan_id} cannot be read ({view.error}).")
            events = select(plan_events).where(plan_events.c.plan_id == plan_id).order_by(plan_events.c.id)
            tries = select(attempts).where(attempts.c.plan_id == plan_id).order_by(attempts.c.number)
            return PlanDetail(
                plan=view,
                events=tuple(event_view(event) for event in connection.execute(events)),
                attempts=tuple(attempt_view(attempt) for attempt in connection.execute(tries)),
            )

        return self._database.read(work)

    def failed_rows(self, job_id: str, tenant_id: str) -> Sequence[NewRow]:
        """The rows of a job whose result is an error, as they were submitted, with that error. Raises NotFound."""

        def work(connection: Connection) -> Sequence[NewRow]:
            _require_job(connection, job_id, tenant_id)
            same = (results.c.job_id == job_rows.c.job_id) & (results.c.row == job_rows.c.row)
            query = select(job_rows, results.c.error_code, results.c.error_message).join_from(job_rows, results, same)
            query = query.where(job_rows.c.job_id == job_id, results.c.error_code.is_not(None)).order_by(job_rows.c.row)
            return [
                NewRow(
                    row=row.row,
                    custom_id=row.custom_id,
                    request=row.request,
                    error=RowError(code=row.error_code, message=row.error_message or ""),
                )
                for row in connection.execute(query)
            ]

        return self._database.read(work)

    def waiting(self, job_id: str, tenant_id: str) -> Sequence[WaitingPlans]:
        """A job's queued plans, those together that ask for the same. Raises NotFound."""

        def work(connection: Connection) -> Sequence[WaitingPlans]:
            _require_job(connection, job_id, tenant_id)
            return waiting_plans(connection, job_id)

        return self._database.read(work)

    def longest_rows(self, plan_ids: Sequence[str], *, offset: int = 0, limit: int = 1000) -> Sequence[tuple[NewRow, int]]:
        """Rows of these plans without a result, and the bytes of each as stored; a page of them.

        First those with an output limit of their own, then the longest.
        """
        return self._database.read(lambda connection: longest_rows(connection, plan_ids, offset=offset, limit=limit))

    def rows_left(self, job_id: str) -> Mapping[ExecutionState, int]:
        """How many of a job's rows without a result are in plans of each state that is not final."""
        return self._database.read(lambda connection: rows_left(connection, job_id))

    # --- cancelling

    def cancel(self, job_id: str, tenant_id: str) -> JobView:
        """Stop the job: plans that wait end at once, the others at their holder's next renewal; final ones stay as they are.

        Raises NotFound.
        """

        def work(connection: Connection) -> JobView:
            _require_job(connection, job_id, tenant_id)
            unfinished = select(*LIGHT_COLUMNS).where(_PLAN.job_id == job_id, _PLAN.state.not_in(FINAL_STATES))
            for plan in connection.execute(unfinished.order_by(_PLAN.id).with_for_update(key_share=True)).all():
                if plan.state == ExecutionState.QUEUED:
                    end_early(connection, plan, Event.CANCEL, kind="cancel", message="The job was cancelled.")
                elif not plan.cancel_requested:
                    flagged = update(runtime_plans).where(_PLAN.id == plan.id).values(cancel_requested=True)
                    connection.execute(flagged)
                    append_event(connection, plan, "cancel-requested", from_state=plan.state, to_state=plan.state)
            return _job(connection, job_id, tenant_id)

        return self._database.write(work)

    # --- amending

    def amend(
        self, job_id: str, tenant_id: str, amendment: Amendment | None, *, skip: Collection[int] = ()
    ) -> tuple[JobView, Amended]:
        """Give a job's queued plans other options, and answer these rows of theirs with the error `skipped`.

        Plans that are held or final stay as they are. Raises NotFound, and Conflict where somebody else amended the job since
        `amendment.before` was read; then nothing is changed.
        """

        def work(connection: Connection) -> tuple[JobView, Amended]:
            amended = amend(connection, job_id, tenant_id, amendment, skip)
            return _job(connection, job_id, tenant_id), amended

        return self._database.write(work)

    # --- what coordinators change of plans that wait

    def stale_plans(self, inventory_seq: int, limit: int = 100) -> Sequence[PlanView | UnreadablePlan]:
        """Queued plans that were planned against an older inventory."""
        query = _plans().where(_PLAN.state == ExecutionState.QUEUED.value, _PLAN.inventory_seq < inventory_seq)
        query = query.order_by(_PLAN.inventory_seq, _PLAN.id).limit(limit)
        return self._database.read(lambda connection: [plan_view_if_readable(row) for row in connection.execute(query)])

    def replan(
        self,
        plan_id: str,
        *,
        runtime_plan: RuntimePlan,
        profile: ModelProfile | None,
        requirements: Requirements,
        inventory_seq: int,
        condition: str | None = None,
    ) -> bool:
        """Replace how a plan is intended to run; false when it is no longer queued or was planned against a newer inventory."""

        def work(connection: Connection) -> bool:
            plan = lock_by_id(connection, plan_id)
            if plan is None or plan.state != ExecutionState.QUEUED or plan.inventory_seq >= inventory_seq:
                return False
            name = class_id(requirements)
            values: dict[str, Any] = {
                "planned": to_json(runtime_plan),
                "schema_version": PLAN_SCHEMA_VERSION,
                "profile": None if profile is None else to_json(profile),
                "class_id": name,
                "inventory_seq": inventory_seq,
                "condition": condition,
            }
            if plan.finalized_by is None:  # no attempt has shown how it really ran
                values |= shown_columns(runtime_plan)
            connection.execute(update(runtime_plans).where(_PLAN.id == plan_id).values(**values))
            if name != plan.class_id:
                reason = "the fleet's models changed"
                append_event(connection, plan, "replan", from_state=plan.state, to_state=plan.state, reason=reason)
                ensure_classes(connection, [requirements])
            return True

        return self._database.write(work)

    def mark_planned(self, plan_ids: Sequence[str], inventory_seq: int) -> int:
        """These queued plans would be planned the same again: note the inventory that this is true for; how many."""
        same = _change_idle(_PLAN.id.in_(plan_ids), _PLAN.inventory_seq < inventory_seq).values(inventory_seq=inventory_seq)
        return self._database.write(lambda connection: connection.execute(same).rowcount)

    def set_condition(self, plan_id: str, condition: str | None) -> bool:
        """Note why a queued plan does not move; false when it is no longer queued or says so already."""
        waiting = update(runtime_plans).where(
            _PLAN.id == plan_id, _PLAN.state == ExecutionState.QUEUED.value, _PLAN.condition.is_distinct_from(condition)
        )
        changed = waiting.values(condition=condition)
        return self._database.write(lambda connection: connection.execute(changed).rowcount) > 0

    def refresh_conditions(self, class_: str, capable_nodes: Collection[str], *, absent: str = NO_CAPABLE_WORKER) -> int:
        """Set the condition of every queued plan of a class at once; how many changed.

        `capable_nodes` are the nodes of active workers that satisfy the class. Without any the condition is `absent`; a plan that
        all of them have declined lately is `declined-everywhere`; any other has none.
        """
        if capable_nodes:
            declined = select(func.count()).where(
                exclusions.c.plan_id == _PLAN.id,
                exclusions.c.node.in_(capable_nodes),
                exclusions.c.is_decline,
                exclusions.c.until_ms > now_ms() - _DECLINE_COUNTS_MS,
            )
            everywhere = declined.correlate(runtime_plans).scalar_subquery() >= len(set(capable_nodes))
            condition: Any = case((everywhere, DECLINED_EVERYWHERE))
        else:
            condition = absent
        changed = _change_idle(_PLAN.class_id == class_, _PLAN.condition.is_distinct_from(condition)).values(condition=condition)
        return self._database.write(lambda connection: connection.execute(changed).rowcount)


def _change_idle(*conditions: ColumnElement[bool]) -> Update:
    """A change of every queued plan of which this is true and that nobody else is changing.

    It waits for no plan, so that it cannot be in the way of those who lock plans by id; a later turn changes what it left out.
    """
    idle = select(_PLAN.id).where(_PLAN.state == ExecutionState.QUEUED.value, *conditions).order_by(_PLAN.id)
    locked = idle.with_for_update(key_share=True, skip_locked=True)
    return update(runtime_plans).where(_PLAN.id.in_(locked.correlate(None)))


def _plans() -> Select[Any]:
    same_class = plan_classes.c.class_id == _PLAN.class_id
    return select(*undecoded(_PLAN), as_text(plan_classes.c.requirements)).join_from(runtime_plans, plan_classes, same_class)


def _comes_after(connection: Connection, plan_id: str, tenant_id: str, job_id: str | None) -> ColumnElement[bool]:
    """Whether a plan comes later in the list than this one. Raises NotFound when that one is not in the list."""
    query = select(_PLAN.number, jobs.c.id, jobs.c.created_ms).join_from(runtime_plans, jobs, jobs.c.id == _PLAN.job_id)
    last = connection.execute(query.where(_PLAN.id == plan_id, jobs.c.tenant_id == tenant_id)).one_or_none()
    if last is None or job_id not in (None, last.id):
        raise NotFound(f"There is no plan {plan_id}" + (f" in job {job_id}." if job_id else "."), param="after")
    same_job = (jobs.c.id == last.id) & (_PLAN.number > last.number)
    same_moment = (jobs.c.created_ms == last.created_ms) & ((jobs.c.id < last.id) | same_job)
    return or_(jobs.c.created_ms < last.created_ms, same_moment)


def _require_job(connection: Connection, job_id: str, tenant_id: str) -> None:
    query = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)
    if connection.execute(query).one_or_none() is None:
        raise NotFound(f"There is no job {job_id}.")


def _job(connection: Connection, job_id: str, tenant_id: str) -> JobView:
    found = _job_or_none(connection, job_id, tenant_id)
    if found is None:
        raise NotFound(f"There is no job {job_id}.")
    return found


def _job_or_none(connection: Connection, job_id: str, tenant_id: str) -> JobView | None:
    found = _job_views(connection, _JOBS.where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id))
    return found[0] if found else None


def _job_views(connection: Connection, query: Select[Any]) -> list[JobView]:
    rows = connection.execute(query).all()
    states: dict[str, dict[str, int]] = {row.id: {} for row in rows}
    finished: dict[str, int | None] = {}
    counted = select(_PLAN.job_id, _PLAN.state, func.count().label("plans"), func.max(_PLAN.finished_ms).label("finished_ms"))
    counted = counted.where(_PLAN.job_id.in_(states)).group_by(_PLAN.job_id, _PLAN.state)
    for group in connection.execute(counted):
        states[group.job_id][group.state] = group.plans
        finished[group.job_id] = max(filter(None, (finished.get(group.job_id), group.finished_ms)), default=None)
    return [job_view(row, states[row.id], finished.get(row.id)) for row in rows]
