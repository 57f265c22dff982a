"""How do attempts end other than well, and what becomes of the plan?"""

from collections.abc import Callable

import pytest
from sqlalchemy import text

from ollm_service.core.leasing import LeaseLost, Released
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.retry import Failure
from ollm_service.store.database import Store, open_database
from ollm_service.store.engine import connect, parse_url
from tests.store.ageing import let_time_pass
from tests.store.crowd import multiply_workers
from tests.store.samples import (
    LIVE,
    TENANT,
    answers,
    claim,
    class_of,
    must_claim,
    new_job,
    new_lease,
    new_worker,
    plan_of,
    plans_of,
)

BROKEN = Failure(code="load_failed", message="no such tensor")


def errors(store: Store, job_id: str) -> dict[int, str]:
    """The error code of each row that has one."""
    return {result.row: result.error.code for result in store.results.page(job_id, TENANT) if result.error}


def test_a_failure_is_tried_again_elsewhere(store: Store, store_url: str) -> None:
    """The failed node stays away for a while; the plan remembers how often it failed and why."""
    job, north, south = new_job(), new_worker(store, "north"), new_worker(store, "south")
    store.jobs.submit(job)
    assert store.leases.fail(must_claim(store, north).lease_id, BROKEN) == Released(state="queued")
    plan = plan_of(store, job)
    assert (plan.failures, plan.reason, plan.attempt) == (1, "load_failed: no such tensor", 1)
    assert claim(store, north) is None
    assert must_claim(store, south).attempt == 2
    let_time_pass(store_url, 10_000)


def test_the_back_off_is_kept_by_the_claim(store_url: str) -> None:
    """A retry is not due before its time."""
    store = open_database(store_url, draw=lambda: 0.5)
    job = new_job()
    store.jobs.submit(job)
    store.leases.fail(must_claim(store, new_worker(store, "north")).lease_id, BROKEN)
    south = new_worker(store, "south")
    plan = plan_of(store, job)
    assert 500 <= plan.available_ms - store.now_ms() <= 1_000, "half of the first ceiling of 2 s"
    assert claim(store, south) is None
    let_time_pass(store_url, 1_000)
    assert claim(store, south) is not None
    store.close()


def test_three_failures_without_a_row_end_the_plan(store: Store) -> None:
    """Its rows carry the failure; a new row in between would have made the earlier failures forgotten."""
    job = new_job(3)
    store.jobs.submit(job)
    for number in range(2):
        store.leases.fail(must_claim(store, new_worker(store, f"n{number}")).lease_id, BROKEN)
    lease = must_claim(store, new_worker(store, "lucky")).lease_id
    store.leases.record(lease, answers(0))
    assert plan_of(store, job).failures == 0
    assert store.leases.fail(lease, BROKEN) == Released(state="queued")
    for number, state in enumerate(("queued", "failed"), start=3):
        assert store.leases.fail(must_claim(store, new_worker(store, f"n{number}")).lease_id, BROKEN) == Released(state=state)
    assert errors(store, job.job_id) == {1: "failed", 2: "failed"}
    view = store.jobs.get(job.job_id, TENANT)
    assert (view.state, view.succeeded, view.failed) == (JobState.FAILED, 1, 2)


def test_a_permanent_failure_ends_at_once(store: Store) -> None:
    """Trying elsewhere cannot help."""
    job = new_job(2)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    permanent = Failure(code="no_weights", message="gone", is_permanent=True)
    assert store.leases.fail(lease, permanent) == Released(state="failed")
    assert store.leases.fail(lease, permanent) == Released(state="failed"), "the reply was lost"
    assert errors(store, job.job_id) == {0: "failed", 1: "failed"}


def test_a_crash_halves_the_micro_batch(store: Store) -> None:
    """Queued at once, for the same node, too, with half as many rows at a time; it is no failure."""
    job, worker = new_job(8), new_worker(store)
    store.jobs.submit(job)
    limits: list[int | None] = []
    for rows in (range(8), range(3), range(2)):
        work = must_claim(store, worker)
        limits.append(work.micro_batch_limit)
        assert store.leases.crash(work.lease_id, list(rows), "signal 11") == Released(state="queued")
    assert [*limits, must_claim(store, worker).micro_batch_limit] == [None, 4, 1, 1]
    plan = plan_of(store, job)
    assert (plan.failures, plan.losses) == (0, 0)


