"""Which rows of a submission can run, and what is kept of each? A row that is wrong by itself never fails its job."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ollm_service.core.content import MOST_PARTS, WrongPart, kept_part, media_parts, modalities_of
from ollm_service.core.errors import InvalidJob, InvalidOption, printable, shown
from ollm_service.core.leasing import RowError
from ollm_service.core.options import GenerationConfig
from ollm_service.core.plan import ModelModality
from ollm_service.store.jobs import NewRow

ROW_FIELDS = ("custom_id", "prompt", "messages", "generation")
# A sender who cannot make sense of a line of a file sends the reason instead, so that the line is not lost without a trace.
UNREADABLE = "unreadable"
LONGEST_REASON = 500
LONGEST_CUSTOM_ID = 512
# Settings of chat APIs that we do not offer yet, each with the values that ask for nothing beyond what we do.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "stream": (None, False),
    "echo": (None, False),
    "suffix": (None,),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class _WrongRow(Exception):
    """One row cannot run; the message says why and never quotes the prompt."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code=code, message=message)


def check_rows(rows: Sequence[Any], generation: GenerationConfig) -> list[NewRow]:
    """One NewRow per given row, in order, numbered from 0; a wrong one carries its error and an empty request.

    Raises InvalidJob for no rows and for a `custom_id` that is used twice.
    """
    if not rows:
        raise InvalidJob("The job has no rows.", param="rows", remedy='Give at least one row, such as {"prompt": "Hello"}.')
    given = _given_ids(rows)
    spare = _spare_ids(rows, taken=set(given))
    named = {row: custom_id for custom_id, row in given.items()}
    return [_check(number, row, named.get(number) or next(spare), generation) for number, row in enumerate(rows)]


def refuse_media(rows: Sequence[NewRow], taken: Collection[ModelModality], model: str) -> list[NewRow]:
    """The same rows; one that brings what the plan does not take, as an image to a model of text, gets an error instead."""
    return [_refused_unless_taken(row, taken, model) for row in rows]


def _refused_unless_taken(row: NewRow, taken: Collection[ModelModality], model: str) -> NewRow:
    strange = sorted(modalities_of(row.request.get("messages")) - set(taken))
    if row.error is not None or not strange:
        return row
    message = f"{model} takes {' and '.join(sorted(taken))}, no {' and no '.join(strange)}; name a model that does, or send text."
    return replace(row, request={}, error=RowError(code="unsupported_content", message=message))


def _given_ids(rows: Sequence[Any]) -> dict[str, int]:
    """The rows by the `custom_id` that their user gave. Raises InvalidJob naming both rows of a duplicate."""
    given: dict[str, int] = {}
    for number, row in enumerate(rows):
        custom_id = row.get("custom_id") if isinstance(row, Mapping) else None
        if not isinstance(custom_id, str) or not _is_good_id(custom_id):
            continue
        first = given.setdefault(custom_id, number)
        if first != number:
            raise InvalidJob(
                f"custom_id `{custom_id}` is used by row {first} and by row {number} (counted from 0).",
                param=f"rows[{number}].custom_id",
                remedy="Give each row a custom_id of its own, or none.",
            )
    return given


def _spare_ids(rows: Sequence[Any], *, taken: set[str]) -> Iterator[str]:
    """A `custom_id` for each row without a usable one, in order: `row-N`, or a longer one where the user took that."""
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and _is_good_id(row.get("custom_id")):
            continue
        custom_id = f"row-{number}"
        while custom_id in taken:
            custom_id += "-"
        taken.add(custom_id)
        yield custom_id


def _is_good_id(custom_id: Any) -> bool:
    return isinstance(custom_id, str) and 0 < len(custom_id) <= LONGEST_CUSTOM_ID and _is_text(custom_id)


