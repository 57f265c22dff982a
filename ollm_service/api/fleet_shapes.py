"""How do workers and models look on the wire?"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ollm_service.api.shapes import iso
from ollm_service.core.catalog import CATALOG
from ollm_service.core.profile import ModelProfile
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


class ModelBody(BaseModel):
    """A model that a job may name: one that workers have, or an alias that a worker would have to fetch first.

    Sizes are in bytes, lengths in tokens. `unsafe_because` is why a folder is refused.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "fleet"
    usable: bool
    unsafe_because: str | None = None
    path: str | None = None
    digest: str | None = None
    repo_id: str | None = None
    architecture: str | None = None
    family: str | None = None
    kind: str | None = None
    dtype: str | None = None
    weight_bytes: int | None = None
    parameter_count: int | None = None
    layer_count: int | None = None
    max_context_tokens: int | None = None
    has_chat_template: bool | None = None
    nodes: list[str] = []
    workers: list[str] = []


class ModelsBody(BaseModel):
    """The models of the fleet, then the aliases that nobody has yet."""

    object: Literal["list"] = "list"
    data: list[ModelBody]
    has_more: bool = False
    next: str | None = None


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


def models_body(workers: Sequence[WorkerView]) -> ModelsBody:
    """The models of these workers, one entry for each name and digest."""
    holders: dict[tuple[str, str], list[WorkerView]] = {}
    profiles: dict[tuple[str, str], ModelProfile] = {}
    for worker in workers:
        for model in worker.capabilities.models:
            key = (model.name, model.digest)
            profiles.setdefault(key, model)
            holders.setdefault(key, []).append(worker)
    data = [_model_body(profiles[key], holders[key]) for key in sorted(profiles)]
    names = {name for model in profiles.values() if model.is_usable for name in (model.name, model.path.name, model.repo_id)}
    absent = [entry for entry in CATALOG.values() if not names & {entry.alias, entry.repo_id, entry.repo_id.replace("/", "--")}]
    data += [
        ModelBody(id=entry.alias, owned_by="catalog", usable=True, repo_id=entry.repo_id, family=entry.family) for entry in absent
    ]
    return ModelsBody(data=data)


def _model_body(model: ModelProfile, holders: Sequence[WorkerView]) -> ModelBody:
    return ModelBody(
        id=model.name,
        digest=model.digest,
        path=model.path.as_posix(),
        repo_id=model.repo_id,
        architecture=model.architecture,
        family=model.family,
        kind=model.kind,
        dtype=model.dtype,
        weight_bytes=model.weight_bytes,
        parameter_count=model.parameter_count,
        layer_count=model.layer_count,
        max_context_tokens=model.max_context_tokens,
        has_chat_template=model.has_chat_template,
        usable=model.is_usable,
        unsafe_because=model.unsafe_because,
        nodes=sorted({worker.node for worker in holders}),
        workers=[worker.worker_id for worker in holders],
    )
