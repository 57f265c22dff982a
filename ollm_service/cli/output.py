"""How does a command speak? Tables and sentences to people, JSON to programs, errors as sentences and exit codes."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ollm_service.core.errors import (
    InvalidExpression,
    InvalidOption,
    InvalidReference,
    MisconfiguredService,
    ModelNotFound,
    OllmError,
    PlanNotExecutable,
    RequestError,
    printable,
)

FAILED = 1
WRONG_INPUT = 2
NOT_EXECUTABLE = 3
_WRONG_INPUT = (InvalidOption, InvalidReference, InvalidExpression, ModelNotFound, MisconfiguredService)
_LINE_BREAKS = str.maketrans({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})

# A number of bytes in a reason: one that says so, or one of at least seven digits, which is never a number of tokens.
_BYTES = re.compile(r"\d[\d,]* bytes|\d{1,3}(?:,\d{3}){2,}")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or one on each line.")]


def exit_code(error: OllmError) -> int:
    """2 for a bad option, setting or reference, 3 for a plan that is not executable, 1 for everything else.

    An option that only the service judges is a field that it refuses.
    """
    if isinstance(error, PlanNotExecutable):
        return NOT_EXECUTABLE
    is_wrong_input = isinstance(error, _WRONG_INPUT) or error.code == RequestError.code
    return WRONG_INPUT if is_wrong_input else FAILED


def report(error: OllmError, *, as_json: bool) -> None:
    """Say on standard error what went wrong and what to do about it."""
    if as_json:
        envelope = {"code": error.code, "message": error.message, "param": error.param, "remedy": error.remedy}
        tell(json.dumps({"error": envelope}))
        return
    remedy = error.remedy if error.remedy and error.remedy not in error.message else None
    tell(f"ollm-service: {error.message}" + (f"\n{remedy}" if remedy else ""))


def tell(sentence: str) -> None:
    """One line for people, on standard error."""
    typer.echo(sentence, err=True)


def say(sentence: str) -> None:
    """One line on standard output."""
    typer.echo(sentence)


def json_line(value: Any) -> bytes:
    """One line of JSON in UTF-8, which no reader takes for two."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_BREAKS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def print_json(value: Any) -> None:
    """One object on one line of standard output."""
    sys.stdout.buffer.write(json_line(value))
    sys.stdout.buffer.flush()


def print_json_lines(values: Iterable[Any]) -> None:
    """An object on each line."""
    for value in values:
        print_json(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table. Where nobody looks, its columns are only aligned and nothing is cut off."""
    texts = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=number == 0)
        for row in texts:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    lines = [list(columns), *texts]
    widths = [max(_width(line, number) for line in lines) for number in range(len(columns))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _width(line: Sequence[str], number: int) -> int:
    """What a cell takes of its column: nothing where it ends its line, as a remark below a row does, or a reason in its place."""
    return len(line[number]) if any(line[number + 1 :]) else 0


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values below each other; values that are not there are left out."""
    shown = {name: printable(str(value)) for name, value in facts.items() if value is not None and value != ""}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        say(f"{name.ljust(width)}  {value}")


def bytes_in_words(size: int | float | None) -> str:
    """`5.2 GiB`; empty where it is not known."""
    if size is None:
        return ""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def reason_in_words(reason: str) -> str:
    """A reason with its bytes as a person reads them."""

    def words(found: re.Match[str]) -> str:
        return bytes_in_words(int(found[0].removesuffix(" bytes").replace(",", "")))

    return _BYTES.sub(words, reason)


def count(number: int, noun: str) -> str:
    """`1 row`, `12,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
