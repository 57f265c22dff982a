"""What do quotes find of earlier attempts, and how long does a preview stay?"""

import pytest

from ollm_service.core.errors import NotFound
from ollm_service.core.leasing import AttemptReport
from ollm_service.core.retry import Failure
from ollm_service.store.database import Store
from ollm_service.store.quotes import StoredPreview
from tests.store.ageing import let_time_pass
from tests.store.samples import APPLIED, DIGEST, PLAN, TENANT, answers, must_claim, new_job, new_worker, requirements

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
