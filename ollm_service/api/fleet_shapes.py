"""How do workers look on the wire?"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from ollm_service.api.shapes import iso
from ollm_service.core.wire import to_json
from ollm_service.store.views import WorkerView


class WorkerBody(BaseModel):
    """One worker process, as it was registered and as of its last heartbeat."""

    id: str
    object: Literal["worker"] = "worker"
    node: str
    state: str = Field(examples=["active", "draining", "gone"])
    slots: int
    running: int = Field(description="Plans whose leases it holds.")
    warm_model: str | None
    capabilities: dict[str, Any] = Field(
        description="Devices, memory and disk in bytes, models, labels, versions; and for each backend, pass and KV strategy "
        "null, or the reason why this worker lacks it."
    )
    live: dict[str, Any] = Field(description="What was free at the last heartbeat, in bytes.")
    heartbeat_age_seconds: float
    started_at: str


class WorkersBody(BaseModel):
    """Every worker."""

    object: Literal["list"] = "list"
    data: list[WorkerBody]
    has_more: bool = False
    next: str | None = None


class DrainBody(BaseModel):
    """How many workers were asked to finish and leave."""

    object: Literal["drain"] = "drain"
    node: str
    workers: int


def worker_body(worker: WorkerView) -> WorkerBody:
    """One worker."""
    return WorkerBody(
        id=worker.worker_id,
        node=worker.node,
        state=worker.state,
        slots=worker.capabilities.slots,
        running=worker.running,
        warm_model=worker.warm_model,
        capabilities=to_json(worker.capabilities),
        live=to_json(worker.live),
        heartbeat_age_seconds=worker.heartbeat_age_ms / 1000,
        started_at=iso(worker.started_ms),
    )
