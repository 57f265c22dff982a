"""How are values kept in columns: JSON, untrusted text, and the database's own clock?"""

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, Column, ColumnElement, Label, Text, type_coerce
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class JsonText(TypeDecorator[Any]):
    """JSON types as JSON text; None is NULL.

    Text and not the database's JSON type: prompts and answers may hold NUL characters and lone surrogates, which PostgreSQL
    refuses in its own types and which JSON escapes carry on both databases.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """To JSON text, readable where it can be encoded."""
        return None if value is None else encode_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """From JSON text."""
        return None if value is None else json.loads(value)


class PlainText(TypeDecorator[str]):
    """Text for people, from anywhere: what the databases cannot hold (NUL, lone surrogates) becomes a replacement mark."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """The text without what cannot be stored."""
        if value is None:
            return None
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def as_text(column: Column[Any]) -> Label[str]:
    """A JSON column as the text that it is stored as: what cannot be decoded does not spoil the other rows of an answer."""
    return type_coerce(column, Text).label(column.name)


def undecoded(columns: Iterable[Column[Any]]) -> tuple[ColumnElement[Any], ...]:
    """These columns, those that hold JSON as text."""
    return tuple(as_text(column) if isinstance(column.type, JsonText) else column for column in columns)


class now_ms(FunctionElement[int]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock at this very moment (not at the transaction's start), in epoch milliseconds."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "postgresql")
def _now_on_postgresql(element: now_ms, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(now_ms, "sqlite")
def _now_on_sqlite(element: now_ms, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"


class byte_length(FunctionElement[int]):  # noqa: N801 - reads as the SQL function that it is
    """The bytes of a text as UTF-8."""

    type = BigInteger()
    inherit_cache = True


@compiles(byte_length, "postgresql")
def _bytes_on_postgresql(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(byte_length, "sqlite")
def _bytes_on_sqlite(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


def encode_json(value: Any) -> str:
    """JSON text that is valid UTF-8: non-ASCII characters as themselves unless a lone surrogate is among them."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text
