"""What becomes of rows that kill runners, jobs that must stop, and plans that demand what a worker cannot hold?"""

from collections.abc import Iterator

import pytest

from tests.e2e.fleet import SCRIPTED, Fleet, counts
from tests.e2e.scripted_jobs import MODEL, answers, expected, rows_of
from tests.servers import RedisServer
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def fleet(fleet_database: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker whose runner takes eight rows at a time and does what their prompts say."""
    runner = f"{SCRIPTED} --micro-batch 8"
    directory = tmp_path_factory.mktemp("bad")
    with Fleet(directory, database_url=fleet_database, broker_url=redis_server.url, runner=runner) as fleet:
        fleet.start_coordinator()
        fleet.start_worker("only")
        yield fleet


@pytest.mark.parametrize("script", ["[crash]", "[oom]"])
def test_a_row_that_always_kills_the_runner_is_the_only_one_without_an_answer(fleet: Fleet, script: str) -> None:
    """The micro-batch is halved until the row is alone; when it has crashed the runner twice it gets `runner_crashed`."""
    rows = rows_of(12, "poison")
    rows[5]["prompt"] += f" {script}"
    job = fleet.calls.submit(MODEL, rows)
    ended = fleet.calls.wait_final(job["id"], timeout=40)
    assert (ended["state"], counts(ended)) == ("succeeded", (11, 1, 0))
    results = {result["row"]: result for result in fleet.calls.results(job["id"])}
    assert results[5]["error"]["code"] == "runner_crashed"
    assert all(results[row]["text"] == rows[row]["prompt"].upper() for row in results if row != 5)


def test_rows_that_only_crash_together_are_all_answered(fleet: Fleet) -> None:
    """A micro-batch that is too much for a runner is halved until it fits, and no row is given up."""
    rows = rows_of(8, "too-many")
    rows[3]["prompt"] += " [crash-batch]"
    job = fleet.calls.submit(MODEL, rows)
    assert counts(fleet.calls.wait_final(job["id"], timeout=30)) == (8, 0, 0)
    assert answers(fleet.calls.results(job["id"])) == expected(rows)


def test_a_plan_that_fails_for_good_says_so_on_each_row(fleet: Fleet) -> None:
    """A permanent failure ends the plan at once, keeps what was answered, and names its reason."""
    rows = rows_of(16, "hopeless")
    rows[10]["prompt"] += " [fail-permanently]"
    job = fleet.calls.submit(MODEL, rows)
    ended = fleet.calls.wait_final(job["id"], timeout=20)
    assert (ended["state"], counts(ended)) == ("failed", (8, 8, 0))
    errors = [result["error"] for result in fleet.calls.results(job["id"]) if result["error"]]
    assert {error["code"] for error in errors} == {"failed"}
    assert all("as told" in error["message"] for error in errors)


def test_cancelling_a_running_job_takes_effect_within_ten_seconds(fleet: Fleet) -> None:
    """What was answered before the cancel stays, every other row says that it was cancelled."""
    rows = rows_of(200, "cancelled", "[slow=0.2]")
    job = fleet.calls.submit(MODEL, rows)
    fleet.calls.wait_done_rows(job["id"], 1, timeout=20)
    fleet.calls.cancel(job["id"])
    ended = fleet.calls.wait_final(job["id"], timeout=10)
    assert ended["state"] == "cancelled"
    succeeded, failed, pending = counts(ended)
    assert succeeded >= 1
    assert (succeeded + failed, pending) == (200, 0)
    assert {result["error"]["code"] for result in fleet.calls.results(job["id"]) if result["error"]} == {"cancelled"}


def test_a_runner_that_ignores_the_cancel_is_killed(fleet: Fleet) -> None:
    """A runner that goes on although it was asked to stop is ended, and the worker runs the next job."""
    job = fleet.calls.submit(MODEL, rows_of(3, "stubborn", "[stubborn]"))
    wait_for(lambda: fleet.calls.plans(job["id"])[0]["state"] == "running", timeout=20, what="the stubborn plan to run")
    runner = fleet.workers["only"].runner_pid()
    fleet.calls.cancel(job["id"])
    assert fleet.calls.wait_final(job["id"], timeout=30)["state"] == "cancelled"
    after = fleet.calls.submit(MODEL, rows_of(2, "after-stubborn"))
    assert counts(fleet.calls.wait_final(after["id"], timeout=20)) == (2, 0, 0)
    assert runner not in fleet.workers["only"].runner_pids()


def test_a_deadline_ends_a_running_job_and_keeps_what_it_has(fleet: Fleet) -> None:
    """Past its deadline a job is `expired`: finished rows keep their answers, the others carry that error."""
    rows = rows_of(100, "late", "[slow=0.1]")
    job = fleet.calls.submit(MODEL, rows, deadline_seconds=3)
    ended = fleet.calls.wait_final(job["id"], timeout=20)
    succeeded, failed, pending = counts(ended)
    assert (ended["state"], succeeded + failed, pending) == ("expired", 100, 0)
    assert {result["error"]["code"] for result in fleet.calls.results(job["id"]) if result["error"]} == {"expired"}
    after = fleet.calls.submit(MODEL, rows_of(2, "after-late"))
    assert counts(fleet.calls.wait_final(after["id"], timeout=20)) == (2, 0, 0)


def test_a_job_for_nobody_waits_with_a_reason_until_somebody_comes(fleet: Fleet) -> None:
    """A plan that no worker satisfies shows `no-capable-worker`, and runs when a capable worker has joined."""
    job = fleet.calls.submit(MODEL, rows_of(3, "waiting"), where='side == "west"')
    wait_for(
        lambda: fleet.calls.plans(job["id"])[0]["condition"] == "no-capable-worker",
        timeout=10, what="the plan to say why it waits",
    )  # fmt: skip
    west = fleet.start_worker("west", OLLM_WORKER_LABELS="side=west")
    assert counts(fleet.calls.wait_final(job["id"], timeout=20)) == (3, 0, 0)
    west.terminate()
    assert west.wait(timeout=20) == 0
