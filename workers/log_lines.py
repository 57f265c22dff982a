"""What does a line of this worker's log look like? The time, the event, and its fields as `name=value`."""

import logging
import sys
from typing import Any

_KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "data", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the fields that were passed as `extra`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it where there is one."""
        fields = {name: value for name, value in record.__dict__.items() if name not in _KNOWN}
        line, newline, rest = super().format(record).partition("\n")
        return " ".join([line, *(f"{name}={_quoted(value)}" for name, value in fields.items())]) + newline + rest


def set_up_logging(level: int) -> None:
    """Log to standard error. What others say about single messages and schema checks is left to level DEBUG."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    if level > logging.DEBUG:
        for chatty in ("celery.worker.strategy", "celery.app.trace", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)


def _quoted(value: Any) -> str:
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text
