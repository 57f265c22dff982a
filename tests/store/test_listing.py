"""In which order do plans of all jobs come, and how are they paged through?"""

from typing import Any

import pytest
from sqlalchemy import text

from ollm_service.core.errors import NotFound
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.store.database import Store
from ollm_service.store.engine import connect, parse_url
from ollm_service.store.submission import NewJob
from tests.store.samples import TENANT, must_claim, new_job, new_worker


def submitted(store: Store, *sizes: int, **changes: Any) -> NewJob:
    """A job that is stored."""
    job = new_job(*sizes, **changes)
    store.jobs.submit(job)
    return job


def ids(*jobs: NewJob) -> list[str]:
    """The ids of these jobs' plans, in order."""
    return [plan.plan_id for job in jobs for plan in job.plans]


def all_pages(store: Store, limit: int, **filters: object) -> list[str]:
    """The ids of all plans, page by page."""
    found: list[str] = []
    while page := store.jobs.list_plans(TENANT, after=found[-1] if found else None, limit=limit, **filters):  # type: ignore[arg-type]  # a map of keywords
        found += [plan.plan_id for plan in page]
    return found


@pytest.mark.parametrize("limit", [1, 2, 100])
@pytest.mark.parametrize("is_same_moment", [False, True])
def test_every_plan_comes_once_the_newest_jobs_first(store: Store, store_url: str, limit: int, is_same_moment: bool) -> None:
    """Each job's plans stay together and in order, whatever the page's length, also where jobs came in the same millisecond."""
    jobs = [submitted(store, 1, 1, 1), submitted(store, 1), submitted(store, 1, 1)]
    engine = connect(parse_url(store_url))
    with engine.begin() as connection:
        for number, job in enumerate(jobs):
            age = {"job": job.job_id, "at": 7 if is_same_moment else number}
            connection.execute(text("UPDATE jobs SET created_ms = :at WHERE id = :job"), age)
    engine.dispose()
    assert all_pages(store, limit) == ids(*sorted(jobs, key=lambda job: job.job_id, reverse=True))
    assert all_pages(store, limit, job_id=jobs[0].job_id) == ids(jobs[0])


def test_plans_can_be_listed_by_state(store: Store) -> None:
    """As they are now: a page goes on behind a plan that has meanwhile got into another state."""
    old, new = submitted(store, 1, 1), submitted(store, 1, 1)
    held = must_claim(store, new_worker(store))
    assert held.plan_id == ids(old)[0]
    assert all_pages(store, 100, state=ExecutionState.LEASED) == [held.plan_id]
    assert all_pages(store, 100, state=ExecutionState.QUEUED) == [*ids(new), ids(old)[1]]
    assert all_pages(store, 100, state=ExecutionState.QUEUED, job_id=old.job_id) == ids(old)[1:]
    rest = store.jobs.list_plans(TENANT, state=ExecutionState.QUEUED, after=held.plan_id)
    assert [plan.plan_id for plan in rest] == ids(old)[1:]


def test_other_tenants_plans_are_not_there(store: Store) -> None:
    """Neither in the list, nor as the place to go on from, nor by their job."""
    mine, other = submitted(store), submitted(store, tenant_id="other")
    assert all_pages(store, 100) == ids(mine)
    for filters in ({"after": ids(other)[0]}, {"job_id": other.job_id}, {"after": ids(mine)[0], "job_id": other.job_id}):
        with pytest.raises(NotFound):
            store.jobs.list_plans(TENANT, **filters)  # type: ignore[arg-type]  # a map of keywords
    elsewhere = submitted(store)
    with pytest.raises(NotFound, match="in job"):
        store.jobs.list_plans(TENANT, job_id=mine.job_id, after=ids(elsewhere)[0])
