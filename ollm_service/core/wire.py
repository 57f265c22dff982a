"""How do our dataclasses travel as JSON, and what do the supervisor and the runner say to each other?

`to_json` and `from_json` turn any dataclass of the core into JSON types and back: enums as values, paths as text, tuples and
sets as lists. Where a field may hold one of several dataclasses, the object carries its class name under `type`.
Frames between supervisor and runner are a length of 4 bytes, big-endian, and that many bytes of UTF-8 JSON.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import PurePosixPath
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ollm_service.core.errors import RequestError
from ollm_service.core.leasing import RowResult, WorkRow
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.passes import PassOutcome
from ollm_service.core.placement import Placement
from ollm_service.core.plan import PassId, RuntimePlan
from ollm_service.core.profile import ModelProfile

T = TypeVar("T")
LENGTH_BYTES = 4
LONGEST_FRAME = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Execute:
    """Supervisor: load the model unless it is warm, apply the planned passes and answer the rows.

    `model_dir` and `cache_dir` are absolute on this host; the runner makes a private folder inside `cache_dir` and deletes it
    at the end. At most `placement.micro_batch` rows run at a time; `suspects` are rows that crashed a runner before, which run
    last and each alone.
    """

    plan_id: str
    attempt: int
    model_dir: str
    cache_dir: str | None
    runtime_plan: RuntimePlan
    profile: ModelProfile
    config: RuntimeConfig
    placement: Placement
    rows: tuple[WorkRow, ...]
    suspects: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Supervisor: stop the current plan at the next boundary and answer `Stopped`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Runner: it is up and listens, with the versions of torch and transformers that it will use."""

    pid: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Runner: the model is in memory; the seconds that it took, zero where it was warm."""

    seconds: float
    was_warm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStarted:
    """Runner: these rows are in flight from now on; a crash is theirs."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Runner: it is alive and got this far, sent at most about once a second while loading and generating."""

    stage: str
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """Runner: a micro-batch's results, and how each planned pass has ended so far."""

    results: tuple[RowResult, ...]
    outcomes: Mapping[PassId, PassOutcome] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecializationFailed:
    """Runner: a planned pass failed before any row was reported; nothing of this plan was kept."""

    outcomes: Mapping[PassId, PassOutcome]
    reason: str
    error_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Runner: every row was reported."""

    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Runner: it stopped as asked; rows not reported were not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """Runner: the plan cannot go on here; the runner itself is well. Messages never hold prompts."""

    stage: str
    code: str
    message: str
    error_type: str
    is_permanent: bool = False


Message = (
    Execute
    | Stop
    | Hello
    | Loaded
    | BatchStarted
    | Progress
    | BatchDone
    | SpecializationFailed
    | Finished
    | Stopped
    | AttemptFailed
)


def encode_message(message: Message, *, longest: int = LONGEST_FRAME) -> bytes:
    """One frame. Raises ValueError for a body of more than `longest` bytes."""
    body = json.dumps({"type": type(message).__name__, **to_json(message)}, separators=(",", ":")).encode()
    if len(body) > longest:
        raise ValueError(f"a message of {len(body):,} bytes is too long for one frame")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_message(body: bytes) -> Message:
    """The message in a frame's body. Raises ValueError for anything else."""
    try:
        return cast(Message, from_json(cast(type[Any], Message), json.loads(body)))
    except (KeyError, TypeError, RecursionError, RequestError) as error:
        raise ValueError(f"not a message: {error}") from error


def to_json(value: Any) -> Any:
    """The value as JSON types."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        return {item.name: _tagged(getattr(value, item.name), hints[item.name]) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePosixPath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(to_json(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(to_json(item) for item in value)
    return value


def from_json(kind: type[T], data: Any) -> T:
    """A value of `kind` from JSON types.

    Unknown keys are ignored, so that an older reader understands a newer writer; missing keys take the field's default. Raises
    TypeError for a missing field without default and for a value of another JSON type, ValueError for a value that is not
    allowed, KeyError for an unknown `type`.
    """
    return cast(T, _read(kind, data))


def _read(kind: Any, data: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, data)
    if origin in (tuple, frozenset):
        return origin(_read(arguments[0], item) for item in _demand(data, list | tuple, kind))
    if origin is not None and issubclass(origin, Mapping):
        return {_read(arguments[0], key): _read(arguments[1], item) for key, item in _demand(data, Mapping, kind).items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints, given = _hints(kind), _demand(data, Mapping, kind)
        return kind(**{item.name: _read(hints[item.name], given[item.name]) for item in fields(kind) if item.name in given})
    if isinstance(kind, type) and issubclass(kind, Enum | PurePosixPath):
        return kind(_demand(data, str, kind))
    if kind is float:
        return float(_demand(data, int | float, kind))
    return _demand(data, kind, kind) if kind in (str, int, bool) else data


def _demand(data: Any, wanted: Any, kind: Any) -> Any:
    """The data, if it is of the wanted JSON type. A boolean is no number, though Python says so."""
    if not isinstance(data, wanted) or (isinstance(data, bool) and kind is not bool):
        raise TypeError(f"{kind} cannot be read from a {type(data).__name__}")
    return data


def _read_union(arguments: tuple[Any, ...], data: Any) -> Any:
    if data is None and types.NoneType in arguments:
        return None
    choices = [argument for argument in arguments if argument is not types.NoneType]
    if len(choices) == 1:
        return _read(choices[0], data)
    if all(is_dataclass(choice) for choice in choices):
        return _read({choice.__name__: choice for choice in choices}[_demand(data, Mapping, "a message")["type"]], data)
    return _demand(data, (*choices, int) if float in choices else tuple(choices), choices)


def _tagged(value: Any, hint: Any) -> Any:
    """The value as JSON, with its class name wherever the hint leaves several dataclasses open."""
    if isinstance(value, Mapping) and len(get_args(hint)) == 2:
        return {str(to_json(key)): _tagged(item, get_args(hint)[1]) for key, item in value.items()}
    plain = to_json(value)
    open_choices = [choice for choice in get_args(hint) if is_dataclass(choice)]
    if is_dataclass(value) and len(open_choices) > 1:
        return {"type": type(value).__name__, **plain}
    return plain


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
