"""How are workers and models seen, and workers drained, over HTTP?"""

from typing import Annotated

from fastapi import APIRouter, Query

from ollm_service.api.fleet_shapes import DrainBody, ModelBody, ModelsBody, WorkersBody, models_body, worker_body
from ollm_service.api.openapi import failures
from ollm_service.api.routes.access import Node, ServiceHere
from ollm_service.core.errors import NotFound

router = APIRouter(prefix="/v1", tags=["fleet"])


@router.get("/workers", operation_id="listWorkers", summary="List workers", responses=failures(401, 503))
def list_workers(
    service: ServiceHere, gone: Annotated[bool, Query(description="Also those that have left.")] = False
) -> WorkersBody:
    """What each worker offers, has free and does."""
    return WorkersBody(data=[worker_body(worker) for worker in service.store.fleet.workers(active_only=False, gone=gone)])


@router.post("/workers/{node}/drain", operation_id="drainNode", summary="Drain a node", responses=failures(401, 404, 503))
def drain_node(service: ServiceHere, node: Node) -> DrainBody:
    """Ask a node's workers, or the one worker with this id, to finish what they run and leave."""
    workers = service.store.fleet.drain(node)
    if not workers:
        raise NotFound(f"No active worker has the id or the node name `{node}`.", remedy="GET /v1/workers lists them.")
    return DrainBody(node=node, workers=workers)


@router.get("/models", operation_id="listModels", summary="List models", responses=failures(401, 503))
def list_models(service: ServiceHere) -> ModelsBody:
    """The models that workers have, refused ones with the reason, and the aliases that are always known."""
    return models_body(service.fleet.fresh().workers)


@router.get("/models/{model:path}", operation_id="getModel", summary="Show a model", responses=failures(401, 404, 503))
def get_model(service: ServiceHere, model: str) -> ModelBody:
    """The model of this name that most workers have."""
    found = [body for body in models_body(service.fleet.fresh().workers).data if model in (body.id, body.repo_id)]
    if not found:
        raise NotFound(f"No worker has a model named `{model}`.", param="model", remedy="GET /v1/models lists them.")
    return max(found, key=lambda body: (body.usable, len(body.workers)))
