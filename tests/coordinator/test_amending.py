"""Does a user's change reach the plans that wait, and is what cannot be changed refused?"""

import pytest

from ollm_service.coordinator.amending import Change, amend
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import submit
from ollm_service.core.errors import (
    Conflict,
    InvalidExpression,
    InvalidJob,
    InvalidOption,
    NotFound,
    OllmError,
    PlanNotExecutable,
)
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.requirements import class_id
from tests.coordinator.services import answer, claim_one, sent_hints, submission
from tests.store.samples import new_worker


def test_giving_up_the_label_lets_the_plan_run(service: Service) -> None:
    """The plan matches, shows no condition any more, and its class is hinted; the job shows the change, and why it was."""
    worker_id = new_worker(service.store)
    job = submit(service, submission(where='zone == "moon"', runtime={"dense_projection_chunk_rows": 8})).job
    assert sent_hints(service) == []
    view, amended = amend(service, job.job_id, DEFAULT_TENANT, Change(where="any"))
    assert (amended.plans, amended.plans_kept) == (1, 0)
    assert (view.where, view.config) == (None, RuntimeConfig(dense_projection_chunk_rows=8))
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert (plan.condition, plan.requirements.where, plan.class_id) == (None, None, class_id(plan.requirements))
    assert sent_hints(service) == [(plan.class_id, 1)]
    assert service.store.jobs.plan(plan.plan_id, DEFAULT_TENANT).events[-1].reason == "where any"
    answer(service, claim_one(service, worker_id))


def test_options_change_one_by_one(service: Service) -> None:
    """What is not named stays; null goes back to the default; the plan is made anew."""
    new_worker(service.store)
    job = submit(service, submission(runtime={"dense_projection_chunk_rows": 8, "kv_cache_strategy": "paged"})).job
    view, _ = amend(service, job.job_id, DEFAULT_TENANT, Change(runtime={"kv_cache_strategy": None}))
    assert view.config == RuntimeConfig(dense_projection_chunk_rows=8)
    view, _ = amend(
        service, job.job_id, DEFAULT_TENANT, Change(runtime={"dense_projection_chunk_rows": None, "use_cache": False})
    )
    assert view.config == RuntimeConfig(use_cache=False)
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert (plan.config, plan.planned.supports_disk_cache) == (RuntimeConfig(use_cache=False), False)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Change(), InvalidJob),
        (Change(runtime={"device": "gpu"}), InvalidOption),
        (Change(runtime={"colour": None}), InvalidOption),
        (Change(where="zone ="), InvalidExpression),
        (Change(runtime={"backend": "transformers-generic", "kv_cache_strategy": "paged"}), PlanNotExecutable),
    ],
)
def test_what_is_wrong_changes_nothing(service: Service, change: Change, kind: type[OllmError]) -> None:
    """Neither the job nor its plan."""
    new_worker(service.store)
    job = submit(service, submission()).job
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    with pytest.raises(kind):
        amend(service, job.job_id, DEFAULT_TENANT, change)
    assert service.store.jobs.get(job.job_id, DEFAULT_TENANT) == job
    assert list(service.store.jobs.plans(job.job_id, DEFAULT_TENANT)) == [plan]


def test_a_job_that_has_ended_cannot_be_changed(service: Service) -> None:
    """Nor can one that is not there."""
    new_worker(service.store)
    job = submit(service, submission([7])).job
    with pytest.raises(Conflict):
        amend(service, job.job_id, DEFAULT_TENANT, Change(where="any"))
    with pytest.raises(NotFound):
        amend(service, "job_none", DEFAULT_TENANT, Change(where="any"))


@pytest.mark.parametrize("row", [-1, 2, 10**9])
def test_rows_that_are_not_there_are_not_skipped_silently(service: Service, row: int) -> None:
    """The job says which rows it has, and nothing is changed."""
    new_worker(service.store)
    job = submit(service, submission()).job
    with pytest.raises(InvalidJob, match="has no row"):
        amend(service, job.job_id, DEFAULT_TENANT, Change(skip_rows=[0, row]))
    assert service.store.jobs.get(job.job_id, DEFAULT_TENANT).failed == 0


def test_rows_are_skipped_without_planning_anew(service: Service) -> None:
    """The plan keeps its options and runs the others."""
    worker_id = new_worker(service.store)
    job = submit(service, submission()).job
    view, amended = amend(service, job.job_id, DEFAULT_TENANT, Change(skip_rows=[1]))
    assert (amended.rows_skipped, view.failed, view.pending) == (1, 1, 1)
    assert [row.row for row in claim_one(service, worker_id).rows] == [0]
