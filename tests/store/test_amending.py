"""Do a job's waiting plans get other options, and nobody else's?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ollm_service.core.errors import Conflict, NotFound
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.options import RuntimeConfig
from ollm_service.store.amending import Amended, Amendment, Options
from ollm_service.store.database import Store
from ollm_service.store.jobs import NewJob
from tests.store.samples import (
    PLAN,
    PROFILE,
    REPORT,
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

PAGED = RuntimeConfig(kv_cache_strategy="paged")


def amendment(tag: str = "", **changes: Any) -> Amendment:
    """From no options to the paged strategy and, with a tag, its label."""
    needs = requirements(tag)
    values: dict[str, Any] = {
        "before": Options(config=RuntimeConfig(), where=None),
        "after": Options(config=PAGED, where=needs.where),
        "runtime_plan": PLAN.evolve(reason="amended"),
        "profile": PROFILE,
        "requirements": needs,
        "condition": None,
        "inventory_seq": 1,
        "reason": "kv_cache_strategy paged",
    }
    return Amendment(**(values | changes))


def kinds(store: Store, plan_id: str) -> Sequence[str]:
    """What happened to a plan."""
    return [event.kind for event in store.jobs.plan(plan_id, TENANT).events]


def amend(store: Store, job: NewJob, change: Amendment | None = None, skip: Sequence[int] = ()) -> Amended:
    """How many plans and rows it changed."""
    return store.jobs.amend(job.job_id, TENANT, change, skip=skip)[1]


def test_waiting_plans_get_the_new_options_and_the_class_that_follows(store: Store) -> None:
    """The job shows them, too; workers of the new class find the plans, and those of the old one do not."""
    job, worker = new_job(2, 2, tag="old"), new_worker(store)
    store.jobs.submit(job)
    view, amended = store.jobs.amend(job.job_id, TENANT, amendment("new", before=Options(config=RuntimeConfig(), where=None)))
    assert amended == Amended(plans=2, plans_kept=0, rows_skipped=0)
    assert (view.config, view.where) == (PAGED, 'tag == "new"')
    for plan in plans_of(store, job):
        assert (plan.config, plan.class_id, plan.runtime_plan.reason) == (PAGED, class_of("new"), "amended")
        assert kinds(store, plan.plan_id) == ["submit", "amend"]
    assert claim(store, worker, "old") is None
    assert must_claim(store, worker, "new").config == PAGED


def test_plans_that_somebody_holds_or_that_ended_keep_what_they_had(store: Store) -> None:
    """Of four plans one has ended, one is leased and one runs: the fourth alone is amended, and the answer says so."""
    job, worker = new_job(1, 1, 1, 1, tag="x"), new_worker(store)
    store.jobs.submit(job)
    store.leases.record(must_claim(store, worker, "x").lease_id, answers(0), REPORT)
    held = must_claim(store, worker, "x")
    store.leases.start(must_claim(store, worker, "x").lease_id)
    assert amend(store, job, amendment("y")) == Amended(plans=1, plans_kept=2, rows_skipped=0)
    assert [plan.class_id == class_of("y") for plan in plans_of(store, job)] == [False, False, False, True]
    assert [plan.config == PAGED for plan in plans_of(store, job)] == [False, False, False, True]
    store.leases.record(held.lease_id, answers(1), REPORT)
    assert [plan.state for plan in plans_of(store, job)][1] is ExecutionState.SUCCEEDED


def test_where_nothing_waits_nothing_changes(store: Store) -> None:
    """Neither the plans nor what the job says of itself."""
    job, worker = new_job(), new_worker(store)
    store.jobs.submit(job)
    must_claim(store, worker)
    view, amended = store.jobs.amend(job.job_id, TENANT, amendment("y"))
    assert amended == Amended(plans=0, plans_kept=1, rows_skipped=0)
    assert (view.config, view.where) == (RuntimeConfig(), None)


def test_saying_it_again_changes_nothing_more(store: Store) -> None:
    """A repetition after a lost reply gets the same answer and leaves no second event."""
    job = new_job()
    store.jobs.submit(job)
    assert (
        amend(store, job, amendment("y")) == amend(store, job, amendment("y")) == Amended(plans=1, plans_kept=0, rows_skipped=0)
    )
    assert kinds(store, plan_of(store, job).plan_id) == ["submit", "amend"]


def test_an_amendment_of_options_that_the_job_has_no_more_is_refused(store: Store) -> None:
    """Two users at once: the second is told, and nothing of theirs is stored."""
    job = new_job()
    store.jobs.submit(job)
    amend(store, job, amendment("first"))
    with pytest.raises(Conflict):
        amend(store, job, amendment("second"))
    assert plan_of(store, job).class_id == class_of("first")
    with pytest.raises(NotFound):
        store.jobs.amend(job.job_id, "somebody else", amendment("x"))


def test_a_plan_with_answers_keeps_its_weights(store: Store) -> None:
    """One model answers all rows of a plan: other options are taken, another model is not."""
    job, worker = new_job(2), new_worker(store)
    store.jobs.submit(job)
    work = must_claim(store, worker)
    store.leases.record(work.lease_id, answers(0), REPORT)
    store.leases.release(work.lease_id, reason="drain")
    other = amendment("y", profile=replace(PROFILE, digest="e" * 64))
    assert amend(store, job, other) == Amended(plans=0, plans_kept=1, rows_skipped=0)
    assert amend(store, job, amendment("y")) == Amended(plans=1, plans_kept=0, rows_skipped=0)
    assert plan_of(store, job).runtime_plan == REPORT.runtime_plan, "it shows how it ran"
    assert {row.row for row in must_claim(store, worker, "y").rows} == {1}


def test_who_declined_the_old_options_may_take_the_new(store: Store) -> None:
    """A decline was about what was asked for then."""
    job, worker = new_job(), new_worker(store)
    store.jobs.submit(job)
    store.leases.release(must_claim(store, worker).lease_id, reason="no room", decline_ms=60_000)
    assert claim(store, worker) is None
    amend(store, job, amendment())
    assert must_claim(store, worker).config == PAGED


def test_rows_of_waiting_plans_can_be_skipped(store: Store) -> None:
    """They end with an error of that name; a plan without any other row ends well; rows that somebody holds are left."""
    job, worker = new_job(2, 1, 1), new_worker(store)
    store.jobs.submit(job)
    held = must_claim(store, worker)
    assert {row.row for row in held.rows} == {0, 1}
    assert amend(store, job, skip=[1, 2, 99]) == Amended(plans=0, plans_kept=2, rows_skipped=1)
    states = [plan.state for plan in plans_of(store, job)]
    assert states == [ExecutionState.LEASED, ExecutionState.SUCCEEDED, ExecutionState.QUEUED]
    (result,) = store.results.page(job.job_id, TENANT)
    assert (result.row, result.error and result.error.code) == (2, "skipped")
    assert amend(store, job, skip=[2]).rows_skipped == 0
    store.leases.record(held.lease_id, answers(0, 1), REPORT)
    view, amended = store.jobs.amend(job.job_id, TENANT, amendment("y"), skip=[3])
    assert (view.state, view.succeeded, view.failed) == (JobState.SUCCEEDED, 2, 2)
    assert amended == Amended(plans=0, plans_kept=0, rows_skipped=1)


def test_skipping_some_rows_leaves_the_others_to_run(store: Store) -> None:
    """The next holder gets the rest."""
    job, worker = new_job(3), new_worker(store)
    store.jobs.submit(job)
    assert amend(store, job, amendment("y"), skip=[1]) == Amended(plans=1, plans_kept=0, rows_skipped=1)
    assert kinds(store, plan_of(store, job).plan_id) == ["submit", "skip", "amend"]
    assert {row.row for row in must_claim(store, worker, "y").rows} == {0, 2}
