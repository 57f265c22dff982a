"""Is `celery -A workers.app worker` a good citizen? Real worker processes, on every broker and on none."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from ollm_service.broker import QUEUE_PREFIX, Hints, make_celery, queue_name
from ollm_service.core.lifecycle import ExecutionState as State
from tests.servers import LOOPBACK, PostgresServer, RabbitServer, RedisServer, kill_tree, refused_port
from tests.waiting import wait_for
from tests.worker.place import SECONDS, Place
from workers.hints import SILENT_FINDS

OURS = "workers.app"


class WorkerProcess:
    """One Celery worker as a process, its log in a file."""

    def __init__(self, place: Place, number: int, *, app: str = OURS, **settings: str) -> None:
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-l", "INFO"]
        self.log = place.directory / f"worker-{number}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=dict(place.environment(**settings)), stdout=output, stderr=output, start_new_session=True
            )

    def says(self, text: str) -> bool:
        """Whether its log contains the text."""
        return text in self.log.read_text(errors="replace")

    def wait_until_it_says(self, text: str) -> None:
        """Wait for a text in the log."""
        wait_for(lambda: self.says(text) or self.process.poll() is not None, timeout=SECONDS, what=f"`{text}` in the log")
        assert self.says(text), self.log.read_text(errors="replace")[-3000:]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=SECONDS)


@contextmanager
def worker(place: Place, *, number: int = 0, app: str = OURS, **settings: str) -> Iterator[WorkerProcess]:
    """A worker that is ready; killed at the end with all its children if it still runs."""
    started = WorkerProcess(place, number, app=app, **settings)
    try:
        started.wait_until_it_says("worker-started")
        yield started
    finally:
        kill_tree(started.process)


@pytest.fixture
def shared(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[Place]:
    """A place on PostgreSQL, as fleets have it."""
    url = postgres_server.create_database()
    made = Place(tmp_path, url)
    yield made
    made.close()
    postgres_server.drop_database(url)


def class_of(place: Place, job_id: str) -> str:
    """The class of the job's first plan."""
    return place.details(job_id)[0].plan.class_id


def test_a_worker_needs_no_broker(place: Place) -> None:
    """On `memory://` it polls; SIGTERM ends it with 0, retired, with no runner left."""
    with worker(place) as one:
        job = place.submit(["a", "b"], ["c"])
        place.wait_for_end(job)
        assert one.end() == 0
    assert place.texts(job) == {0: "A", 1: "B", 2: "C"}
    assert [view.state for view in place.store.fleet.workers(active_only=False)] == ["gone"]


def test_sigterm_lets_a_plan_finish(place: Place) -> None:
    """A warm shutdown drains: what runs is finished, what waits is left."""
    job = place.submit(["[slow=2]"], ["left"])
    with worker(place) as one:
        place.wait_for_state(job, State.RUNNING)
        assert one.end() == 0
    assert [detail.plan.state for detail in place.details(job)] == [State.SUCCEEDED, State.QUEUED]


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGQUIT), (signal.SIGINT, signal.SIGINT)],
)
def test_a_second_signal_ends_it_at_once(place: Place, first: signal.Signals, second: signal.Signals) -> None:
    """Whoever is in a hurry signals twice: the plan is released."""
    job = place.submit(["[stubborn]"])
    with worker(place) as one:
        place.wait_for_state(job, State.RUNNING)
        one.process.send_signal(first)
        one.wait_until_it_says("draining")
        one.end(second)
    assert place.details(job)[0].plan.state == State.QUEUED
    assert place.details(job)[0].plan.losses == 0


def test_sigquit_alone_ends_it_at_once(place: Place) -> None:
    """A cold shutdown kills the runner and releases the plan."""
    job = place.submit(["[slow=600]"])
    with worker(place) as one:
        place.wait_for_state(job, State.RUNNING)
        one.end(signal.SIGQUIT)
    assert place.details(job)[0].plan.state == State.QUEUED


