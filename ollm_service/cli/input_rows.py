"""Which rows does a file hold? JSONL of ours, OpenAI batch lines, or CSV; a line that cannot be read becomes a row that fails.

Nothing that a line asks for is dropped: what this reader does not know goes to the service as it stands, which refuses that
row by name. Only settings of value null, and those of OpenAI's body that ask for nothing, are left out.
"""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollm_service.core.errors import InvalidJob, InvalidOption

STDIN = "-"
# A field of OpenAI's body and ours; the newer of two names for one thing comes first and wins.
_GENERATION_NAMES: Mapping[str, str] = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop": "stop",
}
_PROMPT_FIELD: Mapping[str, str] = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
# A CSV field may be a whole document; the reader's own limit is 128 KiB.
LONGEST_CSV_FIELD = 1 << 30
# Several times what a service accepts in one body: more than that is the wrong file, and reading on would fill the memory.
LONGEST_INPUT = 2 << 30
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRows:
    """The rows of a file as they are sent, and the model that its batch lines name."""

    rows: tuple[Mapping[str, Any], ...]
    model: str | None = None


def read_rows(path: str, *, model: str | None, prompt_column: str | None = None, longest: int = LONGEST_INPUT) -> InputRows:
    """The rows of a file; `-` is standard input. A name ending in `.csv`, or a `prompt_column`, makes it CSV.

    Raises InvalidJob for a file that is empty, cannot be read or has more than `longest` bytes, InvalidOption for a
    `prompt_column` that is not there.
    """
    content = _content(path, longest)
    if prompt_column is not None or path.lower().endswith(".csv"):
        rows = tuple(_with_own_ids(read_csv(content, prompt_column)))
        read = InputRows(rows=rows, model=model)
    else:
        read = read_json_lines(content, model=model)
    if not read.rows:
        raise InvalidJob(f"{_name(path)} holds no rows.", param="FILE")
    return read


def read_json_lines(content: bytes, *, model: str | None) -> InputRows:
    """The rows of JSONL. Lines end at a line feed; blank ones do not count. The first batch line's model is the job's."""
    rows: list[Mapping[str, Any]] = []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _object(line)
        except ValueError as error:
            rows.append(_unreadable(number, str(error)))
            continue
        if is_batch_line(row):
            named = row["body"].get("model")
            model = model or (named if isinstance(named, str) and named else None)
            row = from_batch_line(row, model=model, number=number)
        rows.append(row)
    return InputRows(rows=tuple(_with_own_ids(rows)), model=model)


def is_batch_line(row: Mapping[str, Any]) -> bool:
    """Whether it is a line of OpenAI's batch format."""
    return isinstance(row.get("body"), Mapping) and ("url" in row or "method" in row)


def from_batch_line(line: Mapping[str, Any], *, model: str | None, number: int) -> dict[str, Any]:
    """OpenAI's batch line as a row of ours. What does not fit is kept under its own name, so that the service refuses it."""
    row: dict[str, Any] = {name: value for name, value in line.items() if name not in ("method", "url", "body")}
    if line.get("method", "POST") != "POST":
        row["method"] = line["method"]
    url = line.get("url")
    wanted = _PROMPT_FIELD.get(url) if isinstance(url, str) else None
    if wanted is None:
        row["url"] = url
    generation: dict[str, Any] = {}
    for name, value in line["body"].items():
        if value is None or (name == "model" and value == model):
            continue
        if name == "model":
            row["unreadable"] = f"line {number} asks for the model {value!r}, but the job is for {model!r}"
        elif name in _GENERATION_NAMES:
            _put_newer(generation, name, value, line["body"])
        else:
            row[name] = value
    if generation:
        row["generation"] = generation
    return row


def _put_newer(generation: dict[str, Any], name: str, value: Any, body: Mapping[str, Any]) -> None:
    ours = _GENERATION_NAMES[name]
    preferred = next(other for other, same in _GENERATION_NAMES.items() if same == ours and body.get(other) is not None)
    if name == preferred:
        generation[ours] = value


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError in words for people."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"not JSON ({constant} is not a number of JSON)")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is too large a number")
    return value


def _unreadable(line: int, why: str) -> dict[str, Any]:
    return {"custom_id": f"line-{line}", "unreadable": f"line {line} is {why}"}


def _with_own_ids(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows, no unreadable one of which has the `custom_id` of a good one: a duplicate would refuse the whole job."""
    rows = list(rows)
    taken = {str(row.get("custom_id")) for row in rows if "unreadable" not in row}
    for row in rows:
        if "unreadable" in row and row["custom_id"] in taken:
            yield {name: value for name, value in row.items() if name != "custom_id"}
        else:
            yield row


def read_csv(content: bytes, prompt_column: str | None) -> Iterator[dict[str, Any]]:
    """A row per record, its prompt from one column, its `custom_id` from the column of that name if there is one.

    Raises InvalidJob and InvalidOption.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InvalidJob(f"Line {line} of the CSV file is not UTF-8.", param="FILE") from error
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        column = _prompt_column(columns, prompt_column)
        for record in reader:
            if None in record:  # most often a comma in a prompt that stands without quotes
                yield _unreadable(reader.line_num, f"longer than the header, which has {len(columns)} columns")
                continue
            row: dict[str, Any] = {"prompt": record[column] or ""}
            if record.get("custom_id") and column != "custom_id":
                row["custom_id"] = record["custom_id"]
            yield row
    except csv.Error as error:
        raise InvalidJob(f"Line {reader.line_num} of the CSV file cannot be read: {error}.", param="FILE") from error


def _prompt_column(columns: list[str], asked: str | None) -> str:
    if not columns:
        raise InvalidJob("The CSV file is empty; its first line must name the columns.", param="FILE")
    if asked is None and "prompt" not in columns:
        raise InvalidOption("--prompt-column", "say which column holds the prompts", allowed=columns)
    if asked is not None and asked not in columns:
        raise InvalidOption("--prompt-column", f"the file has no column `{asked}`", allowed=columns)
    return asked or "prompt"


def _content(path: str, longest: int) -> bytes:
    content = bytearray()
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == STDIN else Path(path).open("rb") as file:
            while len(content) <= longest and (chunk := file.read(_CHUNK)):
                content += chunk
    except OSError as error:
        raise InvalidJob(f"{_name(path)} cannot be read: {error.strerror}.", param="FILE") from error
    if len(content) > longest:
        raise InvalidJob(f"{_name(path)} is over {longest:,} bytes.", param="FILE", remedy="Split it into several jobs.")
    return bytes(content)


def _name(path: str) -> str:
    return "Standard input" if path == STDIN else path
