"""How does a job come into being?"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ollm_service.core.errors import IdempotencyConflict, InvalidJob, NotFound
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.store.database import Store
from ollm_service.store.jobs import NewRow
from ollm_service.store.views import PlanView
from tests.store.samples import (
    TENANT,
    answers,
    claim,
    class_of,
    must_claim,
    new_job,
    new_worker,
    plan_of,
    plans_of,
    requirements,
)


def test_the_same_key_and_body_make_one_job(store: Store) -> None:
    """A repeated submission answers with the first job and stores nothing."""
    first, second = (new_job(idempotency_key="k", body_digest="b") for _ in range(2))
    view, created = store.jobs.submit(first)
    again, created_again = store.jobs.submit(second)
    assert (created, created_again) == (True, False)
    assert again == view
    assert store.jobs.find_idempotent(TENANT, "k", "b") == view
    with pytest.raises(NotFound):
        store.jobs.get(second.job_id, TENANT)


def test_the_same_key_with_another_body_conflicts(store: Store) -> None:
    """An idempotency key belongs to one body."""
    store.jobs.submit(new_job(idempotency_key="k", body_digest="one"))
    with pytest.raises(IdempotencyConflict):
        store.jobs.submit(new_job(idempotency_key="k", body_digest="two"))
    with pytest.raises(IdempotencyConflict):
        store.jobs.find_idempotent(TENANT, "k", "two")


def test_tenants_do_not_share_keys_or_jobs(store: Store) -> None:
    """Keys are unique per tenant, and another tenant's job is not there."""
    mine, other = new_job(idempotency_key="k"), new_job(idempotency_key="k", tenant_id="other")
    assert store.jobs.submit(mine)[1]
    assert store.jobs.submit(other)[1]
    assert [view.job_id for view in store.jobs.list("other")] == [other.job_id]
    for look in (store.jobs.get, store.jobs.plans, store.results.page, store.jobs.cancel, store.jobs.failed_rows):
        with pytest.raises(NotFound):
            look(mine.job_id, "other")
    with pytest.raises(NotFound):
        store.jobs.plan(plan_of(store, mine).plan_id, "other")


def test_an_id_that_is_taken_is_refused(store: Store) -> None:
    """Ids come from the caller; a second job with one is a mistake."""
    job = new_job()
    store.jobs.submit(job)
    with pytest.raises(InvalidJob):
        store.jobs.submit(job)


def test_rows_invalid_by_themselves_have_their_error_at_once(store: Store) -> None:
    """The job goes on with the others, which alone are handed out."""
    job, worker = new_job(3, invalid=(1,)), new_worker(store)
    view, _ = store.jobs.submit(job)
    assert (view.failed, view.pending) == (1, 2)
    (wrong,) = store.results.page(job.job_id, TENANT)
    assert (wrong.row, wrong.error and wrong.error.code, wrong.cursor, wrong.attempt) == (1, "prompt_missing", 1, 0)
    work = must_claim(store, worker)
    assert [row.row for row in work.rows] == [0, 2]
    store.leases.record(work.lease_id, answers(0, 2))
    assert plan_of(store, job).state is ExecutionState.SUCCEEDED
    assert [(row.row, row.custom_id) for row in store.jobs.failed_rows(job.job_id, TENANT)] == [(1, "r1")]


def test_a_plan_without_valid_rows_is_born_final(store: Store) -> None:
    """Nothing is left to run, so nobody can claim it; the other plan of the job runs."""
    job = new_job(2, 1, invalid=(0, 1))
    view, _ = store.jobs.submit(job)
    assert view.state is JobState.RUNNING
    born, other = plans_of(store, job)
    assert (born.state, born.finished_ms is not None) == (ExecutionState.SUCCEEDED, True)
    work = must_claim(store, new_worker(store))
    assert work.plan_id == other.plan_id
    store.leases.record(work.lease_id, answers(2))
    assert store.jobs.get(job.job_id, TENANT).state is JobState.SUCCEEDED


def test_classes_are_numbered_once_and_in_order(store: Store) -> None:
    """A class keeps its number; a worker asks for those above what it has seen."""
    store.jobs.submit(new_job(tag="a"))
    store.jobs.submit(new_job(tag="b"))
    store.jobs.submit(new_job(tag="a"))
    known = store.leases.new_classes(0)
    assert [(item.seq, item.class_id) for item in known] == [(1, class_of("a")), (2, class_of("b"))]
    assert [item.class_id for item in store.leases.new_classes(1)] == [class_of("b")]
    assert known[0].requirements == requirements("a")


