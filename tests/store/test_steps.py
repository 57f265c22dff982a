"""What does each step of the lease protocol do?"""

from ollm_service.core.leasing import LeaseLost, Recorded, Released
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.store.database import Store
from tests.store.samples import (
    APPLIED,
    PLAN,
    REPORT,
    TENANT,
    answers,
    claim,
    must_claim,
    new_job,
    new_lease,
    new_worker,
    plan_of,
)


def test_a_job_runs_from_submission_to_its_last_result(store: Store) -> None:
    """The plain way: submit, claim, start, record twice; the plan ends with its last row and its history tells all of it."""
    job, worker = new_job(3), new_worker(store)
    view, created = store.jobs.submit(job)
    assert created
    assert (view.state, view.pending, view.plans_total) == (JobState.QUEUED, 3, 1)
    work = must_claim(store, worker)
    assert [(row.row, row.custom_id, row.prompt) for row in work.rows] == [(n, f"r{n}", f"say {n}") for n in range(3)]
    assert (work.runtime_plan, work.attempt, work.rows[0].generation.max_new_tokens) == (PLAN, 1, 7)
    assert store.leases.start(work.lease_id)
    assert store.leases.record(work.lease_id, answers(0, 1), REPORT) == Recorded(inserted=2, is_finished=False)
    assert store.leases.record(work.lease_id, answers(2)) == Recorded(inserted=1, is_finished=True)
    plan = plan_of(store, job)
    assert (plan.state, plan.rows_done, plan.runtime_plan, plan.planned) == (ExecutionState.SUCCEEDED, 3, APPLIED, PLAN)
    view = store.jobs.get(job.job_id, TENANT)
    assert (view.state, view.succeeded, view.failed, view.prompt_tokens, view.completion_tokens) == (
        JobState.SUCCEEDED, 3, 0, 9, 6,
    )  # fmt: skip
    detail = store.jobs.plan(plan.plan_id, TENANT)
    assert [(event.kind, event.from_state, event.to_state) for event in detail.events] == [
        ("submit", None, "queued"),
        ("claim", "queued", "leased"),
        ("start", "leased", "running"),
        ("applied", "planned", "applied"),
        ("finish", "running", "succeeded"),
    ]
    assert [(attempt.number, attempt.outcome, attempt.runtime_plan) for attempt in detail.attempts] == [(1, "succeeded", APPLIED)]


def test_nothing_is_claimed_twice(store: Store) -> None:
    """A leased plan is nobody else's."""
    store.jobs.submit(new_job())
    assert claim(store, new_worker(store)) is not None
    assert claim(store, new_worker(store, "south")) is None


def test_release_burns_nothing(store: Store) -> None:
    """A released plan is claimable at once, by its old holder, too, under a higher attempt number."""
    job, worker = new_job(), new_worker(store)
    store.jobs.submit(job)
    work = must_claim(store, worker)
    assert store.leases.release(work.lease_id, reason="draining") == Released(state="queued")
    plan = plan_of(store, job)
    assert (plan.failures, plan.losses, plan.declines, plan.node) == (0, 0, 0, None)
    assert must_claim(store, worker).attempt == 2


def test_a_lease_that_nobody_gave_writes_nothing(store: Store) -> None:
    """Every verb refuses a lease that holds nothing."""
    store.jobs.submit(new_job())
    lease = new_lease()
    assert not store.leases.start(lease)
    assert store.leases.record(lease, answers(0)) == LeaseLost()
    assert store.leases.release(lease, reason="") == LeaseLost()
    assert store.leases.crash(lease, [0], "") == LeaseLost()
    assert store.leases.claimed(lease) is None
