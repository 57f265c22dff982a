"""How does an endpoint reach the service, and what do its query parameters have in common?"""

from typing import Annotated

from fastapi import Depends, Path, Query, Request
from pydantic import AfterValidator

from ollm_service.api.requests import raw_body
from ollm_service.coordinator.service import Service
from ollm_service.core.errors import NotFound, shown

LONGEST_NAME = 255


def service_of(request: Request) -> Service:
    """The service that this app was made for."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _possible(name: str) -> str:
    """A name that something could have. Raises NotFound for any other, which a database could not even look for."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise NotFound(f"There is nothing named `{shown(name)}`.")
    return name


ServiceHere = Annotated[Service, Depends(service_of)]
RawBody = Annotated[bytes, Depends(raw_body)]
JobId = Annotated[str, AfterValidator(_possible), Path(description="`job_…`")]
PlanId = Annotated[str, AfterValidator(_possible), Path(description="`plan_…`")]
DownloadId = Annotated[str, AfterValidator(_possible), Path(description="`dl_…`")]
Node = Annotated[str, AfterValidator(_possible), Path(description="A node's name, or a worker's id.")]
InJob = Annotated[
    str | None, AfterValidator(lambda name: name and _possible(name)), Query(alias="job", description="Only of this job.")
]
After = Annotated[
    str | None, AfterValidator(lambda name: name and _possible(name)), Query(description="`next` of the page before.")
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items a page at most.")]
