"""How is the API described to machines? FastAPI's document, with our request bodies, errors and keys put in."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from ollm_service.api.errors import ErrorBody
from ollm_service.api.requests import AmendRequest, JobRequest, PreviewRequest, PullRequest, RequestBody, RetryRequest

_REFERENCE = "#/components/schemas/{model}"
_BODIES = (AmendRequest, JobRequest, PreviewRequest, PullRequest, RetryRequest)
_TAGS = [
    {"name": "jobs", "description": "Submit work, watch it, read its results."},
    {"name": "plans", "description": "See what will run where and why, before, while and after it runs."},
    {"name": "fleet", "description": "The workers."},
    {"name": "models", "description": "The models that workers have, and those that they fetch."},
    {"name": "health", "description": "For load balancers and health checks; no key needed."},
]
_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or unknown.",
    404: "There is no such thing.",
    409: "It contradicts what is stored already.",
    413: "The body is over the limit.",
    422: "The plan cannot be executed; the message says why.",
    503: "The database cannot be reached at the moment.",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of an endpoint."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


def body_of(kind: type[RequestBody], *, required: bool = True) -> dict[str, Any]:
    """The request body of an endpoint that parses it itself."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes, tags=_TAGS
        )
        _, bodies = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_REFERENCE)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(bodies["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):  # ours have another shape, and 400 as their status
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"apiKey": []}]
        for operations in document["paths"].values():
            for operation in operations.values():
                if "HTTPValidationError" in str(operation["responses"].get("422", "")):
                    del operation["responses"]["422"]
                if operation["tags"] == ["health"]:
                    operation["security"] = []
        app.openapi_schema = document
    return app.openapi_schema
