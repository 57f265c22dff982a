"""Is it known what of a job still waits, and which of its rows are the longest?"""

from dataclasses import replace

import pytest

from ollm_service.core.errors import NotFound
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.options import RuntimeConfig
from ollm_service.store.amending import Amendment, Options
from ollm_service.store.database import Store
from ollm_service.store.jobs import NewRow
from tests.store.samples import PLAN, PROFILE, REPORT, TENANT, answers, must_claim, new_job, new_worker, requirements


def test_plans_that_ask_for_the_same_wait_together(store: Store) -> None:
    """Those that are held, that have ended, or that ask for something else are told apart."""
    job, worker = new_job(1, 2, 3, 4), new_worker(store)
    store.jobs.submit(job)
    ids = [plan.plan_id for plan in job.plans]
    store.leases.record(must_claim(store, worker).lease_id, answers(0), REPORT)
    work = must_claim(store, worker)
    store.leases.record(work.lease_id, answers(1), REPORT)
    (waiting,) = store.jobs.waiting(job.job_id, TENANT)
    assert (waiting.plan.plan_id, waiting.plan_ids, waiting.rows_left) == (ids[2], (ids[2], ids[3]), 7)
    assert store.jobs.rows_left(job.job_id) == {ExecutionState.QUEUED: 7, ExecutionState.RUNNING: 1}
    options = Options(config=RuntimeConfig(), where=None)
    amendment = Amendment(
        before=options,
        after=replace(options, where=requirements("x").where),
        runtime_plan=PLAN,
        profile=PROFILE,
        requirements=requirements("x"),
        condition=None,
        inventory_seq=1,
        reason="where",
    )
    store.jobs.amend(job.job_id, TENANT, amendment)
    store.leases.release(work.lease_id, reason="drain")
    found = store.jobs.waiting(job.job_id, TENANT)
    assert [(group.plan_ids, group.rows_left) for group in found] == [((ids[1],), 1), ((ids[2], ids[3]), 7)]
    with pytest.raises(NotFound):
        store.jobs.waiting(job.job_id, "somebody else")


def test_the_longest_rows_come_first_by_their_bytes(store: Store) -> None:
    """After those with an output limit of their own; answered rows are left out, and pages follow each other."""
    prompts = ["xxxx", "ää ä", "y" * 50, 'a "max_new_tokens": 9 in a prompt', "z"]
    rows = [NewRow(row=row, custom_id=f"r{row}", request={"prompt": prompt}) for row, prompt in enumerate(prompts)]
    rows[4] = replace(rows[4], request={"prompt": "z", "generation": {"max_new_tokens": 9}})
    job, worker = new_job(5, rows=rows), new_worker(store)
    store.jobs.submit(job)
    plan_ids = [plan.plan_id for plan in job.plans]
    found = store.jobs.longest_rows(plan_ids)
    assert [row.row for row, _ in found] == [4, 2, 3, 1, 0]
    assert found[3] == (rows[1], len('{"prompt":"ää ä"}'.encode()))
    assert [row.row for row, _ in store.jobs.longest_rows(plan_ids, offset=1, limit=2)] == [2, 3]
    work = must_claim(store, worker)
    store.leases.record(work.lease_id, answers(2, 4), REPORT)
    assert [row.row for row, _ in store.jobs.longest_rows(plan_ids)] == [3, 1, 0]
