"""How does a hint travel? All of Celery's configuration, the queue names, and the publisher that never blocks its caller.

A message says "class C has work" and nothing else: the database decides, so any message may be lost, late or doubled. Hence
early acknowledgement, no result backend, no retry, no schedule; and hence short timeouts, since a broker that hangs must cost a
hint and never a request.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.exceptions import CeleryError
from kombu import Connection, Exchange, Queue
from kombu.exceptions import KombuError

from ollm_service.core.errors import MisconfiguredService
from ollm_service.settings import MEMORY_BROKER

RUN_NEXT = "ollm.run_next"
QUEUE_PREFIX = "ollm.class."
IDLE_QUEUE = "ollm.none"  # known by name only, never consumed: Celery wants a default queue
HINT_SECONDS = 5
QUEUE_IDLE_MS = 600_000  # RabbitMQ removes a class's queue when nobody has used it for so long
CONNECT_SECONDS = 2
SOCKET_SECONDS = 3.0
MOST_WAITING_CLASSES = 1_000
MOST_MESSAGES = 64  # of one class at a time
PAUSE_AFTER_ERROR_SECONDS = 1.0

_SCHEMES = ("memory", "redis", "rediss", "amqp", "amqps", "pyamqp", "sentinel")
_PUBLISH_ERRORS = (OSError, KombuError, CeleryError)
_log = logging.getLogger(__name__)


def make_celery(url: str) -> Celery:
    """The Celery app of this process, with every setting that matters written out. Connects to nothing.

    Raises MisconfiguredService for a URL of an unknown kind, and for an empty one, which Celery would take for a RabbitMQ on
    this machine.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in _SCHEMES:
        raise MisconfiguredService(
            f"OLLM_BROKER_URL: `{scheme[:20]}` is not a kind of broker that we speak.",
            remedy="Use redis://…, amqp://…, or memory:// for polling only.",
        )
    app = Celery("ollm", set_as_current=False)
    # Without a host, kombu warns at every connection.
    address = f"{MEMORY_BROKER}localhost//" if scheme == "memory" else url
    app.conf.update(broker_url=address, broker_transport_options=_transport_options(scheme), **_SETTINGS)
    app.conf.task_queues = (Queue(IDLE_QUEUE, Exchange(IDLE_QUEUE), routing_key=IDLE_QUEUE),)
    app.conf.worker_enable_remote_control = scheme != "memory"
    return app


def queue_name(class_id: str) -> str:
    """The name of a class's queue."""
    return f"{QUEUE_PREFIX}{class_id}"


def class_queue(class_id: str) -> Queue:
    """A class's queue, declared alike by those who send and those who consume, else RabbitMQ refuses the second of them.

    The queue is durable (new RabbitMQ refuses others) and its messages are not. It hangs on the default exchange, so that there
    is no binding to make and none to leave behind.
    """
    name = queue_name(class_id)
    return Queue(
        name,
        Exchange("", type="direct", delivery_mode="transient"),
        routing_key=name,
        durable=True,
        expires=QUEUE_IDLE_MS / 1000,
        message_ttl=HINT_SECONDS,
    )


class Hints:
    """Sends hints from one background thread; the caller never waits and never sees an error.

    What cannot be sent is dropped: the sweep hints again and workers poll. Without a broker (`memory://`) there is no thread and
    every hint is dropped.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: dict[str, int] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_up: bool | None = None
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        if not str(app.conf.broker_url).startswith(MEMORY_BROKER):
            self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
            self._thread.start()

    @property
    def is_up(self) -> bool | None:
        """Whether the last hint reached the broker; None before the first, and without a broker."""
        return self._is_up

    def send(self, class_id: str, count: int = 1) -> None:
        """Ask `count` workers to look for work of this class. Returns at once."""
        if self._thread is None or count < 1:
            return
        with self._changed:
            if class_id in self._waiting or len(self._waiting) < MOST_WAITING_CLASSES:
                self._waiting[class_id] = min(MOST_MESSAGES, self._waiting.get(class_id, 0) + count)
                self._changed.notify()

    def close(self) -> None:
        """Drop what is waiting and end the thread. Returns within a few seconds, however the broker is."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=2 * SOCKET_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting)
                if self._is_closed:
                    break
                batch, self._waiting = self._waiting, {}
            try:
                self._publish(batch)
            except _PUBLISH_ERRORS as error:
                self._tell_down(error)
                self._disconnect()
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, timeout=PAUSE_AFTER_ERROR_SECONDS)
                    self._waiting.clear()  # stale by now
            else:
                self._tell_up()
        self._disconnect()

    def _publish(self, batch: Mapping[str, int]) -> None:
        if self._connection is None:
            self._connection = self._app.connection_for_write(
                transport_options=_PUBLISHER_OPTIONS, connect_timeout=CONNECT_SECONDS
            )
            self._connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=CONNECT_SECONDS)
        with self._app.amqp.Producer(self._connection, auto_declare=False) as producer:
            for class_id, count in batch.items():
                self._app.amqp.queues.add(class_queue(class_id))
                for _ in range(count):
                    self._app.send_task(
                        RUN_NEXT,
                        args=(class_id,),
                        queue=queue_name(class_id),
                        producer=producer,
                        expires=HINT_SECONDS,
                        ignore_result=True,
                        retry=False,
                        confirm_timeout=SOCKET_SECONDS,
                    )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            connection.collect(socket_timeout=0.1)  # never waits for a broker that no longer answers
        except _PUBLISH_ERRORS:
            _log.debug("broker-connection-left", exc_info=True)

    def _tell_down(self, error: BaseException) -> None:
        if self._is_up is not False:
            _log.warning(
                "broker-down", extra={"broker": self._app.connection_for_write().as_uri(), "error": type(error).__name__}
            )
        self._is_up = False

    def _tell_up(self) -> None:
        if self._is_up is False:
            _log.info("broker-up", extra={"broker": self._app.connection_for_write().as_uri()})
        self._is_up = True


def _transport_options(scheme: str) -> dict[str, Any]:
    if scheme in ("redis", "rediss", "sentinel"):
        return {
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 5,
            "visibility_timeout": 60,  # seconds; only a hint that a dying worker had taken is redelivered, expired by then
        }
    if scheme == "memory":
        return {"polling_interval": 0.2}
    return {"confirm_publish": True}


# Bounded in every direction: `max_retries` and the intervals hold kombu's own reconnecting, the others one read or write.
_PUBLISHER_OPTIONS: dict[str, Any] = {
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0,
    "read_timeout": SOCKET_SECONDS,
    "write_timeout": SOCKET_SECONDS,
}

_SETTINGS: dict[str, Any] = {
    # JSON only: a forged message may wake a worker and nothing else.
    "accept_content": ["json"],
    "task_serializer": "json",
    "event_serializer": "json",
    "result_backend": None,
    "task_ignore_result": True,
    "task_acks_late": False,
    "task_publish_retry": False,
    "task_default_queue": IDLE_QUEUE,
    "task_create_missing_queues": False,
    "task_default_delivery_mode": "transient",
    "broker_connection_timeout": CONNECT_SECONDS,
    "broker_connection_retry": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_heartbeat": 10,
    "worker_pool": "threads",
    "worker_prefetch_multiplier": 1,
    "worker_enable_prefetch_count_reduction": False,
    # Says nothing about ours, which are acknowledged early; without it every lost connection warns.
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_send_task_events": False,
    "worker_redirect_stdouts": False,
    "worker_disable_rate_limits": True,
}
