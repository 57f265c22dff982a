"""How do our dataclasses travel as JSON, and what do the supervisor and the runner say to each other?

`to_json` and `from_json` turn any dataclass of the core into JSON types and back: enums as values, paths as text, tuples and
sets as lists. Where a field may hold one of several dataclasses, the object carries its class name under `type`.
Frames between supervisor and runner are a length of 4 bytes, big-endian, and that many bytes of UTF-8 JSON.
"""

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import PurePosixPath
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ollm_service.core.adapters import Adapter
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
    at the end. In `weights_dir` runners share weights in the form in which layers are read from disk. The model in `draft_dir`
    guesses tokens. At most `placement.micro_batch` rows run at a time; `suspects` are rows that crashed a runner before, which
    run last and each alone.
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
    weights_dir: str | None = None
    adapter: Adapter | None = None
    draft_dir: str | None = None
    draft_digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Supervisor: stop the current plan at the next boundary and answer `Stopped`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Runner: it is up and listens, with the versions of torch and transformers that it will use."""

    pid: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """Bytes per second that a device reads from its memory, and floating-point operations per second by element type."""

    memory_rate: float
    arithmetic: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Runner: how fast its devices are, by torch's names; once, after its libraries are imported."""

    devices: Mapping[str, DeviceSpeed]


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
    """Runner: results of rows that have ended, and how each planned pass has ended so far.

    Nothing is in flight until the next `BatchStarted`.
    """

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
class LongRow:
    """A row that is longer than the placement's `longest_row_tokens`: its prompt's tokens, and with those it may answer."""

    row: int
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Runner: every row was reported but those that are too long for the placement."""

    measured: Mapping[str, float] = field(default_factory=dict)
    too_long: tuple[LongRow, ...] = ()


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
    | Speed
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
    kind: Any = type(value)
    return value if kind in _PLAIN else _writer(kind)(value)


def from_json(kind: type[T], data: Any) -> T:
    """A value of `kind` from JSON types.

    Unknown keys are ignored, so that an older reader understands a newer writer; missing keys take the field's default. Raises
    TypeError for a missing field without default and for a value of another JSON type, ValueError for a value that is not
    allowed, KeyError for an unknown `type`.
    """
    return cast(T, _reader(cast(Any, kind))(data))


# How a type is written and read is worked out once: plans and profiles travel several times for each plan that is dispatched.
_PLAIN = frozenset({str, int, float, bool, types.NoneType})


@cache
def _writer(kind: type) -> Callable[[Any], Any]:
    """What turns a value of this class into JSON types."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        writers = [(item.name, _tagged if _is_open(hints[item.name]) else to_json) for item in fields(kind)]
        return lambda value: {name: write(getattr(value, name)) for name, write in writers}
    if issubclass(kind, Enum):
        return lambda value: value.value
    if issubclass(kind, PurePosixPath):
        return str
    if issubclass(kind, Mapping):
        return lambda value: {str(to_json(key)): to_json(item) for key, item in value.items()}
    if issubclass(kind, tuple | list):
        return lambda value: [to_json(item) for item in value]
    if issubclass(kind, frozenset | set):
        return lambda value: sorted(to_json(item) for item in value)
    return lambda value: value


def _is_open(hint: Any) -> bool:
    """Whether the hint leaves several dataclasses open, itself or as the values of a mapping."""
    arguments = get_args(hint)
    is_map = _is_mapping(get_origin(hint)) and _is_open(arguments[1])
    return is_map or sum(is_dataclass(choice) for choice in arguments) > 1


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _tagged(value: Any) -> Any:
    """The value as JSON, each dataclass with its class name."""
    if isinstance(value, Mapping):
        return {str(to_json(key)): _tagged(item) for key, item in value.items()}
    return {"type": type(value).__name__, **to_json(value)} if is_dataclass(value) else to_json(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type from JSON types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union_reader(arguments)
    if origin in (tuple, frozenset):
        read = _reader(arguments[0])
        return lambda data: origin(read(item) for item in _demand(data, list | tuple, kind))
    if _is_mapping(origin):
        key, item = map(_reader, arguments)
        return lambda data: {key(name): item(value) for name, value in _demand(data, Mapping, kind).items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_reader(kind)
    if isinstance(kind, type) and issubclass(kind, Enum | PurePosixPath):
        return lambda data: kind(_demand(data, str, kind))
    if kind is float:
        return lambda data: float(_demand(data, int | float, kind))
    return (lambda data: _demand(data, kind, kind)) if kind in (str, int, bool) else (lambda data: data)


def _dataclass_reader(kind: type) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = [(item.name, _reader(hints[item.name])) for item in fields(kind)]

    def read(data: Any) -> Any:
        given = _demand(data, Mapping, kind)
        return kind(**{name: read_field(given[name]) for name, read_field in readers if name in given})

    return read


def _union_reader(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    read = _choice_reader([argument for argument in arguments if argument is not types.NoneType])
    return (lambda data: None if data is None else read(data)) if types.NoneType in arguments else read


def _choice_reader(choices: list[Any]) -> Callable[[Any], Any]:
    if len(choices) == 1:
        return _reader(choices[0])
    if all(is_dataclass(choice) for choice in choices):
        readers = {choice.__name__: _reader(choice) for choice in choices}
        return lambda data: readers[_demand(data, Mapping, "a message")["type"]](data)
    wanted = (*choices, int) if float in choices else tuple(choices)
    return lambda data: _demand(data, wanted, choices)


def _demand(data: Any, wanted: Any, kind: Any) -> Any:
    """The data, if it is of the wanted JSON type. A boolean is no number, though Python says so."""
    if not isinstance(data, wanted) or (isinstance(data, bool) and kind is not bool):
        raise TypeError(f"{kind} cannot be read from a {type(data).__name__}")
    return data
