"""Which plans come before those of a new job: how many of each class, with how many rows, and rows like what?

Answered cheaply, whatever is queued: the claim's index alone counts the plans of each class, the top of each class is looked at,
and the rest is taken to be like it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select, text

from ollm_service.core.options import GenerationConfig
from ollm_service.core.row_size import own_limit, prompt_bytes
from ollm_service.core.worker_quote import RowSize
from ollm_service.store.claiming import BEST_FIRST
from ollm_service.store.columns import as_text, undecoded
from ollm_service.store.fleet import IS_QUEUED
from ollm_service.store.mapping import decoded_or_none, plan_view_if_readable
from ollm_service.store.tables import HELD, job_rows, jobs, plan_classes, runtime_plans
from ollm_service.store.views import PlansAhead, PlanView

MOST_CLASSES = 8
SEEN_PLANS = 256
SAMPLED_PLANS, SAMPLED_ROWS = 8, 8  # of a class, and of each of those plans
_PLAN = runtime_plans.c
_LEFT = (_PLAN.row_count - _PLAN.rows_done).label("left")
_IS_BEFORE = IS_QUEUED & (_PLAN.priority >= bindparam("priority"))
_COUNTS = select(_PLAN.class_id, func.count().label("plans")).where(_IS_BEFORE).group_by(_PLAN.class_id)
_HELD = select(_PLAN.id, _PLAN.class_id, _PLAN.worker_id, _LEFT).where(text(HELD)).order_by(*BEST_FIRST)
_TOP = (
    select(_PLAN.id, _LEFT, _PLAN.priority, _PLAN.created_ms)
    .where(_IS_BEFORE, _PLAN.class_id == bindparam("class"))
    .order_by(*BEST_FIRST)
    .limit(SEEN_PLANS)
)
_VIEW: Select[Any] = (
    select(*undecoded(_PLAN), as_text(plan_classes.c.requirements))
    .join_from(runtime_plans, plan_classes, plan_classes.c.class_id == _PLAN.class_id)
    .where(_PLAN.id == bindparam("plan"))
)
_ROWS = (
    select(job_rows.c.request, as_text(jobs.c.generation))
    .join_from(job_rows, jobs, jobs.c.id == job_rows.c.job_id)
    .where(job_rows.c.plan_id == bindparam("plan"))
    .order_by(job_rows.c.row)
    .limit(SAMPLED_ROWS)
)


def plans_ahead(connection: Connection, priority: int) -> tuple[list[PlansAhead], int]:
    """The plans that are held, or queued with this priority or a higher one, by class, and in the order of the queue.

    Of very many classes the largest; the number is that of the plans of the others, and of those that cannot be read.
    """
    counts = {row.class_id: row.plans for row in connection.execute(_COUNTS, {"priority": priority})}
    held: dict[str, list[Any]] = defaultdict(list)
    for row in connection.execute(_HELD):
        held[row.class_id].append(row)
    classes = sorted(counts.keys() | held.keys(), key=lambda name: (-counts.get(name, 0) - len(held[name]), name))
    found, untold = [], 0
    for name in classes[:MOST_CLASSES]:
        top = connection.execute(_TOP, {"class": name, "priority": priority}).all()
        told = _told(connection, top, counts.get(name, 0), held[name])
        if told is None:
            untold += counts.get(name, 0) + len(held[name])
        elif told[1].plan.profile is not None:  # without one nobody can claim it
            found.append(told)
    untold += sum(counts.get(name, 0) + len(held[name]) for name in classes[MOST_CLASSES:])
    return [ahead for _, ahead in sorted(found, key=lambda told: told[0])], untold


def _told(
    connection: Connection, top: Sequence[Any], queued: int, held: Sequence[Any]
) -> tuple[tuple[int, int], PlansAhead] | None:
    """One class, behind its place in the queue; None where its first plan cannot be read."""
    ids = [row.id for row in (*top, *held)]
    view = plan_view_if_readable(connection.execute(_VIEW, {"plan": ids[0]}).one())
    if not isinstance(view, PlanView):
        return None
    held_rows: dict[str, int] = defaultdict(int)
    for row in held:
        held_rows[row.worker_id] += row.left
    seen_rows = sum(row.left for row in top)
    place = (-top[0].priority, top[0].created_ms) if top else (0, 0)
    return place, PlansAhead(
        plan=view,
        queued_plans=queued,
        queued_rows=round(seen_rows * queued / len(top)) if top else 0,
        held_plans=len(held),
        held_rows=dict(held_rows),
        sample=tuple(size for name in _spread(ids) for size in _sizes(connection, name)),
    )


def _spread(ids: list[str]) -> list[str]:
    """Some of them, from all parts of the list."""
    step = -(-len(ids) // SAMPLED_PLANS)
    return ids[::step]


def _sizes(connection: Connection, plan_id: str) -> list[RowSize]:
    """How large the first rows of a plan are."""
    found = []
    for row in connection.execute(_ROWS, {"plan": plan_id}):
        usual = decoded_or_none(GenerationConfig, row.generation) or GenerationConfig()
        limit = own_limit(row.request) or usual.max_new_tokens
        found.append(RowSize(prompt_bytes=prompt_bytes(row.request), max_new_tokens=limit))
    return found