def test_sigquit_releases_a_plan_that_a_hint_brought(shared: Place, redis_server: RedisServer) -> None:
    """A plan that runs in Celery's own thread ends at once, too."""
    hints = Hints(make_celery(redis_server.url))
    with worker(shared, OLLM_BROKER_URL=redis_server.url) as one:
        class_id = class_of(shared, warm_up(shared))
        one.wait_until_it_says("Started consuming")
        job = shared.submit(["[slow=600]"])
        hints.send(class_id, 1)
        shared.wait_for_state(job, State.RUNNING)
        one.end(signal.SIGQUIT)
        assert not one.says("Traceback"), one.log.read_text()
    hints.close()
    assert shared.details(job)[0].plan.state == State.QUEUED


def test_an_operators_drain_ends_the_process(place: Place) -> None:
    """Asked to leave through the database, it leaves with 0."""
    with worker(place, OLLM_LEASE_SECONDS="2") as one:
        place.store.fleet.drain("here")
        assert one.process.wait(timeout=SECONDS) == 0


def test_wrong_settings_are_told_in_a_sentence(place: Place) -> None:
    """No traceback, and exit status 2."""
    bad = WorkerProcess(place, 0, OLLM_BROKER_URL="carrier-pigeon://x")
    assert bad.process.wait(timeout=SECONDS) == 2
    assert bad.says("carrier-pigeon")
    assert not bad.says("Traceback")


def test_a_database_that_is_down_is_told_in_a_sentence(place: Place) -> None:
    """No traceback, no password, and exit status 1 after a few seconds of patience."""
    url = f"postgresql+psycopg://me:secret@{LOOPBACK}:{refused_port()}/none"
    bad = WorkerProcess(place, 0, OLLM_DATABASE_URL=url)
    assert bad.process.wait(timeout=SECONDS) == 1
    assert bad.says("ollm-service worker: The database")
    assert not bad.says("Traceback")
    assert not bad.says("secret")


@pytest.mark.serial
def test_a_hint_wakes_a_worker_on_redis(shared: Place, redis_server: RedisServer) -> None:
    """A hinted plan is claimed much sooner than the idle poll would."""
    assert_hints_wake(shared, redis_server.url)


@pytest.mark.serial
def test_a_hint_wakes_a_worker_on_rabbitmq(shared: Place, rabbit_server: RabbitServer) -> None:
    """The same over AMQP."""
    assert_hints_wake(shared, rabbit_server.url)


def assert_hints_wake(place: Place, url: str) -> None:
    """Ten hinted plans are claimed in a fraction of the poll's time, on average."""
    hints = Hints(make_celery(url))
    try:
        with worker(place, OLLM_BROKER_URL=url) as one:
            class_id = class_of(place, warm_up(place))
            one.wait_until_it_says(f"Started consuming from {queue_name(class_id)}")
            waits = []
            for number in range(10):
                started = time.monotonic()
                job = place.submit([f"hinted {number}"])
                hints.send(class_id, 1)
                place.wait_for_end(job)
                waits.append(time.monotonic() - started)
            assert sorted(waits)[5] < 0.5, waits
            assert one.end() == 0
    finally:
        hints.close()


def warm_up(place: Place) -> str:
    """A first job: its class becomes known and the runner warm."""
    job = place.submit(["warm up"])
    place.wait_for_end(job)
    return job


def test_a_full_worker_leaves_hints_to_others(shared: Place, redis_server: RedisServer) -> None:
    """With its slot taken it stops consuming; when the slot is free it consumes again."""
    queues = redis.Redis(port=redis_server.port)
    hints = Hints(make_celery(redis_server.url))
    with worker(shared, OLLM_BROKER_URL=redis_server.url) as one:
        class_id = class_of(shared, warm_up(shared))
        name = queue_name(class_id)
        one.wait_until_it_says(f"Started consuming from {name}")
        job = shared.submit(["[slow=4]"])
        shared.wait_for_state(job, State.RUNNING)
        one.wait_until_it_says(f"Canceling queue {name}")

        def stays() -> bool:
            hints.send(class_id, 1)
            return queues.llen(name) >= 2

        wait_for(stays, timeout=3, what="hints that stay in the queue")
        shared.wait_for_end(job)
        wait_for(lambda: queues.llen(name) == 0, timeout=SECONDS, what="the hints to be taken")
    hints.close()


