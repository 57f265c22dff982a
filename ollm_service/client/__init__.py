"""How does a Python program use the service? A Client, its Jobs, and frozen views of everything that it may look at."""

from ollm_service.client.jobs import Job
from ollm_service.client.models import Download, Pull
from ollm_service.client.service import Client
from ollm_service.client.transport import ServiceUnreachable
from ollm_service.client.views import (
    Attempt,
    Counts,
    Model,
    Plan,
    PlanEvent,
    Preview,
    Result,
    Verdict,
    Worker,
)

__all__ = [
    "Attempt",
    "Client",
    "Counts",
    "Download",
    "Job",
    "Model",
    "Plan",
    "PlanEvent",
    "Preview",
    "Pull",
    "Result",
    "ServiceUnreachable",
    "Verdict",
    "Worker",
]