def test_the_second_lone_crash_is_the_rows_error(store: Store) -> None:
    """The first is remembered on the plan; the others are answered as if nothing had been."""
    job, worker = new_job(2), new_worker(store)
    store.jobs.submit(job)
    store.leases.crash(must_claim(store, worker).lease_id, [0], "signal 9")
    work = must_claim(store, worker)
    assert work.lone_crashes == frozenset({0})
    assert store.leases.crash(work.lease_id, [0], "signal 9") == Released(state="queued")
    assert errors(store, job.job_id) == {0: "runner_crashed"}
    work = must_claim(store, worker)
    assert [row.row for row in work.rows] == [1]
    store.leases.record(work.lease_id, answers(1))
    assert plan_of(store, job).state is ExecutionState.SUCCEEDED


def test_rows_get_their_micro_batch_back_from_the_row_that_took_it(store: Store) -> None:
    """Once that row is answered with its crashes, the others run together again; one more that crashes halves them again."""
    job, worker = new_job(8), new_worker(store)
    store.jobs.submit(job)

    def crash(*rows: int) -> int | None:
        store.leases.crash(must_claim(store, worker).lease_id, rows, "signal 11")
        work = must_claim(store, worker)
        store.leases.release(work.lease_id, reason="only looked")
        return work.micro_batch_limit

    assert [crash(*range(8)), crash(*range(4)), crash(2, 3), crash(3), crash(3)] == [4, 2, 1, 1, None]
    assert errors(store, job.job_id) == {3: "runner_crashed"}
    assert [crash(*range(4, 8)), crash(4, 5)] == [2, 1]
    assert must_claim(store, worker).lone_crashes == {3}


def test_a_lone_crash_of_the_last_row_ends_the_plan(store: Store) -> None:
    """An answered plan is never queued again."""
    job, worker = new_job(1), new_worker(store)
    store.jobs.submit(job)
    store.leases.crash(must_claim(store, worker).lease_id, [0], "signal 9")
    lease = must_claim(store, worker).lease_id
    assert store.leases.crash(lease, [0], "signal 9") == Released(state="succeeded")
    assert store.leases.crash(lease, [0], "signal 9") == Released(state="succeeded"), "the reply was lost"


def test_a_silent_holder_loses_its_lease(store: Store, store_url: str) -> None:
    """Requeued with its finished rows kept; not before the lease has run out."""
    job = new_job(2)
    store.jobs.submit(job)
    store.leases.record(must_claim(store, new_worker(store)).lease_id, answers(0))
    let_time_pass(store_url, 29_000)
    assert store.leases.reap() == 0
    let_time_pass(store_url, 1_001)
    assert store.leases.reap() == 1
    plan = plan_of(store, job)
    assert (plan.state, plan.losses, plan.rows_done, plan.reason) == (ExecutionState.QUEUED, 1, 1, "north fell silent")
    assert [row.row for row in must_claim(store, new_worker(store)).rows] == [1]


def test_renewals_keep_a_lease(store: Store, store_url: str) -> None:
    """A heartbeat renews the leases that it names, and no others of its worker."""
    job = new_job(1, 1)
    store.jobs.submit(job)
    worker = new_worker(store)
    kept, forgotten = (must_claim(store, worker).lease_id for _ in range(2))
    let_time_pass(store_url, 20_000)
    assert store.leases.heartbeat(worker, LIVE, [kept], 1).held == {kept}
    let_time_pass(store_url, 20_000)
    assert store.leases.reap() == 1
    assert store.leases.heartbeat(worker, LIVE, [kept, forgotten], 1).held == {kept}


def test_a_worker_asks_for_longer_leases_where_it_beats_less_often(store: Store, store_url: str) -> None:
    """By its claims and its renewals; a renewal for less takes nothing away, since its answer may never arrive."""
    job = new_job(1, 1)
    store.jobs.submit(job)
    worker = new_worker(store)
    longer = store.leases.claim(worker, new_lease(), [class_of()], lease_ms=120_000)
    assert longer is not None
    renewed = must_claim(store, worker).lease_id
    store.leases.heartbeat(worker, LIVE, [renewed], 2, lease_ms=120_000)
    let_time_pass(store_url, 60_000)
    assert store.leases.heartbeat(worker, LIVE, [longer.lease_id, renewed], 2, lease_ms=30_000).held == {longer.lease_id, renewed}
    let_time_pass(store_url, 50_000)
    assert store.leases.reap() == 0
    let_time_pass(store_url, 10_001)
    assert store.leases.reap() == 2


