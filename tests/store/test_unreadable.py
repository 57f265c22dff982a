"""Does one row that cannot be decoded keep anybody from seeing or moving the others?"""

import pytest

from ollm_service.core.errors import NotFound, ServiceError
from ollm_service.core.lifecycle import JobState
from ollm_service.store.database import Store
from ollm_service.store.views import PlanView, UnreadablePlan
from tests.store.ageing import let_time_pass
from tests.store.samples import TENANT, class_of, must_claim, new_job, new_worker, plans_of, requirements
from tests.store.spoiling import spoil

PLAN_COLUMNS = ("planned", "finalized", "profile", "config")


@pytest.mark.parametrize("column", PLAN_COLUMNS)
def test_an_unreadable_plan_is_told_apart(store: Store, store_url: str, column: str) -> None:
    """Among those to be planned anew it is named with the kind of error; lists leave it out, and end where they should."""
    job = new_job(1, 1, 1)
    store.jobs.submit(job)
    first, spoilt, last = (plan.plan_id for plan in job.plans)
    spoil(store_url, "runtime_plans", column, spoilt)
    found = {view.plan_id: view for view in store.jobs.stale_plans(7)}
    assert found[spoilt] == UnreadablePlan(plan_id=spoilt, error="JSONDecodeError")
    assert isinstance(found[first], PlanView)
    assert isinstance(found[last], PlanView)
    assert store.jobs.mark_planned([spoilt], 7) == 1
    assert [plan.plan_id for plan in plans_of(store, job)] == [first, last]
    looks = ((1, None), (1, first), (1, last), (2, None))
    pages = [store.jobs.list_plans(TENANT, limit=limit, after=after) for limit, after in looks]
    assert [[plan.plan_id for plan in page] for page in pages] == [[first], [last], [], [first, last]]
    with pytest.raises(ServiceError, match="cannot be read"):
        store.jobs.plan(spoilt, TENANT)
    with pytest.raises(NotFound):
        store.jobs.plan(spoilt, "other")


def test_an_unreadable_class_has_no_requirements(store: Store, store_url: str) -> None:
    """Workers and coordinators still hear of all the others, and of its number."""
    for tag in ("a", "b", "c"):
        store.jobs.submit(new_job(tag=tag))
    spoil(store_url, "plan_classes", "requirements", class_of("b"))
    assert [item.requirements for item in store.leases.new_classes(0)] == [requirements("a"), None, requirements("c")]
    backlog = {item.class_id: item.requirements for item in store.fleet.backlog()}
    assert backlog == {class_of("a"): requirements("a"), class_of("b"): None, class_of("c"): requirements("c")}


@pytest.mark.parametrize("column", ["capabilities", "live"])
def test_an_unreadable_worker_is_left_out(store: Store, store_url: str, column: str) -> None:
    """Its models may still be there; nobody else's are lost."""
    well, spoilt = new_worker(store, "well"), new_worker(store, "spoilt")
    spoil(store_url, "workers", column, spoilt)
    assert [worker.worker_id for worker in store.fleet.workers()] == [well]
    (held,) = store.fleet.inventory()[1]
    assert well in held.workers
    assert (spoilt in held.workers) == (column == "live")


@pytest.mark.parametrize("column", ["config", "generation"])
def test_an_unreadable_job_is_shown_without_its_options(store: Store, store_url: str, column: str) -> None:
    """It stands in the list with its counts, can be looked at and can be cancelled."""
    well, spoilt = new_job(), new_job()
    store.jobs.submit(well)
    store.jobs.submit(spoilt)
    spoil(store_url, "jobs", column, spoilt.job_id)
    assert {job.job_id for job in store.jobs.list(TENANT)} == {well.job_id, spoilt.job_id}
    assert getattr(store.jobs.get(well.job_id, TENANT), column) is not None
    assert getattr(store.jobs.get(spoilt.job_id, TENANT), column) is None
    assert store.jobs.cancel(spoilt.job_id, TENANT).state == JobState.CANCELLED


@pytest.mark.parametrize("way", ["expire", "reap", "cancel"])
def test_what_cannot_be_read_can_be_ended(store: Store, store_url: str, way: str) -> None:
    """Deadlines, lost leases and cancels need nothing of it that is decoded."""
    job = new_job(1, 1, deadline_ms=60_000 if way == "expire" else None)
    store.jobs.submit(job)
    if way == "reap":
        worker = new_worker(store)
        must_claim(store, worker)
        must_claim(store, worker)
    for column in (*PLAN_COLUMNS, "lone_crashes"):
        spoil(store_url, "runtime_plans", column, job.plans[0].plan_id)
    let_time_pass(store_url, 60_001)
    if way == "expire":
        assert store.leases.expire() == 2
    elif way == "reap":
        assert store.leases.reap() == 2
    else:
        store.jobs.cancel(job.job_id, TENANT)
    state = {"expire": "expired", "reap": "queued", "cancel": "cancelled"}[way]
    assert store.jobs.get(job.job_id, TENANT).state == state
    assert [plan.state for plan in plans_of(store, job)] == [state]