def test_work_flows_though_the_broker_is_down(shared: Place) -> None:
    """The database is polled, and SIGTERM still ends the worker in order."""
    with worker(shared, OLLM_BROKER_URL=f"redis://{LOOPBACK}:{refused_port()}/0") as one:
        job = shared.submit(["a"])
        shared.wait_for_end(job)
        assert one.end() == 0


def test_hints_flow_again_after_the_broker_was_restarted(shared: Place) -> None:
    """A broker that lost everything is connected to again, with the same queues."""
    with RedisServer() as broker:
        hints = Hints(make_celery(broker.url))
        with worker(shared, OLLM_BROKER_URL=broker.url) as one:
            class_id = class_of(shared, warm_up(shared))
            one.wait_until_it_says("Started consuming")
            broker.kill()
            job = shared.submit(["meanwhile"])
            shared.wait_for_end(job)
            broker.start()
            queues = redis.Redis(port=broker.port)

            def taken() -> bool:
                hints.send(class_id, 1)
                return one.log.read_text().count("Connected to redis") >= 2 and queues.llen(queue_name(class_id)) == 0

            wait_for(taken, timeout=SECONDS, what="hints to be taken again")
        hints.close()


def test_a_worker_that_finds_work_without_hints_connects_anew(place: Place, redis_server: RedisServer) -> None:
    """A connection may be dead though it looks well: where only polling feeds a worker it says so, and hears on another one."""
    queues = redis.Redis(port=redis_server.port)
    hints = Hints(make_celery(redis_server.url))
    with worker(place, app="tests.doubles.impatient_worker", OLLM_BROKER_URL=redis_server.url) as one:
        name = queue_name(class_of(place, warm_up(place)))
        one.wait_until_it_says(f"Started consuming from {name}")
        for _ in range(SILENT_FINDS):
            place.wait_for_end(place.submit(["nobody hints at this"]))
        one.wait_until_it_says("no-hints")
        wait_for(lambda: one.log.read_text().count("Connected to redis") == 2, timeout=SECONDS, what="the new connection")
        hints.send(name.removeprefix(QUEUE_PREFIX), 1)
        wait_for(lambda: hints.is_up, timeout=SECONDS, what="the hint to be in the queue")
        wait_for(lambda: queues.llen(name) == 0, timeout=SECONDS, what="the hint to be taken")
        assert one.end() == 0
    hints.close()


def test_two_workers_share_a_job(shared: Place, redis_server: RedisServer) -> None:
    """Both get plans, each plan is run once, and both bear names of their own."""
    with (
        worker(shared, number=1, OLLM_BROKER_URL=redis_server.url, OLLM_NODE="one") as one,
        worker(shared, number=2, OLLM_BROKER_URL=redis_server.url, OLLM_NODE="two") as two,
    ):
        job = shared.submit(*[[f"[slow=0.2] {number}"] for number in range(20)])
        shared.wait_for_end(job)
        assert not one.says("DuplicateNodename")
        assert (one.end(), two.end()) == (0, 0)
    details = shared.details(job)
    assert {detail.plan.state for detail in details} == {State.SUCCEEDED}
    assert [len(detail.attempts) for detail in details] == [1] * 20
    assert {detail.attempts[0].node for detail in details} == {"one", "two"}


def test_a_killed_worker_leaves_no_runner(place: Place, tmp_path: Path) -> None:
    """Killed with -9 in the middle of a plan, it takes its runner along."""
    job = place.submit([f"[where={tmp_path}/pid] [slow=600]"])
    with worker(place) as one:
        place.wait_for_state(job, State.RUNNING)
        wait_for((tmp_path / "pid").exists, timeout=SECONDS, what="the runner's mark")
        runner = int((tmp_path / "pid").read_text())
        one.end(signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{runner}").exists(), timeout=SECONDS, what="the runner to be gone")
    assert os.getpid() != runner