@pytest.mark.parametrize(
    "hostile",
    ["nul \0 inside", "half a pair \ud800", "emoji 😀 and \x1b[31m", "' OR 1=1 --", "\u2028", '{"a,b\\\\"}', "NULL", " "],
)
def test_hostile_text_survives_or_is_marked(store: Store, hostile: str) -> None:
    """Prompts, ids, keys and answers come back as they went in; messages for people lose what no database holds."""
    row = NewRow(row=0, custom_id=hostile, request={"prompt": hostile, "messages": None})
    job = new_job(1, rows=[row], idempotency_key=hostile)
    store.jobs.submit(job)
    found = store.jobs.find_idempotent(TENANT, hostile, "digest")
    assert found is not None
    assert found.job_id == job.job_id
    work = must_claim(store, new_worker(store))
    assert (work.rows[0].prompt, work.rows[0].custom_id) == (hostile, hostile)
    store.leases.release(work.lease_id, reason=hostile)
    work = must_claim(store, new_worker(store))
    (answer,) = answers(0)
    store.leases.record(work.lease_id, [type(answer)(row=0, text=hostile, finish_reason="stop")])
    (result,) = store.results.page(job.job_id, TENANT)
    assert (result.text, result.custom_id) == (hostile, hostile)


def test_jobs_and_plans_page_by_id(store: Store) -> None:
    """Newest jobs first, plans in order, each page from behind the last id of the one before."""
    jobs = [new_job(1, 1, 1) for _ in range(3)]
    for job in jobs:
        store.jobs.submit(job)
    newest = [view.job_id for view in store.jobs.list(TENANT)]
    assert set(newest) == {job.job_id for job in jobs}
    pages = store.jobs.list(TENANT, limit=2)
    pages = [*pages, *store.jobs.list(TENANT, after=pages[-1].job_id, limit=2)]
    assert [view.job_id for view in pages] == newest
    first, second, third = plans_of(store, jobs[0])
    assert [first.number, second.number, third.number] == [0, 1, 2]
    assert store.jobs.plans(jobs[0].job_id, TENANT, after=first.plan_id, limit=1) == [second]
    with pytest.raises(NotFound):
        store.jobs.plans(jobs[0].job_id, TENANT, after="plan_none")


def test_a_row_outside_every_plan_is_refused() -> None:
    """A job whose plans do not cover its rows cannot be built."""
    job = new_job(2)
    with pytest.raises(ValueError, match="exactly one plan"):
        new_job(2, rows=job.rows[:1], plans=job.plans)


def test_a_model_that_nobody_has_waits_visibly(store: Store) -> None:
    """A plan without a profile is queued with its condition, and nobody can claim it before it is planned again."""
    complete = new_job()
    plan = complete.plans[0]
    bare = type(plan)(
        plan_id=plan.plan_id,
        rows=plan.rows,
        runtime_plan=plan.runtime_plan,
        profile=None,
        config=plan.config,
        requirements=plan.requirements,
        condition="model-not-present",
    )
    job = new_job(job_id=complete.job_id, plans=[bare])
    store.jobs.submit(job)
    assert plan_of(store, job).condition == "model-not-present"
    worker = new_worker(store)
    assert claim(store, worker) is None
    (stale,) = store.jobs.stale_plans(2)
    assert isinstance(stale, PlanView)
    changes = {"runtime_plan": stale.planned, "profile": plan.profile, "requirements": stale.requirements}
    assert store.jobs.replan(stale.plan_id, inventory_seq=2, **changes)  # type: ignore[arg-type]  # a map of keywords
    assert not store.jobs.replan(stale.plan_id, inventory_seq=2, **changes)  # type: ignore[arg-type]  # a map of keywords
    assert plan_of(store, job).condition is None
    assert claim(store, worker) is not None


def test_a_race_of_submissions_makes_one_job(store: Store) -> None:
    """Eight clients at once with one key: one of them makes the job, all hear of the same one."""
    gate = threading.Barrier(8)

    def submit(_: int) -> tuple[str, bool]:
        job = new_job(idempotency_key="k")
        gate.wait()
        view, created = store.jobs.submit(job)
        return view.job_id, created

    with ThreadPoolExecutor(8) as pool:
        answered = list(pool.map(submit, range(8)))
    assert len({job_id for job_id, _ in answered}) == 1
    assert sum(created for _, created in answered) == 1
    assert len(store.jobs.list(TENANT)) == 1


def test_new_classes_are_numbered_in_a_race(store: Store) -> None:
    """Submissions at once that bring new and shared classes number each class once, without gaps."""
    gate = threading.Barrier(6)

    def submit(number: int) -> None:
        job = new_job(tag=f"class{number // 2}")
        gate.wait()
        store.jobs.submit(job)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(submit, range(6)))
    assert [item.seq for item in store.leases.new_classes(0)] == [1, 2, 3]
