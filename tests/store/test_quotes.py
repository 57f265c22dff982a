"""What do quotes find of earlier attempts, and how long does a preview stay?"""

from dataclasses import replace

import pytest

from ollm_service.core.errors import NotFound
from ollm_service.core.leasing import AttemptReport
from ollm_service.core.retry import Failure
from ollm_service.core.worker_quote import RowSize
from ollm_service.store.ahead import MOST_CLASSES, SAMPLED_PLANS, SAMPLED_ROWS, SEEN_PLANS
from ollm_service.store.database import Store
from ollm_service.store.quotes import StoredPreview
from tests.store.ageing import let_time_pass
from tests.store.samples import APPLIED, DIGEST, PLAN, TENANT, answers, class_of, must_claim, new_job, new_worker, requirements
from tests.store.spoiling import spoil

WEEK_MS = 7 * 24 * 3600 * 1000
PREVIEW = StoredPreview(preview_id="pl_1", request={"model": "tiny"}, planned=PLAN, requirements=requirements())


def test_attempts_that_answered_everything_are_remembered_by_model(store: Store) -> None:
    """Newest first, with what they placed and measured; an attempt that failed, or ran another model, is not among them."""
    worker = new_worker(store)
    for seconds in (1.0, 2.0):
        store.jobs.submit(new_job(1))
        report = AttemptReport(runtime_plan=APPLIED, placement={"tier": "all on device"}, measured={"decode_seconds": seconds})
        store.leases.record(must_claim(store, worker).lease_id, answers(0), report)
    store.jobs.submit(new_job(1))
    store.leases.fail(must_claim(store, worker).lease_id, Failure(code="x", message="y", is_permanent=True))
    found = store.quotes.measured(DIGEST)
    assert sorted(attempt.number("decode_seconds") for attempt in found) == [1.0, 2.0]
    assert {attempt.placement["tier"] for attempt in found} == {"all on device"}
    assert store.quotes.measured("another") == []


def test_a_preview_can_be_named_for_a_week(store: Store, store_url: str) -> None:
    """By its tenant alone; then it is forgotten."""
    store.quotes.keep_preview(PREVIEW, TENANT)
    assert store.quotes.preview("pl_1", TENANT) == PREVIEW
    with pytest.raises(NotFound):
        store.quotes.preview("pl_1", "somebody-else")
    assert store.quotes.forget_previews(WEEK_MS) == 0
    let_time_pass(store_url, 2 * WEEK_MS)
    assert store.quotes.forget_previews(WEEK_MS) == 1
    with pytest.raises(NotFound, match="There is no preview pl_1"):
        store.quotes.preview("pl_1", TENANT)


def test_what_comes_before_a_new_job_is_told_by_class(store: Store) -> None:
    """In the order of the queue: plans and rows without a result, who holds some, how large rows are. Lower priorities do not."""
    north = new_worker(store, "north")
    held = new_job(4, 2, 2, tag="a")
    store.jobs.submit(held)
    work = must_claim(store, north, "a")
    store.leases.record(work.lease_id, answers(0), AttemptReport(runtime_plan=APPLIED))
    store.jobs.submit(new_job(3, tag="urgent", priority=5))
    store.jobs.submit(new_job(9, tag="later", priority=-1))
    done = new_job(1, tag="done")
    store.jobs.submit(done)
    store.jobs.cancel(done.job_id, TENANT)
    (urgent, usual), untold = store.quotes.ahead()
    assert untold == 0
    assert (urgent.plan.class_id, urgent.queued_plans, urgent.queued_rows, urgent.held_plans) == (class_of("urgent"), 1, 3, 0)
    assert (usual.plan.class_id, usual.queued_plans, usual.queued_rows) == (class_of("a"), 2, 4)
    assert (usual.held_plans, usual.held_rows) == (1, {north: 3})
    assert usual.plan.planned == PLAN
    assert set(usual.sample) == {RowSize(prompt_bytes=5, max_new_tokens=7)}
    assert len(usual.sample) == 8, "of each plan the first rows"
    assert [found.plan.class_id for found in store.quotes.ahead(priority=1)[0]] == [class_of("urgent"), class_of("a")]


def test_what_is_only_held_comes_before_a_job_of_any_priority(store: Store) -> None:
    """Nobody takes it away; where nothing is queued or held, nothing comes first."""
    assert store.quotes.ahead() == ([], 0)
    store.jobs.submit(new_job(2))
    worker = new_worker(store)
    must_claim(store, worker)
    ((found,), untold) = store.quotes.ahead(priority=9)
    assert (found.queued_plans, found.queued_rows, found.held_plans, found.held_rows, untold) == (0, 0, 1, {worker: 2}, 0)


def test_the_rest_of_a_long_queue_is_taken_to_be_like_its_top(store: Store) -> None:
    """All plans are counted, the rows of the first ones; of many classes the largest are told, of the others how many plans."""
    store.jobs.submit(new_job(*[2] * (SEEN_PLANS + 10), tag="long"))
    for number in range(MOST_CLASSES):
        store.jobs.submit(new_job(1, tag=f"short {number}"))
    found, untold = store.quotes.ahead()
    assert (len(found), untold) == (MOST_CLASSES, 1)
    assert (found[0].queued_plans, found[0].queued_rows) == (SEEN_PLANS + 10, 2 * (SEEN_PLANS + 10))
    assert len(found[0].sample) <= SAMPLED_PLANS * SAMPLED_ROWS


def test_plans_that_cannot_be_read_are_only_counted(store: Store, store_url: str) -> None:
    """What they would take is not known; a plan of a model that nobody has cannot be taken, and is not told."""
    broken = new_job(1, 1, tag="broken")
    store.jobs.submit(broken)
    for plan in broken.plans:
        spoil(store_url, "runtime_plans", "planned", plan.plan_id)
    nowhere = new_job(1, tag="nowhere")
    store.jobs.submit(replace(nowhere, plans=[replace(plan, profile=None) for plan in nowhere.plans]))
    assert store.quotes.ahead() == ([], 2)
