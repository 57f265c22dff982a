"""What has happened? The append-only history of plan records."""

from sqlalchemy import select

from ollm_service.store.engine import Database
from ollm_service.store.mapping import event_view
from ollm_service.store.tables import plan_events
from ollm_service.store.views import EventView


class Events:
    """Reading events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self,
        tenant_id: str,
        *,
        job_id: str | None = None,
        plan_id: str | None = None,
        after: int = 0,
        limit: int = 1_000,
    ) -> list[EventView]:
        """Events behind the event id `after`, oldest first.

        One plan's events are numbered in the order in which they happened. Across plans, two transactions may commit in another
        order than they drew their numbers: who follows a whole job should read a plan's events again when its state changed.
        """
        query = select(plan_events).where(plan_events.c.tenant_id == tenant_id, plan_events.c.id > after)
        if job_id is not None:
            query = query.where(plan_events.c.job_id == job_id)
        if plan_id is not None:
            query = query.where(plan_events.c.plan_id == plan_id)
        query = query.order_by(plan_events.c.id).limit(limit)
        return self._database.read(lambda connection: [event_view(row) for row in connection.execute(query)])
