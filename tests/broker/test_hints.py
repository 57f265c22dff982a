"""Does a hint reach its queue when the broker is well, and cost nothing when it is not?"""

import threading
import time
from collections.abc import Iterator

import pytest
import redis
from celery import Celery
from fakeredis import TcpFakeServer

from ollm_service.broker import MOST_MESSAGES, RUN_NEXT, Hints, class_queue, make_celery, queue_name
from ollm_service.core.errors import MisconfiguredService
from tests.servers import LOOPBACK, Blackhole, RabbitServer, RedisServer, free_port, refused_port
from tests.waiting import wait_for

CALLER_SECONDS = 0.1  # a thousand calls of send() together


@pytest.fixture
def fake_redis_url() -> Iterator[str]:
    """A Redis in this process: no server is needed."""
    port = free_port()
    server = TcpFakeServer((LOOPBACK, port), server_type="redis")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"redis://{LOOPBACK}:{port}/0"
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def received(app: Celery, class_id: str, count: int, *, seconds: float = 10) -> list[tuple[str, list[str]]]:
    """The task names and arguments of the next `count` messages in a class's queue, or of those that came in time."""
    found: list[tuple[str, list[str]]] = []

    def take(body: list[list[str]], message: object) -> None:
        headers = message.headers  # type: ignore[attr-defined]  # kombu's Message, which has no types
        found.append((headers["task"], list(body[0])))
        message.ack()  # type: ignore[attr-defined]  # the same

    with app.connection_for_read() as connection, connection.Consumer(class_queue(class_id), callbacks=[take], accept=["json"]):
        deadline = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < deadline:
            try:
                connection.drain_events(timeout=0.5)
            except TimeoutError:
                continue
    return found


def assert_hints_arrive(url: str) -> None:
    """Hints for two classes arrive, each in its own queue."""
    app = make_celery(url)
    hints = Hints(app)
    try:
        hints.send("c1", 2)
        hints.send("c2", 1)
        assert received(app, "c1", 2) == [(RUN_NEXT, ["c1"])] * 2
        assert received(app, "c2", 1) == [(RUN_NEXT, ["c2"])]
        assert wait_for(lambda: hints.is_up, timeout=5, what="the publisher to see the broker up")
    finally:
        hints.close()


def test_hints_reach_their_queue_on_redis(redis_server: RedisServer) -> None:
    """Each hint becomes a message in its class's queue."""
    assert_hints_arrive(redis_server.url)


def test_hints_reach_their_queue_on_rabbitmq(rabbit_server: RabbitServer) -> None:
    """Publisher and consumer declare a queue alike, so RabbitMQ accepts both."""
    assert_hints_arrive(rabbit_server.url)


def test_hints_need_no_real_server(fake_redis_url: str) -> None:
    """A Redis that is not one serves as well; a connection that it closes costs a hint, so hints are sent until one arrives."""
    app = make_celery(fake_redis_url)
    hints = Hints(app)

    def arrives() -> bool:
        hints.send("c1", 1)
        return received(app, "c1", 1, seconds=0.5)[:1] == [(RUN_NEXT, ["c1"])]

    try:
        wait_for(arrives, timeout=20, what="a hint to arrive")
    finally:
        hints.close()


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_refusing_broker_costs_the_caller_nothing(scheme: str) -> None:
    """send() returns at once though nobody listens, and the publisher tells that the broker is down."""
    hints = Hints(make_celery(f"{scheme}://{LOOPBACK}:{refused_port()}//"))
    assert_cheap_and_down(hints)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_silent_broker_costs_the_caller_nothing(scheme: str) -> None:
    """send() and close() return in bounded time though the broker accepts connections and never answers."""
    with Blackhole() as hole:
        hints = Hints(make_celery(f"{scheme}://{LOOPBACK}:{hole.port}//"))
        assert_cheap_and_down(hints)


def assert_cheap_and_down(hints: Hints) -> None:
    """A thousand sends return at once, the broker is seen to be down, and closing is bounded."""
    started = time.monotonic()
    for number in range(1_000):
        hints.send(f"class-{number % 7}", 3)
    assert time.monotonic() - started < CALLER_SECONDS
    wait_for(lambda: hints.is_up is False, timeout=15, what="the publisher to see the broker down")
    started = time.monotonic()
    hints.close()
    assert time.monotonic() - started < 7


def test_hints_flow_again_after_the_broker_was_down(redis_server: RedisServer) -> None:
    """A broker that comes back, with all its data lost, gets the hints sent from then on."""
    app = make_celery(redis_server.url)
    hints = Hints(app)
    try:
        hints.send("c1", 1)
        wait_for(lambda: hints.is_up, timeout=5, what="the first hint to be sent")
        redis_server.kill()

        def sees_it_down() -> bool:
            hints.send("c1", 1)
            return hints.is_up is False

        wait_for(sees_it_down, timeout=10, what="the publisher to see the broker down")
        redis_server.start()

        def sees_it_up() -> bool:
            hints.send("c1", 1)
            return hints.is_up is True

        wait_for(sees_it_up, timeout=10, what="the publisher to see the broker up")
        assert received(app, "c1", 1)
    finally:
        hints.close()
        if not redis_server.is_running:
            redis_server.start()


def test_a_flood_of_hints_is_cut(redis_server: RedisServer) -> None:
    """What waits for the broker is bounded per class: more hints than workers say nothing new."""
    app = make_celery(redis_server.url)
    hints = Hints(app)
    try:
        hints.send("flood", 10_000)
        assert len(received(app, "flood", MOST_MESSAGES)) == MOST_MESSAGES
        assert redis.Redis(port=redis_server.port).llen(queue_name("flood")) == 0
    finally:
        hints.close()


def test_without_a_broker_hints_vanish() -> None:
    """On `memory://` nothing is sent, and no thread runs."""
    before = threading.active_count()
    hints = Hints(make_celery("memory://"))
    hints.send("c1", 5)
    assert threading.active_count() == before
    assert hints.is_up is None
    hints.close()


@pytest.mark.parametrize("url", ["", "localhost", "sqla+sqlite:///x.db", "file://x"])
def test_only_known_brokers_are_spoken_to(url: str) -> None:
    """An empty URL would dial a RabbitMQ on this machine; a SQL broker loses tasks: both are refused with a sentence."""
    with pytest.raises(MisconfiguredService, match="OLLM_BROKER_URL"):
        make_celery(url)


def test_the_app_is_nobody_elses() -> None:
    """JSON only, no results, early acknowledgement, and not the ambient app of the process."""
    app = make_celery("memory://")
    assert app.conf.accept_content == ["json"]
    names = ("result_backend", "task_acks_late", "worker_pool", "worker_prefetch_multiplier")
    assert [app.conf[name] for name in names] == [None, False, "threads", 1]
