"""Who may write results, and in which order can they be read?"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ollm_service.core.leasing import Assignment, AttemptReport, LeaseLost, Recorded, Released, RowError, RowResult
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.retry import Failure
from ollm_service.store.database import Store
from tests.store.ageing import let_time_pass
from tests.store.samples import (
    APPLIED,
    FALLBACK,
    LIVE,
    PLAN,
    REPORT,
    TENANT,
    answers,
    must_claim,
    new_job,
    new_worker,
    plan_of,
    plans_of,
)


def test_a_repeated_record_changes_nothing(store: Store) -> None:
    """Rows that have a result keep it, and count once; the last record may be repeated, too."""
    job = new_job(3)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    assert store.leases.record(lease, answers(0, 1)) == Recorded(inserted=2, is_finished=False)
    again = RowResult(row=1, text="something else", finish_reason="stop", completion_tokens=99)
    assert store.leases.record(lease, [again]) == Recorded(inserted=0, is_finished=False)
    assert store.leases.record(lease, answers(1, 2)) == Recorded(inserted=1, is_finished=True)
    assert store.leases.record(lease, answers(1, 2)) == Recorded(inserted=0, is_finished=True)
    assert [result.text for result in store.results.page(job.job_id, TENANT)] == ["said 0", "said 1", "said 2"]
    assert store.jobs.get(job.job_id, TENANT).completion_tokens == 6


def test_a_zombie_writes_nothing(store: Store, store_url: str) -> None:
    """Every write of a holder whose lease was reaped is refused: while the plan waits, while another holds it, and at its end."""
    job, north = new_job(2), new_worker(store, "north")
    store.jobs.submit(job)
    zombie = must_claim(store, north).lease_id
    store.leases.record(zombie, answers(0))
    let_time_pass(store_url, 30_001)
    assert store.leases.reap() == 1
    south = new_worker(store, "south")

    def refuses_the_zombie() -> ExecutionState:
        before = plan_of(store, job)
        assert store.leases.record(zombie, answers(1)) == LeaseLost()
        assert store.leases.release(zombie, reason="") == LeaseLost()
        assert store.leases.fail(zombie, Failure(code="x", message="y")) == LeaseLost()
        assert store.leases.crash(zombie, [1], "") == LeaseLost()
        assert not store.leases.start(zombie)
        assert zombie not in store.leases.heartbeat(south, LIVE, [zombie], 0).held
        assert plan_of(store, job) == before
        return before.state

    assert refuses_the_zombie() == "queued"
    work = must_claim(store, south)
    assert [row.row for row in work.rows] == [1]
    assert refuses_the_zombie() == "leased"
    store.leases.start(work.lease_id)
    assert refuses_the_zombie() == "running"
    store.leases.record(work.lease_id, answers(1))
    assert refuses_the_zombie() == "succeeded"
    assert [(row.row, row.attempt) for row in store.results.page(job.job_id, TENANT)] == [(0, 1), (1, 2)]


def test_rows_of_another_plan_are_refused(store: Store) -> None:
    """A lease is good for its plan's rows alone, and a refused record writes nothing."""
    job = new_job(1, 1)
    store.jobs.submit(job)
    work = must_claim(store, new_worker(store))
    with pytest.raises(ValueError, match="no such rows"):
        store.leases.record(work.lease_id, answers(0, 1))
    assert store.results.page(job.job_id, TENANT) == []


def test_row_errors_are_results(store: Store) -> None:
    """A row that fails by itself is answered with its error, and its plan still succeeds."""
    job = new_job(2)
    store.jobs.submit(job)
    wrong = RowResult(row=1, error=RowError(code="context_length_exceeded", message="too long"))
    store.leases.record(must_claim(store, new_worker(store)).lease_id, [*answers(0), wrong])
    plan, view = plan_of(store, job), store.jobs.get(job.job_id, TENANT)
    assert (plan.state, plan.rows_failed) == (ExecutionState.SUCCEEDED, 1)
    assert (view.succeeded, view.failed, view.pending) == (1, 1, 0)
    assert [row.row for row in store.jobs.failed_rows(job.job_id, TENANT)] == [1]


