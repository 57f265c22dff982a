"""Does a fleet on PostgreSQL with a real broker run a job of several plans, each only where it may run?"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.chaos.checker import violations
from tests.chaos.history import Acknowledged, read_history
from tests.e2e.fleet import SCRIPTED, Fleet, milliseconds_between
from tests.e2e.scripted_jobs import MODEL, answers, rows_of
from tests.servers import PostgresServer, RabbitServer, RedisServer

ROWS = 600  # three plans
QUICK_CLAIM_MS = 500  # the idle poll takes a second or more


@pytest.fixture(scope="module", params=["redis", "rabbit"])
def fleet(
    request: pytest.FixtureRequest,
    postgres_server: PostgresServer,
    migrated_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """A worker at home that can do everything, and one away that has nowhere to write KV files."""
    broker: RedisServer | RabbitServer = request.getfixturevalue(f"{request.param}_server")
    directory = tmp_path_factory.mktemp(f"fleet-{request.param}")
    database_url = postgres_server.create_database(template=migrated_database)
    with Fleet(directory, database_url=database_url, broker_url=broker.url, runner=SCRIPTED) as fleet:
        fleet.start_coordinator()
        fleet.launch_worker("home", OLLM_WORKER_LABELS="zone=home")
        fleet.launch_worker("away", OLLM_WORKER_LABELS="zone=away", OLLM_CACHE_DIR=str(_unwritable(directory)))
        fleet.await_workers("home", "away")
        yield fleet
    postgres_server.drop_database(database_url)


def _unwritable(directory: Path) -> Path:
    """A folder that nobody can make, root included: its parent is a file."""
    (directory / "file").touch()
    return directory / "file" / "kv"


def test_each_worker_gets_only_what_it_can_run(fleet: Fleet) -> None:
    """Plans for one zone stay there, those that demand KV files never reach the worker without a disk, each row comes once."""
    calls = fleet.calls
    jobs = {
        calls.submit(MODEL, rows_of(ROWS, "any"))["id"]: Acknowledged(row_count=ROWS),
        calls.submit(MODEL, rows_of(20, "home"), where='zone == "home"')["id"]: Acknowledged(
            row_count=20, nodes=frozenset({"home"})
        ),
        calls.submit(MODEL, rows_of(20, "away"), where='zone == "away"')["id"]: Acknowledged(
            row_count=20, nodes=frozenset({"away"})
        ),
        calls.submit(MODEL, rows_of(ROWS, "paged"), runtime={"kv_cache_strategy": "paged"})["id"]: Acknowledged(
            row_count=ROWS, nodes=frozenset({"home"})
        ),
    }
    for job_id, told in jobs.items():
        job = calls.wait_final(job_id, timeout=60)
        assert (job["state"], job["counts"]["succeeded"]) == ("succeeded", told.row_count)
    assert answers(calls.results(next(iter(jobs)))) == {f"any-{number}": f"ANY {number}" for number in range(ROWS)}
    assert violations(read_history(fleet.database_url), jobs) == []


def test_the_worker_without_a_cache_disk_says_why(fleet: Fleet) -> None:
    """What a worker cannot do is shown with the reason, and a preview names it for the plan that would need it."""
    preview = fleet.calls.post("/v1/plans/preview", {"model": MODEL, "runtime": {"kv_cache_strategy": "paged"}}).json()
    eligible = {worker["node"]: worker["eligible"] for worker in preview["workers"]}
    assert eligible == {"home": True, "away": False}
    reasons = next(worker["reasons"] for worker in preview["workers"] if worker["node"] == "away")
    assert any("disk-cache" in reason for reason in reasons), reasons


def test_hints_are_delivered(fleet: Fleet) -> None:
    """An idle worker claims sooner than its poll would: the hint travelled through the broker and woke it."""
    waits = []
    for number in range(5):
        job = fleet.calls.submit(MODEL, rows_of(1, f"hint-{number}"))
        fleet.calls.wait_final(job["id"], timeout=20)
        plan = fleet.calls.plan(fleet.calls.plans(job["id"])[0]["id"])
        at = {event["kind"]: event["at"] for event in reversed(plan["events"])}
        waits.append(at)
    assert median(milliseconds_between(at["submit"], at["claim"]) for at in waits) < QUICK_CLAIM_MS
