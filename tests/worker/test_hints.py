"""When does a worker take the silence of a broker for a dead connection?"""

from collections.abc import Callable

import pytest

from ollm_service.broker import make_celery
from tests.servers import LOOPBACK, refused_port
from workers.hints import RECONNECT_SECONDS, SILENT_FINDS, SILENT_SECONDS, Hints


class Loop:
    """Celery's consumer, as far as hints use it while nothing is connected: it takes what its thread is to do."""

    task_consumer = connection = None

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Note it."""
        self.waiting.append(callback)


def attached() -> tuple[Hints, Loop]:
    """Hints that Celery's consumer listens to."""
    hints, loop = Hints(make_celery(f"redis://{LOOPBACK}:{refused_port()}/0")), Loop()
    hints.attach(loop)  # type: ignore[arg-type]  # it has what is used of a Consumer
    loop.waiting.clear()
    return hints, loop


def test_work_without_hints_for_long_breaks_the_connection() -> None:
    """In the thread that has it, by the error on which Celery connects anew; again only after five minutes."""
    hints, loop = attached()
    assert [hints.found_without(now) for now in (0.0, 1.0, 2.0, 3.0, SILENT_SECONDS, SILENT_SECONDS + 1)] == [False] * 5 + [True]
    (breaks,) = loop.waiting
    with pytest.raises(ConnectionResetError, match="no hints"):
        breaks()
    broken_at = SILENT_SECONDS + 1
    assert not any(hints.found_without(broken_at + RECONNECT_SECONDS - 1) for _ in range(3 * SILENT_FINDS))
    assert hints.found_without(broken_at + RECONNECT_SECONDS)


def test_a_quiet_broker_is_not_a_dead_one() -> None:
    """Few finds say nothing, however long it takes, nor do many in a short time or soon after a hint."""
    hints, loop = attached()
    assert not any(hints.found_without(now) for now in (0.0, *[10 * SILENT_SECONDS] * (SILENT_FINDS - 2)))
    hints.heard(10 * SILENT_SECONDS)
    assert not any(hints.found_without(11 * SILENT_SECONDS) for _ in range(3 * SILENT_FINDS))
    assert loop.waiting == []


def test_without_a_connection_there_is_none_to_break() -> None:
    """Before Celery has connected, work is found by polling alone."""
    hints = Hints(make_celery(f"redis://{LOOPBACK}:{refused_port()}/0"))
    assert not any(hints.found_without(now * SILENT_SECONDS) for now in range(3 * SILENT_FINDS))
