"""What may a request body hold? The only place where bodies are parsed; everything behind it sees checked values."""

import hashlib
import json
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ollm_service.core.errors import RequestError
from ollm_service.core.known_devices import KNOWN_DEVICES
from ollm_service.core.options import GenerationConfig, RuntimeConfig

Body = TypeVar("Body", bound="RequestBody")

_EXAMPLE_ROWS = [{"custom_id": "a", "prompt": "12+30="}, {"messages": [{"role": "user", "content": "Hello"}]}]
_RUNTIME_HELP = f"Options of the runtime: {', '.join(RuntimeConfig.__dataclass_fields__)}."
_GENERATION_HELP = f"Options of generation, for every row: {', '.join(GenerationConfig.__dataclass_fields__)}."


class RequestBody(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PreviewRequest(RequestBody):
    """What would run where? Rows are checked when given; nothing is stored."""

    model: str = Field(description="Alias, hub id `org/name[@revision]`, or name of a folder that a worker has.")
    runtime: dict[str, Any] | None = Field(None, description=_RUNTIME_HELP, examples=[{"kv_cache_strategy": "paged"}])
    generation: dict[str, Any] | None = Field(None, description=_GENERATION_HELP, examples=[{"max_new_tokens": 64}])
    where: str | None = Field(None, description="Label expression that a worker must satisfy.", examples=['zone == "home"'])
    rows: list[Any] | None = Field(None, description="Rows as in a submission.", examples=[_EXAMPLE_ROWS])
    if_workers: list[str | dict[str, Any]] | None = Field(
        None,
        description=f"Machines to imagine: {', '.join(KNOWN_DEVICES)}, or objects with memory_bytes, memory_rate, arithmetic, ….",
        examples=[["h200"]],
    )


class JobRequest(RequestBody):
    """A job to run: one model, options, and rows of `{custom_id?, prompt | messages, generation?}`."""

    model: str | None = Field(
        None,
        description="Alias, hub id `org/name[@revision]`, or name of a folder that a worker has.",
        examples=["llama3-1B-chat"],
    )
    plan: str | None = Field(
        None, description="A preview, pl_…: run exactly what it showed, or say what has changed. It stands for model and options."
    )
    rows: list[Any] = Field(description="The requests. A row that is wrong by itself fails alone.", examples=[_EXAMPLE_ROWS])
    runtime: dict[str, Any] | None = Field(None, description=_RUNTIME_HELP, examples=[{"kv_cache_strategy": "paged"}])
    generation: dict[str, Any] | None = Field(None, description=_GENERATION_HELP, examples=[{"max_new_tokens": 64}])
    priority: Annotated[int, Field(ge=-1000, le=1000, description="Higher runs earlier.")] = 0
    where: str | None = Field(None, description="Label expression that a worker must satisfy.", examples=['zone == "home"'])
    deadline_seconds: Annotated[
        float | None, Field(gt=0, le=366 * 86_400, description="Rows not answered by then fail with `expired`.")
    ] = None
    idempotency_key: Annotated[
        str | None, Field(min_length=1, max_length=255, description="The same key and body return the same job.")
    ] = None


class AmendRequest(RequestBody):
    """What is to be otherwise about a job's plans that wait. Whatever is left out stays as it is."""

    runtime: dict[str, Any] | None = Field(
        None,
        description=f"{_RUNTIME_HELP} Those to change alone; null goes back to the default.",
        examples=[{"kv_cache_strategy": None}],
    )
    where: str | None = Field(None, description="Label expression that a worker must satisfy, or `any`.", examples=["any"])
    skip_rows: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, max_length=10_000, description="Rows to give up: they end with the error `skipped`.", examples=[[211, 9034]]
    )


class RetryRequest(RequestBody):
    """How to retry a job's failed rows; the body may be left out."""

    idempotency_key: Annotated[str | None, Field(min_length=1, max_length=255)] = None


class PullRequest(RequestBody):
    """Have a worker fetch a model from the hub."""

    model: str = Field(description="Alias, or hub id `org/name[@revision]`.", examples=["llama3-1B-chat"])
    worker: Annotated[
        str | None, Field(min_length=1, max_length=255, description="A node's name or a worker's id; unset: any one that may.")
    ] = None


async def raw_body(request: Request) -> bytes:
    """The whole body, read on the event loop; it is parsed in the endpoint's thread. Raises BodyTooLarge while reading."""
    return await request.body()


def parse_body(kind: type[Body], raw: bytes) -> tuple[Body, dict[str, Any]]:
    """The checked body and the JSON that it came from. Raises RequestError for anything but one well-formed object."""
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(
            f"The body is not JSON: the error is{where or ' in its encoding or its numbers'}.",
            remedy="Send one JSON object in UTF-8, with content-type: application/json.",
        ) from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.", remedy='Send something like {"model": …, "rows": […]}.')
    _refuse_broken_text({name: value for name, value in data.items() if name != "rows"})
    try:
        return kind.model_validate(data), data
    except ValidationError as error:
        raise wrong_field(error.errors(include_url=False, include_input=False)[0], kind) from error


def body_digest(data: dict[str, Any]) -> str:
    """The sha256 over the body's canonical JSON: the same content gives the same digest, however it was written."""
    digest = hashlib.sha256(_canonical({name: value for name, value in data.items() if name != "rows"}))
    for row in data.get("rows") or ():  # one by one, so that a large body is not held twice
        digest.update(b"\n" + _canonical(row))
    return digest.hexdigest()


def wrong_field(detail: ErrorDetails, kind: type[BaseModel] | None = None) -> RequestError:
    """What pydantic found wrong first, as an error that names the field and what it may be."""
    path = [part for part in detail["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(str(part) for part in path) or None
    if detail["type"] == "extra_forbidden" and kind is not None:
        allowed = ", ".join(kind.model_fields)
        return RequestError(f"`{param}` is not a field of this request.", param=param, remedy=f"Allowed: {allowed}.")
    if detail["type"] == "missing":
        return RequestError(f"`{param}` is missing.", param=param, remedy=f"Add `{param}`.")
    problem = detail["msg"][:1].lower() + detail["msg"][1:]
    return RequestError(f"`{param}` is wrong: {problem}.", param=param, remedy=f"Send another value of `{param}`.")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_broken_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "The body holds half of a surrogate pair, which is not Unicode text.", remedy="Send well-formed Unicode."
        ) from error