def test_the_plan_shows_the_newest_attempt_that_recorded(store: Store) -> None:
    """An attempt that wrote no row does not change what the plan shows; the next one plans afresh."""
    job, worker = new_job(3), new_worker(store)
    store.jobs.submit(job)
    first = must_claim(store, worker)
    store.leases.record(first.lease_id, [], REPORT)
    assert plan_of(store, job).runtime_plan == PLAN
    store.leases.release(first.lease_id, reason="drain")
    second = must_claim(store, worker)
    assert second.runtime_plan == PLAN
    store.leases.record(second.lease_id, [], REPORT)
    store.leases.record(second.lease_id, answers(0), AttemptReport(runtime_plan=FALLBACK, measured={"a": 1}))
    store.leases.record(second.lease_id, answers(1), AttemptReport(runtime_plan=APPLIED, measured={"b": 2}))
    plan = plan_of(store, job)
    assert (plan.runtime_plan, plan.planned) == (FALLBACK, PLAN)
    detail = store.jobs.plan(plan.plan_id, TENANT)
    assert [(attempt.runtime_plan, attempt.measured) for attempt in detail.attempts] == [
        (APPLIED, {"load_seconds": 1.5}),
        (FALLBACK, {"b": 2}),
    ]
    assert [event.reason for event in detail.events if event.kind == "fallback"] == ["the cache disk is full"]


def test_a_record_starts_what_was_only_leased(store: Store) -> None:
    """Where nothing had to be loaded, the first record is the start."""
    job = new_job(2)
    store.jobs.submit(job)
    work = must_claim(store, new_worker(store))
    store.leases.record(work.lease_id, answers(0))
    plan = plan_of(store, job)
    assert (plan.state, plan.started_ms is not None) == (ExecutionState.RUNNING, True)
    assert store.leases.start(work.lease_id), "starting again after a lost reply is no mistake"


def test_a_success_that_committed_first_beats_a_cancel(store: Store) -> None:
    """Final states stay."""
    job = new_job(1)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    store.leases.record(lease, answers(0))
    before = plan_of(store, job)
    assert store.jobs.cancel(job.job_id, TENANT).state == "succeeded"
    assert store.leases.release(lease, reason="late") == LeaseLost()
    assert plan_of(store, job) == before


def test_cursors_have_no_gaps_under_concurrent_recorders(store: Store) -> None:
    """A reader that follows by cursor while six workers write sees every result once, in order, and none appears behind it."""
    job = new_job(*[8] * 6)
    store.jobs.submit(job)
    leases = [must_claim(store, new_worker(store, f"n{number}")) for number in range(6)]
    done = threading.Event()
    seen: list[int] = []

    def follow() -> None:
        while True:
            is_last_look = done.is_set()
            page = store.results.page(job.job_id, TENANT, cursor=seen[-1] if seen else 0, limit=5)
            seen.extend(result.cursor for result in page)
            if is_last_look and not page:
                return

    def record(work: Assignment) -> None:
        for row in work.rows:
            store.leases.record(work.lease_id, answers(row.row))

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(record, leases))
    done.set()
    reader.join(timeout=30)
    assert seen == list(range(1, 49))
    assert {plan.state for plan in plans_of(store, job)} == {ExecutionState.SUCCEEDED}


def test_a_released_attempt_hears_so_again(store: Store) -> None:
    """A hand-back whose reply was lost is answered the same the second time, and is not done twice."""
    job = new_job(1)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    assert store.leases.release(lease, reason="no room", decline_ms=1) == Released(state="queued")
    assert store.leases.release(lease, reason="no room", decline_ms=1) == Released(state="queued")
    assert store.leases.release(lease, reason="drain") == LeaseLost(), "another verb than the one that ended it"
    assert plan_of(store, job).declines == 1
