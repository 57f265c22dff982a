"""What of a job still waits: which of its plans, asking for what, and which of their rows are the longest?"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, Text, case, func, select, type_coerce

from ollm_service.core.lifecycle import FINAL_STATES, ExecutionState
from ollm_service.store.columns import as_text, byte_length, undecoded
from ollm_service.store.mapping import plan_view_if_readable
from ollm_service.store.submission import NewRow
from ollm_service.store.tables import job_rows, plan_classes, results, runtime_plans
from ollm_service.store.views import PlanView, WaitingPlans

_PLAN, _ROW = runtime_plans.c, job_rows.c
# A row with an output limit of its own may need more than its text tells. In a prompt the quotes would stand behind backslashes.
_OWN_LIMIT = '"max_new_tokens":'


def waiting_plans(connection: Connection, job_id: str) -> Sequence[WaitingPlans]:
    """A job's queued plans, those together that ask for the same; a kind of which none can be decoded is left out."""
    query = select(_PLAN.id, _PLAN.class_id, as_text(_PLAN.config), (_PLAN.row_count - _PLAN.rows_done).label("left"))
    query = query.where(_PLAN.job_id == job_id, _PLAN.state == ExecutionState.QUEUED.value).order_by(_PLAN.number)
    alike: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in connection.execute(query):
        alike[row.class_id, row.config].append(row)
    found = [(_plan(connection, rows[0].id), rows) for rows in alike.values()]
    return [
        WaitingPlans(plan=plan, plan_ids=tuple(row.id for row in rows), rows_left=sum(row.left for row in rows))
        for plan, rows in found
        if plan is not None
    ]


def _plan(connection: Connection, plan_id: str) -> PlanView | None:
    same_class = plan_classes.c.class_id == _PLAN.class_id
    query: Select[Any] = select(*undecoded(_PLAN), as_text(plan_classes.c.requirements))
    query = query.join_from(runtime_plans, plan_classes, same_class)
    view = plan_view_if_readable(connection.execute(query.where(_PLAN.id == plan_id)).one())
    return view if isinstance(view, PlanView) else None


def longest_rows(connection: Connection, plan_ids: Sequence[str], *, offset: int, limit: int) -> Sequence[tuple[NewRow, int]]:
    """Rows of these plans without a result, and the bytes of each as stored: first those with an output limit of their own.

    The others follow, the longest first.
    """
    length = byte_length(_ROW.request)
    has_result = select(results.c.row).where(results.c.job_id == _ROW.job_id, results.c.row == _ROW.row).exists()
    own_limit = case((type_coerce(_ROW.request, Text).contains(_OWN_LIMIT, autoescape=True), 0), else_=1)
    query = select(_ROW.row, _ROW.custom_id, as_text(_ROW.request), length.label("bytes"))
    query = query.where(_ROW.plan_id.in_(plan_ids), ~has_result).order_by(own_limit, length.desc(), _ROW.row)
    return [
        (NewRow(row=row.row, custom_id=row.custom_id, request=json.loads(row.request)), row.bytes)
        for row in connection.execute(query.offset(offset).limit(limit))
    ]


def rows_left(connection: Connection, job_id: str) -> Mapping[ExecutionState, int]:
    """How many rows without a result are in plans of each state that is not final."""
    query = select(_PLAN.state, func.sum(_PLAN.row_count - _PLAN.rows_done).label("left"))
    query = query.where(_PLAN.job_id == job_id, _PLAN.state.not_in(FINAL_STATES)).group_by(_PLAN.state)
    return {ExecutionState(row.state): int(row.left) for row in connection.execute(query)}