def _is_text(text: str) -> bool:
    """Whether it is Unicode text: half of a surrogate pair, which JSON can carry, is none and cannot be tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(number: int, row: Any, custom_id: str, generation: GenerationConfig) -> NewRow:
    try:
        return NewRow(row=number, custom_id=custom_id, request=_request(row, generation))
    except _WrongRow as wrong:
        return NewRow(row=number, custom_id=custom_id, request={}, error=wrong.error)


def _request(row: Any, generation: GenerationConfig) -> dict[str, Any]:
    """What is kept of a row: its prompt or messages, and its own generation settings. Raises _WrongRow."""
    if not isinstance(row, Mapping):
        raise _WrongRow("invalid_row", f"The row is {_kind(row)}, not an object with a prompt or messages.")
    if isinstance(row.get(UNREADABLE), str):
        raise _WrongRow("unreadable_row", printable(row[UNREADABLE][:LONGEST_REASON]))
    _refuse_unsupported(row, but=ROW_FIELDS)
    if row.get("custom_id") is not None and not _is_good_id(row["custom_id"]):
        raise _WrongRow("invalid_custom_id", f"custom_id must be a text of 1 to {LONGEST_CUSTOM_ID} characters.")
    request: dict[str, Any] = _prompt_or_messages(row)
    own = row.get("generation")
    if own is not None:
        request["generation"] = _own_generation(own, generation)
    return request


def _refuse_unsupported(settings: Mapping[str, Any], *, but: Sequence[str] = ()) -> None:
    for name, value in settings.items():
        if name in but:
            continue
        if name not in _UNSUPPORTED:
            raise _WrongRow("unknown_field", f"`{shown(name)}` is not a field of a row. Allowed: {', '.join(ROW_FIELDS)}.")
        if not _asks_for_nothing(name, value):
            raise _WrongRow("unsupported_option", f"`{shown(name)}` is not supported yet.")


def _asks_for_nothing(name: str, value: Any) -> bool:
    return any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in _UNSUPPORTED[name])


def _prompt_or_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is not None and messages is not None:
        raise _WrongRow("invalid_row", "The row has both a prompt and messages; give one of them.")
    if messages is not None:
        return {"messages": _messages(messages)}
    if prompt is None or prompt == "":
        raise _WrongRow("prompt_missing", "The row has neither a prompt nor messages.")
    if not isinstance(prompt, str):
        raise _WrongRow("invalid_prompt", f"prompt must be a text, not {_kind(prompt)}.")
    if not _is_text(prompt):
        raise _WrongRow("invalid_prompt", "prompt holds half of a surrogate pair, which is not Unicode text.")
    return {"prompt": prompt}


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _WrongRow("invalid_messages", "messages must be a list with at least one message.")
    kept = [_message(number, message) for number, message in enumerate(messages)]
    if sum(1 for _ in media_parts(kept)) > MOST_PARTS:
        raise _WrongRow("content_too_large", f"The row has more than {MOST_PARTS} images and sounds.")
    return kept


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _WrongRow("invalid_messages", f"messages[{number}] is {_kind(message)}, not an object.")
    kept: dict[str, Any] = {}
    for name, value in message.items():
        if name not in ("role", "content", "name"):
            if value:
                raise _WrongRow("unsupported_option", f"messages[{number}].{shown(name)} is not supported yet.")
            continue
        if value is None and name == "name":
            continue
        text = _content(number, value) if name == "content" else value
        if name == "content" and isinstance(text, list):
            kept[name] = text
            continue
        if not isinstance(text, str) or not _is_text(text) or (name == "role" and not text):
            raise _WrongRow("invalid_messages", f"messages[{number}].{name} must be a text.")
        kept[name] = text
    for name in ("role", "content"):
        if name not in kept:
            raise _WrongRow("invalid_messages", f"messages[{number}] has no {name}.")
    return kept


def _content(number: int, content: Any) -> Any:
    """The text of a message; a list of text parts becomes one text, one with images or sounds stays a list."""
    if not isinstance(content, list):
        return content
    kept = [_part(number, part) for part in content]
    if all(part["type"] == "text" for part in kept):
        return "".join(part["text"] for part in kept)
    return kept


def _part(number: int, part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise _WrongRow("invalid_messages", f"messages[{number}].content: a part is {_kind(part)}, not an object.")
    if part.get("type") != "text":
        try:
            return kept_part(part)
        except WrongPart as wrong:
            raise _WrongRow(wrong.code, f"messages[{number}].content: {wrong.message}") from wrong
    if not isinstance(part.get("text"), str) or not _is_text(part["text"]):
        raise _WrongRow("invalid_messages", f"messages[{number}].content: a part of type `text` needs a text.")
    return {"type": "text", "text": part["text"]}


def _own_generation(own: Any, generation: GenerationConfig) -> dict[str, Any]:
    if not isinstance(own, Mapping):
        raise _WrongRow("invalid_option", f"generation must be an object, not {_kind(own)}.")
    unsupported = {name: value for name, value in own.items() if name in _UNSUPPORTED}
    _refuse_unsupported(unsupported)
    settings = {name: value for name, value in own.items() if value is not None and name not in _UNSUPPORTED}
    try:
        generation.merged_with(settings)
    except InvalidOption as wrong:
        raise _WrongRow("invalid_option", wrong.message) from wrong
    return settings


def _kind(value: Any) -> str:
    """The JSON word for a value's type."""
    if value is None:
        return "null"
    words = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return words.get(type(value), "something else")
