"""What if the metal fails? The real runner with the real model, which dies on marked prompts.

Run it in the place of the real one: `OLLM_RUNNER_COMMAND="PYTHON -m tests.runner.faulty_runner"`. A prompt that contains
`[crash]` kills the process by SIGSEGV while its micro-batch is in flight; `[crash-batch]` only while the row is not alone;
`[surprise]` raises what nobody expects there.
"""

import os
import signal
import sys
from threading import Event

from ollm_service.core.leasing import WorkRow
from ollm_service.core.wire import BatchStarted, Execute, Message
from workers.runner.__main__ import Executes, load_engine, main
from workers.runner.progress import Report


class FaultyEngine:
    """Passes everything on to the real engine, and dies when a marked row is in flight."""

    def __init__(self) -> None:
        self._engine: Executes = load_engine()

    def execute(self, command: Execute, report: Report, stop: Event) -> None:
        """As the real engine does, until a marked row."""
        rows = {row.row: row for row in command.rows}

        def watched(message: Message) -> None:
            report(message)
            if not isinstance(message, BatchStarted):
                return
            if any(_kills(rows[row], len(message.rows)) for row in message.rows):
                os.kill(os.getpid(), signal.SIGSEGV)
            if any("[surprise]" in _text(rows[row]) for row in message.rows):
                raise LookupError("as told")

        self._engine.execute(command, watched, stop)

    def abandon(self) -> None:
        """As the real engine does."""
        self._engine.abandon()

    def has_lost(self, device_id: str) -> bool:
        """As the real engine does."""
        return self._engine.has_lost(device_id)


def _kills(row: WorkRow, batch_size: int) -> bool:
    text = _text(row)
    return "[crash]" in text or ("[crash-batch]" in text and batch_size > 1)


def _text(row: WorkRow) -> str:
    return f"{row.prompt} {row.messages}"


if __name__ == "__main__":
    main(sys.argv[1:], FaultyEngine)
