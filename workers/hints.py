"""Which queues does this worker listen to now, and do hints still come? The agent's side of the broker.

Celery consumes in a thread of its own, so everything that touches its consumer is handed over to that thread.
"""

import threading
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals
from celery.bootsteps import RUN  # type: ignore[attr-defined]  # the stubs leave it out
from celery.worker import state
from celery.worker.consumer import Consumer

from ollm_service.broker import IDLE_QUEUE, class_queue, queue_name

FULL_SECONDS = 0.25  # how long every slot is taken before hints are left to other workers
SILENT_FINDS, SILENT_SECONDS, RECONNECT_SECONDS = 5, 60.0, 300.0
IDLE_LOOP_SECONDS = 0.1


class HintConsumer(Consumer):
    """Celery's consumer without what hints do not need: no gossip, no mingling at the start, no heartbeat events."""

    def __init__(self, *args: Any, worker_options: Mapping[str, Any] | None = None, **options: Any) -> None:
        without = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
        options["worker_options"] = {**(worker_options or {}), **without}
        super().__init__(*args, **options)

    def cancel_active_requests(self) -> None:
        """A cold shutdown begins: say so before Celery waits for its threads, which it cannot kill; the agent ends the plans."""
        signals.worker_shutting_down.send(sender=self.hostname, sig="SIGQUIT", how="Cold", exitcode=1)


class BrokerlessConsumer(HintConsumer):
    """On `memory://` nobody sends anything: wait for the end, and notice it at once."""

    @staticmethod
    def loop(consumer: Consumer, *_: Any) -> None:
        """Celery's event loop without events."""
        consumer.on_ready()
        pause = threading.Event()
        while consumer.blueprint.state == RUN:
            state.maybe_shutdown()
            pause.wait(IDLE_LOOP_SECONDS)


class Hints:
    """What the agent says about its queues, and hears of hints. `attach` gives it Celery's running worker.

    Work that is found for longer than `silent_seconds` without any hint makes the connection suspect.
    """

    def __init__(self, app: Celery, *, silent_seconds: float = SILENT_SECONDS) -> None:
        self._app = app
        self._silent_seconds = silent_seconds
        self._consumer: Any = None  # a Consumer; the stubs know little of it
        self._wanted: frozenset[str] = frozenset()
        self._full_since: float | None = None
        self._heard_at: float | None = None
        self._reconnected_at = float("-inf")
        self._silent_finds = 0
        app.amqp.queues.deselect([IDLE_QUEUE])

    def attach(self, consumer: Consumer) -> None:
        """Celery is connected (again): have it consume what is wanted now."""
        self._consumer = consumer
        consumer.call_soon(self._apply)

    def choose(self, classes: frozenset[str], *, is_full: bool, now: float) -> None:
        """Consume the queues of these classes while a slot is free; a full worker leaves hints to others."""
        self._full_since = (self._full_since or now) if is_full else None
        has_been_full = self._full_since is not None and now - self._full_since >= FULL_SECONDS
        wanted = frozenset() if has_been_full else frozenset(queue_name(class_id) for class_id in classes)
        if wanted != self._wanted:
            for class_id in classes:
                self._app.amqp.queues.add(class_queue(class_id))
            self._wanted = wanted
            if self._consumer is not None:
                self._consumer.call_soon(self._apply)

    def heard(self, now: float) -> None:
        """A hint came."""
        self._heard_at, self._silent_finds = now, 0

    def found_without(self, now: float) -> bool:
        """The idle poll found work. When that goes on with no hint at all, the connection may be dead: it is made anew.

        Returns whether it was.
        """
        self._silent_finds += 1
        self._heard_at = now if self._heard_at is None else self._heard_at
        is_silent = self._silent_finds >= SILENT_FINDS and now - self._heard_at > self._silent_seconds
        if self._consumer is None or not is_silent or now - self._reconnected_at < RECONNECT_SECONDS:
            return False
        self._silent_finds, self._reconnected_at = 0, now
        self._consumer.call_soon(_break_connection)
        return True

    def _apply(self) -> None:
        """In Celery's thread: make its consumer consume what is wanted, no more and no less."""
        consumer = self._consumer
        if consumer is None or consumer.task_consumer is None or consumer.connection is None:
            return  # not connected; attach() comes again when it is
        wanted = self._wanted
        consumed = {queue.name for queue in consumer.task_consumer.queues}
        for name in sorted(wanted - consumed):
            consumer.add_task_queue(name)
        for name in sorted(consumed - wanted):
            consumer.cancel_task_queue(name)


def _break_connection() -> None:
    raise ConnectionResetError("no hints came though there was work")
