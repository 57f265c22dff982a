"""How does a coordinator log? One line an event, its fields as name=value, on standard error."""

import logging
import sys
from datetime import UTC, datetime

# What every record has; everything else on it was given as a field.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class FieldFormatter(logging.Formatter):
    """`time level event name=value …`; values that are not plain words are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it where there is one."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = [f"{name}={_value(value)}" for name, value in vars(record).items() if name not in _PLAIN]
        line = " ".join([at, record.levelname.lower(), record.getMessage(), *fields])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _value(value: object) -> str:
    text = str(value)
    is_plain = text.isprintable() and text and not any(character in " \"'=" for character in text)
    return text if is_plain else repr(text)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send every log line of this process to standard error."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(FieldFormatter())
    logging.basicConfig(level=level, handlers=[output], force=True)
    for noisy in ("httpx", "httpcore", "alembic", "kombu", "amqp", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