def test_three_losses_without_a_new_row_bury_the_plan(store: Store, store_url: str) -> None:
    """A new row makes earlier losses forgotten; nothing else does."""
    job = new_job(2)
    store.jobs.submit(job)

    def lose(*rows: int) -> ExecutionState:
        work = must_claim(store, new_worker(store))
        store.leases.record(work.lease_id, answers(*rows))
        let_time_pass(store_url, 30_001)
        assert store.leases.reap() == 1
        return plan_of(store, job).state

    assert [lose(), lose(), lose(0), lose(), lose()][-1] is ExecutionState.DEAD
    assert errors(store, job.job_id) == {1: "dead"}
    assert store.jobs.get(job.job_id, TENANT).state is JobState.FAILED


def test_reaping_waits_after_an_outage(store: Store, store_url: str) -> None:
    """One full lease passes first; a second outage within a minute gets no second grace."""
    store.jobs.submit(new_job())
    must_claim(store, new_worker(store))
    let_time_pass(store_url, 60_000)
    assert store.leases.hold_off_reaping()
    assert not store.leases.hold_off_reaping()
    assert store.leases.reap() == 0


def test_reaping_waits_for_the_lease_of_the_fleet(store: Store, store_url: str) -> None:
    """After an outage, workers that beat less often get longer to renew."""
    new_worker(store)
    multiply_workers(store_url, 300)
    assert store.leases.hold_off_reaping()
    engine = connect(parse_url(store_url))
    with engine.connect() as connection:
        until = connection.execute(text("SELECT value FROM counters WHERE name = 'reap_from_ms'")).scalar_one()
    engine.dispose()
    assert 30_000 < until - store.now_ms() <= 36_000


def test_a_waiting_plan_is_cancelled_at_once(store: Store) -> None:
    """Its rows carry the error, the other job's plans stay."""
    job, other = new_job(2, 1), new_job()
    store.jobs.submit(job)
    store.jobs.submit(other)
    view = store.jobs.cancel(job.job_id, TENANT)
    assert (view.state, view.failed, view.pending) == (JobState.CANCELLED, 3, 0)
    assert errors(store, job.job_id) == {0: "cancelled", 1: "cancelled", 2: "cancelled"}
    assert must_claim(store, new_worker(store)).job_id == other.job_id
    assert store.jobs.cancel(job.job_id, TENANT) == view


@pytest.mark.parametrize("way", ["release", "decline", "fail", "crash", "reap", "finish"])
def test_a_running_plan_ends_cancelled_however_its_holder_ends(store: Store, store_url: str, way: str) -> None:
    """The holder hears of it at its renewal; however it hands back, the plan is cancelled, unless it succeeded first."""
    job, worker = new_job(3), new_worker(store)
    store.jobs.submit(job)
    lease = must_claim(store, worker).lease_id
    store.leases.record(lease, answers(0))
    view = store.jobs.cancel(job.job_id, TENANT)
    assert (view.state, view.pending) == (JobState.RUNNING, 2)
    assert store.leases.heartbeat(worker, LIVE, [lease], 1).cancelled == {lease}
    if way == "reap":
        let_time_pass(store_url, 30_001)
    ends: dict[str, Callable[[], object]] = {
        "release": lambda: store.leases.release(lease, reason="cancelled"),
        "decline": lambda: store.leases.release(lease, reason="no room", decline_ms=1_000),
        "fail": lambda: store.leases.fail(lease, BROKEN),
        "crash": lambda: store.leases.crash(lease, [1, 2], "signal 11"),
        "finish": lambda: store.leases.record(lease, answers(1, 2)),
        "reap": store.leases.reap,
    }
    ends[way]()
    plan, state = plan_of(store, job), "succeeded" if way == "finish" else "cancelled"
    assert (plan.state, plan.rows_done, plan.cancel_requested) == (state, 3, False)
    assert errors(store, job.job_id) == ({} if way == "finish" else {1: "cancelled", 2: "cancelled"})
    assert claim(store, new_worker(store, "south")) is None


def test_a_deadline_ends_what_waits_and_what_runs(store: Store, store_url: str) -> None:
    """Finished rows stay, the others are expired, and the holder has lost its lease."""
    job = new_job(2, 1, deadline_ms=60_000)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    store.leases.record(lease, answers(0))
    assert store.leases.expire() == 0
    let_time_pass(store_url, 60_001)
    assert store.leases.expire() == 2
    assert store.leases.record(lease, answers(1)) == LeaseLost()
    assert {plan.state for plan in plans_of(store, job)} == {ExecutionState.EXPIRED}
    assert errors(store, job.job_id) == {1: "expired", 2: "expired"}
    assert store.jobs.get(job.job_id, TENANT).state is JobState.EXPIRED
