"""How are workers seen and drained over HTTP?"""

from typing import Annotated

from fastapi import APIRouter, Query

from ollm_service.api.fleet_shapes import DrainBody, WorkersBody, worker_body
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
