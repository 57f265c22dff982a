"""What does the fleet look like from the coordinators: its workers, its models, its backlog?"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, func, literal_column, select, update

from ollm_service.core.capabilities import Capabilities
from ollm_service.core.lifecycle import HELD_STATES, ExecutionState
from ollm_service.core.profile import ModelProfile
from ollm_service.core.requirements import Requirements
from ollm_service.core.resolution import HeldModel
from ollm_service.store.claiming import BEST_FIRST
from ollm_service.store.columns import as_text, now_ms, undecoded
from ollm_service.store.engine import Database
from ollm_service.store.mapping import UNREADABLE, decoded_or_none, worker_view
from ollm_service.store.presence import ACTIVE, DRAINING, GONE, count_inventory_change
from ollm_service.store.tables import counters, plan_classes, runtime_plans, workers
from ollm_service.store.views import ClassBacklog, WorkerView

_PLAN = runtime_plans.c
# Spelt out: with a parameter SQLite would look at every plan, since it cannot know that the index of queued plans is enough.
IS_QUEUED = _PLAN.state == literal_column(f"'{ExecutionState.QUEUED.value}'")
MOST_COUNTED = 128  # plans of a class: nobody wakes more workers at once
_has_queued = select(_PLAN.id).where(IS_QUEUED, _PLAN.class_id == plan_classes.c.class_id).exists()
_WAITING = select(plan_classes.c.class_id, as_text(plan_classes.c.requirements)).where(_has_queued)
_top = (
    select(_PLAN.available_ms, _PLAN.cancel_requested)
    .where(IS_QUEUED, _PLAN.class_id == bindparam("class"))
    .order_by(*BEST_FIRST)
    .limit(MOST_COUNTED)
    .subquery()
)
_is_available = (_top.c.available_ms <= now_ms()) & ~_top.c.cancel_requested
_COUNTED = select(func.count().label("queued"), func.count(case((_is_available, 1))).label("available")).select_from(_top)
_log = logging.getLogger(__name__)


class Fleet:
    """Workers, models and what waits for them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def workers(self, *, active_only: bool = True, gone: bool = True) -> list[WorkerView]:
        """The workers, oldest first; with `active_only` neither those that drain nor those that are gone, which `gone` admits."""
        held = (_PLAN.worker_id == workers.c.id) & _PLAN.state.in_(HELD_STATES)
        running = select(func.count()).select_from(runtime_plans).where(held).scalar_subquery()
        query = select(*undecoded(workers.c), running.label("running_plans"), (now_ms() - workers.c.heartbeat_ms).label("age_ms"))
        if active_only:
            query = query.where(workers.c.state == ACTIVE)
        elif not gone:
            query = query.where(workers.c.state != GONE)
        query = query.order_by(workers.c.started_ms, workers.c.id)
        return self._database.read(lambda connection: list(_readable(connection.execute(query))))

    def inventory_seq(self) -> int:
        """The number of the present inventory alone: one row, for those who keep the rest."""
        query = select(counters.c.value).where(counters.c.name == "inventory_seq")
        return self._database.look(lambda connection: int(connection.execute(query).scalar_one()))

    def inventory(self) -> tuple[int, tuple[HeldModel, ...]]:
        """The usable models of active workers, and the number of this state of affairs, which every change raises."""

        def work(connection: Connection) -> tuple[int, tuple[HeldModel, ...]]:
            # The number first: a change in between then makes what is planned now look old, and it is planned again.
            seq = connection.execute(select(counters.c.value).where(counters.c.name == "inventory_seq")).scalar_one()
            query = select(workers.c.id, as_text(workers.c.capabilities)).where(workers.c.state == ACTIVE)
            holders: dict[tuple[str, str, str], tuple[ModelProfile, list[str]]] = {}
            for row in connection.execute(query.order_by(workers.c.started_ms, workers.c.id)):
                offered = decoded_or_none(Capabilities, row.capabilities)
                for model in offered.models if offered else ():
                    if model.is_usable:
                        key = (model.name, str(model.path), model.digest)
                        holders.setdefault(key, (model, []))[1].append(row.id)
            return seq, tuple(HeldModel(profile=model, workers=tuple(ids)) for model, ids in holders.values())

        return self._database.read(work)

    def drain(self, node_or_worker_id: str) -> int:
        """Ask the active workers with this id, or on this node, to finish and leave; how many."""
        named = (workers.c.id == node_or_worker_id) | (workers.c.node == node_or_worker_id)
        drained = update(workers).where(named, workers.c.state == ACTIVE).values(state=DRAINING)

        def work(connection: Connection) -> int:
            count = connection.execute(drained).rowcount
            if count:
                count_inventory_change(connection)
            return count

        return self._database.write(work)

    def forget_gone(self, older_than_ms: int) -> int:
        """Delete workers that have been gone for this long; how many. Their attempts keep their names."""
        long_gone = (workers.c.state == GONE) & (workers.c.heartbeat_ms < now_ms() - older_than_ms)
        # On SQLite whoever writes keeps all others waiting: a look first.
        if not self._database.read(lambda connection: connection.execute(select(workers.c.id).where(long_gone).limit(1)).first()):
            return 0
        return self._database.write(lambda connection: connection.execute(workers.delete().where(long_gone)).rowcount)

    def backlog(self) -> list[ClassBacklog]:
        """The classes with queued plans, the largest first. It costs the same however many plans are queued."""

        def work(connection: Connection) -> list[ClassBacklog]:
            return [_backlog_of(connection, waiting) for waiting in connection.execute(_WAITING).all()]

        return sorted(self._database.read(work), key=lambda waiting: (-waiting.queued, waiting.class_id))


def _backlog_of(connection: Connection, waiting: Row[Any]) -> ClassBacklog:
    counted = connection.execute(_COUNTED, {"class": waiting.class_id}).one()
    return ClassBacklog(
        class_id=waiting.class_id,
        requirements=decoded_or_none(Requirements, waiting.requirements),
        queued=counted.queued,
        available=counted.available,
    )


def _readable(rows: Iterable[Row[Any]]) -> Iterator[WorkerView]:
    """The workers that can be decoded; one of a newer release, perhaps, is left out."""
    for row in rows:
        try:
            yield worker_view(row)
        except UNREADABLE as error:
            _log.warning("worker-unreadable", extra={"worker_id": row.id, "error": type(error).__name__})
