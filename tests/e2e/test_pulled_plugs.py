"""Does a job survive whatever is killed in its middle, with every row answered exactly once?

Two workers with scripted runners on PostgreSQL and Redis, leases of four seconds. Each test lets a job begin, pulls one plug,
and looks at the whole history when the job has ended.
"""

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest
import redis

from ollm_service.broker import QUEUE_PREFIX
from tests.chaos.checker import violations
from tests.chaos.history import Acknowledged, read_history
from tests.e2e.fleet import SCRIPTED, Fleet, Worker, milliseconds_between
from tests.e2e.scripted_jobs import MODEL, answers, expected, rows_of
from tests.servers import PostgresServer, RedisServer
from tests.waiting import wait_for

LEASE_SECONDS = 4.0
ROWS = 512  # two plans, one for each worker
SLOWLY = "[slow=0.01]"  # about three seconds a plan
SLOWER = "[slow=0.03]"  # so that a plan outlasts the moment at which its worker really stands still
BEGUN = 40  # rows


@pytest.fixture(scope="module")
def hurt_fleet(fleet_database: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The fleet that every test of this module hurts and `fleet` restores."""
    directory = tmp_path_factory.mktemp("plugs")
    runner = f"{SCRIPTED} --micro-batch 8"
    with Fleet(
        directory, database_url=fleet_database, broker_url=redis_server.url, lease_seconds=LEASE_SECONDS, runner=runner
    ) as fleet:
        fleet.start_coordinator()
        for node in ("north", "south"):
            fleet.launch_worker(node, OLLM_WORKER_LABELS=f"side={node}")
        yield fleet


@pytest.fixture
def fleet(hurt_fleet: Fleet) -> Fleet:
    """The fleet, complete and idle."""
    hurt_fleet.restore()
    return hurt_fleet


class RunningJob:
    """A job that both workers have begun, and what must become of it."""

    def __init__(self, fleet: Fleet, name: str, pace: str = SLOWLY) -> None:
        self.fleet = fleet
        self.rows = rows_of(ROWS, name, pace)
        self.job_id = str(fleet.calls.submit(MODEL, self.rows)["id"])
        fleet.calls.wait_done_rows(self.job_id, BEGUN, timeout=30)
        wait_for(lambda: {plan["node"] for plan in self.plans()} >= {"north", "south"}, timeout=10, what="both to have begun")

    def plans(self) -> list[dict[str, Any]]:
        return self.fleet.calls.plans(self.job_id)

    def plan_of(self, worker: Worker) -> str:
        """The plan that this worker holds."""
        held = [plan for plan in self.plans() if plan["node"] == worker.node and plan["state"] in ("leased", "running")]
        assert held, f"{worker.node} has finished its plan already"
        return str(held[0]["id"])

    def events(self, plan_id: str) -> list[dict[str, Any]]:
        return list(self.fleet.calls.plan(plan_id)["events"])

    def assert_every_row_is_answered_once(self, *, timeout: float = 45) -> None:
        """Wait for its end and look at everything."""
        job = self.fleet.calls.wait_final(self.job_id, timeout=timeout)
        assert (job["state"], job["counts"]["succeeded"]) == ("succeeded", ROWS)
        assert answers(self.fleet.calls.results(self.job_id)) == expected(self.rows)
        assert violations(read_history(self.fleet.database_url), {self.job_id: Acknowledged(row_count=ROWS)}) == []


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _milliseconds_until(events: list[dict[str, Any]], since: float, kinds: set[str]) -> float:
    """From `since` (seconds of the epoch) to the first later event of these kinds; both clocks are this machine's."""
    start = datetime.fromtimestamp(since, tz=UTC).isoformat()
    waits = [milliseconds_between(start, event["at"]) for event in events if event["kind"] in kinds]
    return min(wait for wait in waits if wait >= 0)


def test_a_killed_worker_takes_its_runner_along_and_its_plan_goes_on_elsewhere(fleet: Fleet) -> None:
    """After SIGKILL of a worker its runner ends by itself, and its plan is claimable again within the lease and five seconds."""
    job = RunningJob(fleet, "worker-killed")
    north = fleet.workers["north"]
    plan_id, runner = job.plan_of(north), north.runner_pid()
    north.kill()
    killed = time.time()
    wait_for(lambda: _is_gone(runner), timeout=5, what="the runner of the killed worker to end")
    job.assert_every_row_is_answered_once()
    assert _milliseconds_until(job.events(plan_id), killed, {"reap"}) <= (LEASE_SECONDS + 5) * 1000


def test_a_killed_runner_costs_its_plan_no_more_than_two_seconds(fleet: Fleet) -> None:
    """After SIGKILL of a runner its worker stays, and the plan is claimed again within two seconds."""
    job = RunningJob(fleet, "runner-killed")
    north = fleet.workers["north"]
    plan_id = job.plan_of(north)
    north.kill_runner()
    killed = time.time()
    job.assert_every_row_is_answered_once()
    assert north.is_running
    assert _milliseconds_until(job.events(plan_id), killed, {"claim"}) <= 2000


def test_a_broker_that_dies_with_everything_in_it_loses_nothing(fleet: Fleet, redis_server: RedisServer) -> None:
    """Without the broker the job goes on and new ones are accepted and run; afterwards hints are taken again."""
    job = RunningJob(fleet, "broker-killed")
    redis_server.kill()
    try:
        late_rows = rows_of(10, "while-down")
        late = fleet.calls.submit(MODEL, late_rows)
        job.assert_every_row_is_answered_once()
        fleet.calls.wait_final(late["id"], timeout=10)
        assert answers(fleet.calls.results(late["id"])) == expected(late_rows)
    finally:
        redis_server.start()
    again = itertools.count()

    def hints_are_taken() -> bool:
        fleet.calls.wait_final(fleet.calls.submit(MODEL, rows_of(1, f"after-broker-{next(again)}"))["id"], timeout=10)
        return _are_hints_taken(redis_server)

    wait_for(hints_are_taken, timeout=30, what="hints to be sent and taken")


def _are_hints_taken(server: RedisServer) -> bool:
    """Whether hints were put into queues since the broker's start, and all of them were taken out again."""
    with redis.Redis(port=server.port) as broker:
        pushes: Any = broker.info("commandstats")
        return "cmdstat_lpush" in pushes and not list(broker.scan_iter(f"{QUEUE_PREFIX}*"))


def test_a_killed_database_loses_no_acknowledged_row(fleet: Fleet, postgres_server: PostgresServer) -> None:
    """After SIGKILL and restart of PostgreSQL the same processes go on by themselves."""
    job = RunningJob(fleet, "database-killed")
    postgres_server.kill()
    wait_for(lambda: fleet.calls.get("/readyz").status_code == 503, timeout=15, what="the coordinator to be not ready")
    postgres_server.start()
    job.assert_every_row_is_answered_once()
    assert fleet.coordinator.is_running
    assert all(worker.is_running for worker in fleet.workers.values())


def test_a_killed_coordinator_is_not_missed_by_the_workers(fleet: Fleet) -> None:
    """While the coordinator is gone the workers go on recording; the next one finds everything."""
    job = RunningJob(fleet, "coordinator-killed")
    fleet.coordinator.kill()
    before = _answered(fleet, job.job_id)
    wait_for(lambda: _answered(fleet, job.job_id) > before, timeout=10, what="rows answered without a coordinator")
    fleet.start_coordinator()
    job.assert_every_row_is_answered_once()


def _answered(fleet: Fleet, job_id: str) -> int:
    history = read_history(fleet.database_url)
    return sum(result["job_id"] == job_id for result in history.results)


def test_a_frozen_worker_comes_back_to_refused_writes(fleet: Fleet) -> None:
    """A worker stopped past its lease loses its plan; when it goes on, nothing that it writes counts, and it works again."""
    job = RunningJob(fleet, "worker-frozen", SLOWER)
    north = fleet.workers["north"]
    plan_id = job.plan_of(north)
    north.freeze()
    wait_for(lambda: _has_left(job.events(plan_id)), timeout=30, what="the frozen worker's plan to be taken back")
    north.thaw()
    job.assert_every_row_is_answered_once()
    fleet.await_workers("north")
    rows = rows_of(5, "thawed")
    after = fleet.calls.submit(MODEL, rows, where='side == "north"')
    fleet.calls.wait_final(after["id"], timeout=20)
    assert answers(fleet.calls.results(after["id"])) == expected(rows)


def _has_left(events: list[dict[str, Any]]) -> bool:
    return any(event["kind"] == "reap" for event in events)


def test_a_terminated_worker_hands_its_plan_over_unharmed(fleet: Fleet) -> None:
    """SIGTERM lets a worker finish or release its plan and end with status 0; nothing counts as lost or failed."""
    job = RunningJob(fleet, "worker-drained")
    north = fleet.workers["north"]
    north.terminate()
    assert north.wait(timeout=20) == 0, north.log_tail()
    job.assert_every_row_is_answered_once()
    kinds = {event["kind"] for plan in job.plans() for event in job.events(plan["id"])}
    assert not kinds & {"reap", "fail", "crash"}
