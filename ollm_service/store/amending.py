"""How do the plans of a job that still wait get other options? In one transaction, which touches no plan that somebody holds.

Plans are locked by id and the job after them, like everywhere. Whatever is amended already stays as it is, so that an amendment
whose reply was lost can be made again.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, select, update

from ollm_service.core.errors import Conflict, NotFound
from ollm_service.core.leasing import RowError, RowResult
from ollm_service.core.lifecycle import FINAL_STATES, Event, ExecutionState
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import PLAN_SCHEMA_VERSION, RuntimePlan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements, class_id
from ollm_service.core.wire import from_json, to_json
from ollm_service.store.columns import as_text, now_ms
from ollm_service.store.mapping import shown_columns
from ollm_service.store.submission import ensure_classes
from ollm_service.store.tables import exclusions, job_rows, jobs, runtime_plans
from ollm_service.store.transitions import LIGHT_COLUMNS, append_events, event_of, move, write_results

SKIPPED = "skipped"
_PLAN = runtime_plans.c
_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What decides how the plans of a job run."""

    config: RuntimeConfig
    where: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """Options that take the place of those that the job had, and what follows from them for its plans.

    `runtime_plan` and what stands below it are as of a fresh plan with these options. `reason` tells people what was changed.
    """

    before: Options
    after: Options
    runtime_plan: RuntimePlan
    profile: ModelProfile | None
    requirements: Requirements
    condition: str | None
    inventory_seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Amended:
    """How many plans wait with the new options now, how many unfinished ones keep the old, and how many rows were skipped."""

    plans: int
    plans_kept: int
    rows_skipped: int


def amend(connection: Connection, job_id: str, tenant_id: str, amendment: Amendment | None, skip: Collection[int]) -> Amended:
    """Change a job's queued plans, and answer these rows of theirs with the error `skipped`.

    Raises NotFound, and Conflict where the job has other options than `before` by now.
    """
    job = connection.execute(select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)).one_or_none()
    if job is None:
        raise NotFound(f"There is no job {job_id}.")
    wanted: Select[Any] = select(*LIGHT_COLUMNS, as_text(_PLAN.config), as_text(_PLAN.profile))
    wanted = wanted.where(_PLAN.job_id == job_id, _PLAN.state.not_in(FINAL_STATES))
    unfinished = connection.execute(wanted.order_by(_PLAN.id).with_for_update(key_share=True)).all()
    waiting = [plan for plan in unfinished if plan.state == ExecutionState.QUEUED and not plan.cancel_requested]
    skipped, ended = _skip(connection, job_id, waiting, skip)
    left = [plan for plan in waiting if plan.id not in ended]
    amended = [plan for plan in left if _may_change(plan, amendment)] if amendment else []
    if amendment is not None and amended:
        _change(connection, amended, amendment)
        _change_job(connection, job_id, amendment)
        # Last, since a new class keeps the counter locked until the commit.
        ensure_classes(connection, [amendment.requirements])
    return Amended(plans=len(amended), plans_kept=len(unfinished) - len(ended) - len(amended), rows_skipped=skipped)


def _may_change(plan: Row[Any], amendment: Amendment) -> bool:
    """One model answers all rows of a plan: once a row is recorded, its weights are settled."""
    if plan.rows_done == plan.rows_failed:
        return True
    had = None if plan.profile is None else json.loads(plan.profile).get("digest")
    return had == (None if amendment.profile is None else amendment.profile.digest)


def _change(connection: Connection, plans: Sequence[Row[Any]], amendment: Amendment) -> None:
    name, config = class_id(amendment.requirements), to_json(amendment.after.config)
    changed = [plan for plan in plans if plan.class_id != name or json.loads(plan.config) != config]
    values: dict[str, Any] = {
        "planned": to_json(amendment.runtime_plan),
        "schema_version": PLAN_SCHEMA_VERSION,
        "profile": None if amendment.profile is None else to_json(amendment.profile),
        "config": config,
        "class_id": name,
        "inventory_seq": amendment.inventory_seq,
        "condition": amendment.condition,
        "available_ms": now_ms(),  # what it backed off from may not happen with these options
    }
    untried = [plan.id for plan in changed if plan.finalized_by is None]
    _update_all(connection, [plan.id for plan in changed], values)
    _update_all(connection, untried, shown_columns(amendment.runtime_plan))  # of the others, an attempt has shown how they ran
    for some in _slices([plan.id for plan in changed]):
        connection.execute(delete(exclusions).where(exclusions.c.plan_id.in_(some), exclusions.c.is_decline))
    events = [event_of(plan, "amend", from_state=plan.state, to_state=plan.state, reason=amendment.reason) for plan in changed]
    for start in range(0, len(events), _AT_ONCE):
        append_events(connection, events[start : start + _AT_ONCE])


def _change_job(connection: Connection, job_id: str, amendment: Amendment) -> None:
    job = connection.execute(select(jobs.c.config, jobs.c.where_clause).where(jobs.c.id == job_id).with_for_update()).one()
    has = Options(config=from_json(RuntimeConfig, job.config), where=job.where_clause)
    if has not in (amendment.before, amendment.after):
        raise Conflict(f"The options of job {job_id} were changed meanwhile.", remedy="Look at the job, and amend it again.")
    values = {"config": to_json(amendment.after.config), "where_clause": amendment.after.where}
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))


def _skip(connection: Connection, job_id: str, waiting: Sequence[Row[Any]], rows: Collection[int]) -> tuple[int, frozenset[str]]:
    """Answer rows of plans that wait: how many, and the plans that this ended."""
    by_plan = _rows_by_plan(connection, job_id, rows)
    skipped, ended = 0, set()
    for plan in waiting:
        error = RowError(code=SKIPPED, message="The row was skipped at its user's wish.")
        answers = [RowResult(row=row, error=error) for row in by_plan.get(plan.id, ())]
        new, _ = write_results(connection, plan, answers) if answers else (0, 0)
        if not new:
            continue
        done = {"rows_done": plan.rows_done + new, "rows_failed": plan.rows_failed + new}
        if done["rows_done"] == plan.row_count:
            move(connection, plan, Event.FINISH, kind="skip", reason="its last rows were skipped", **done)
            ended.add(plan.id)
        else:
            connection.execute(update(runtime_plans).where(_PLAN.id == plan.id).values(**done))
            reason = f"{new} rows were skipped"
            append_events(connection, [event_of(plan, "skip", from_state=plan.state, to_state=plan.state, reason=reason)])
        skipped += new
    return skipped, frozenset(ended)


def _rows_by_plan(connection: Connection, job_id: str, rows: Collection[int]) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for some in _slices(sorted(set(rows))):
        query = select(job_rows.c.plan_id, job_rows.c.row).where(job_rows.c.job_id == job_id, job_rows.c.row.in_(some))
        for row in connection.execute(query):
            found[row.plan_id].append(row.row)
    return found


def _update_all(connection: Connection, plan_ids: Sequence[str], values: Mapping[str, Any]) -> None:
    for some in _slices(plan_ids):
        connection.execute(update(runtime_plans).where(_PLAN.id.in_(some)).values(**values))


def _slices(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE)]
