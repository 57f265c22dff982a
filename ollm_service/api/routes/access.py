"""How does an endpoint reach the service, and what do its query parameters have in common?"""

from typing import Annotated

from fastapi import Depends, Query, Request

from ollm_service.api.requests import raw_body
from ollm_service.coordinator.service import Service


def service_of(request: Request) -> Service:
    """The service that this app was made for."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceHere = Annotated[Service, Depends(service_of)]
RawBody = Annotated[bytes, Depends(raw_body)]
After = Annotated[str | None, Query(description="The `next` of the page before.", max_length=128)]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items a page at most.")]
