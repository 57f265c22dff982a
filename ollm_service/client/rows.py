"""In which forms may a caller give rows, and what is sent for each? The service judges them; here nothing is dropped."""

from collections.abc import Iterable, Mapping
from typing import Any

from ollm_service.core.errors import InvalidJob

Row = str | list[Mapping[str, Any]] | Mapping[str, Any]


def row_to_send(row: Any) -> Any:
    """A text is a prompt, a list of messages a conversation, a mapping a row as the service takes it; the rest goes as it is."""
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, list | tuple):
        return {"messages": list(row)}
    if isinstance(row, Mapping):
        return dict(row)
    return row


def rows_to_send(rows: Iterable[Any]) -> list[Any]:
    """Every row as it is sent. Raises InvalidJob for what is not a collection of rows: one text, most often."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise InvalidJob(
            f"rows must be a list of rows, not {type(rows).__name__}.", param="rows", remedy='Write [row], such as ["Hello"].'
        )
    return [row_to_send(row) for row in rows]
