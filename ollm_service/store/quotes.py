"""What do quotes go by, and which previews may a submission still name?"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, insert, select

from ollm_service.core.errors import NotFound
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.plan import RuntimePlan
from ollm_service.core.rates import MeasuredAttempt
from ollm_service.core.requirements import Requirements
from ollm_service.core.wire import from_json, to_json
from ollm_service.store.ahead import plans_ahead
from ollm_service.store.columns import now_ms
from ollm_service.store.engine import Database
from ollm_service.store.tables import attempts, previews
from ollm_service.store.views import PlansAhead

NEWEST_ATTEMPTS = 200
_MEASURED = (
    select(attempts.c.placement, attempts.c.measured)
    .where(
        attempts.c.model_digest == bindparam("digest"),
        attempts.c.outcome == ExecutionState.SUCCEEDED.value,
        attempts.c.measured.is_not(None),
    )
    .order_by(attempts.c.ended_ms.desc())
    .limit(NEWEST_ATTEMPTS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPreview:
    """A preview as it was shown: what was asked for, and the plan that it got. `request` is JSON."""

    preview_id: str
    request: dict[str, Any]
    planned: RuntimePlan
    requirements: Requirements


class Quotes:
    """Measured attempts and previews."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def measured(self, model_digest: str) -> list[MeasuredAttempt]:
        """The newest attempts that answered all of their rows with this model."""
        rows = self._database.look(lambda connection: connection.execute(_MEASURED, {"digest": model_digest}).all())
        return [MeasuredAttempt(placement=row.placement or {}, measured=row.measured or {}) for row in rows]

    def ahead(self, priority: int = 0) -> tuple[list[PlansAhead], int]:
        """What comes before a new job of this priority; the number counts plans of which no more than that is known."""
        return self._database.read(lambda connection: plans_ahead(connection, priority))

    def keep_preview(self, preview: StoredPreview, tenant_id: str) -> None:
        """Remember a preview."""
        values = {
            "id": preview.preview_id,
            "tenant_id": tenant_id,
            "request": preview.request,
            "planned": to_json(preview.planned),
            "requirements": to_json(preview.requirements),
        }
        kept = insert(previews).values(created_ms=now_ms(), **values)
        self._database.write(lambda connection: connection.execute(kept))

    def preview(self, preview_id: str, tenant_id: str) -> StoredPreview:
        """One preview. Raises NotFound."""
        query = select(previews).where(previews.c.id == preview_id, previews.c.tenant_id == tenant_id)
        row = self._database.look(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise NotFound(
                f"There is no preview {preview_id}.", param="plan", remedy="Previews are kept for a week; make a new one."
            )
        return StoredPreview(
            preview_id=row.id,
            request=row.request,
            planned=from_json(RuntimePlan, row.planned),
            requirements=from_json(Requirements, row.requirements),
        )

    def forget_previews(self, older_than_ms: int) -> int:
        """Delete the previews of long ago; how many."""
        old = previews.c.created_ms < now_ms() - older_than_ms
        # On SQLite whoever writes keeps all others waiting: a look first.
        if not self._database.look(lambda connection: connection.execute(select(previews.c.id).where(old).limit(1)).first()):
            return 0
        return self._database.write(lambda connection: connection.execute(delete(previews).where(old)).rowcount)
