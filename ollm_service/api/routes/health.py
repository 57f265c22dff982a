"""Is this process alive, and can it work?"""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from ollm_service import __version__
from ollm_service.api.openapi import failures
from ollm_service.api.routes.access import ServiceHere
from ollm_service.settings import MEMORY_BROKER

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str = __version__


class Readiness(BaseModel):
    """The service can accept jobs. A broker that is down costs seconds of latency and nothing else."""

    status: Literal["ok"] = "ok"
    database: Literal["up"] = "up"
    broker: Literal["none", "unknown", "up", "down"]


@router.get("/healthz", operation_id="getHealth", summary="Is the process alive?")
def healthz() -> Health:
    """Always `ok`; asks nobody."""
    return Health()


@router.get("/readyz", operation_id="getReadiness", summary="Can it accept jobs?", responses=failures(503))
def readyz(service: ServiceHere) -> Readiness:
    """`ok` while the database answers."""
    service.store.ping()
    return Readiness(broker=_broker_state(service.settings.broker_url, service.hints.is_up))


def _broker_state(url: str, is_up: bool | None) -> Literal["none", "unknown", "up", "down"]:
    if url == MEMORY_BROKER:
        return "none"
    if is_up is None:
        return "unknown"
    return "up" if is_up else "down"
