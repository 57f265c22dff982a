"""What do the loops mend: lost leases, changed fleets, passed deadlines, lost hints, and their own outages?"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import submit
from ollm_service.coordinator.upkeep import REMEMBER_MS, Loop, Upkeep, reap, sweep
from ollm_service.core.errors import DatabaseUnavailable
from ollm_service.core.leasing import RowResult
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.store.views import PlanView
from tests.coordinator.services import claim_one, sent_hints, submission
from tests.store.ageing import let_time_pass
from tests.store.samples import LIVE, PROFILE, REPORT, capabilities, new_worker
from tests.store.spoiling import BROKEN, spoil
from tests.waiting import wait_for

QUICK = 0.02  # seconds between turns


def plan_of(service: Service, job_id: str) -> PlanView:
    """The only plan of a job."""
    (plan,) = service.store.jobs.plans(job_id, DEFAULT_TENANT)
    return plan


@contextmanager
def two_coordinators(service: Service) -> Iterator[None]:
    """Fast loops, and a second coordinator's beside them."""
    both = [Upkeep(service, reap_seconds=QUICK, sweep_seconds=QUICK) for _ in range(2)]
    for upkeep in both:
        upkeep.start()
    yield
    for upkeep in both:
        upkeep.stop()


def test_a_lost_lease_is_reaped_once(service_on_both: Service) -> None:
    """A plan whose worker fell silent is queued again; two coordinators count one loss, not two."""
    service = service_on_both
    worker_id = new_worker(service.store)
    job = submit(service, submission()).job
    claim_one(service, worker_id)
    with two_coordinators(service):
        wait_for(lambda: plan_of(service, job.job_id).state is ExecutionState.QUEUED, timeout=20, what="the plan to be reaped")
    assert plan_of(service, job.job_id).losses == 1
    assert service.store.fleet.workers() == []


def test_a_passed_deadline_expires_the_job(service_on_both: Service) -> None:
    """A queued job ends at its deadline, and its rows say so."""
    service = service_on_both
    job = submit(service, submission(model="org/name", deadline_seconds=0.1)).job
    with two_coordinators(service):
        wait_for(lambda: plan_of(service, job.job_id).state is ExecutionState.EXPIRED, timeout=20, what="the plan to expire")
    results = service.store.results.page(job.job_id, DEFAULT_TENANT)
    assert [result.error.code for result in results if result.error] == ["expired", "expired"]


def test_a_condition_comes_and_goes_with_the_workers(service_on_both: Service) -> None:
    """A plan that waits for a label says so, and stops saying so when a worker with that label has joined, and again."""
    service = service_on_both
    new_worker(service.store)
    job = submit(service, submission(where='zone == "attic"')).job
    sweep(service)
    assert plan_of(service, job.job_id).condition == "no-capable-worker"
    joined = new_worker(service.store, "attic", labels={"zone": "attic"})
    sweep(service)
    assert plan_of(service, job.job_id).condition is None
    service.store.leases.retire(joined)
    sweep(service)
    assert plan_of(service, job.job_id).condition == "no-capable-worker"


def test_a_plan_that_everybody_declined_says_so(service: Service) -> None:
    """Every capable node has declined it: `declined-everywhere`; a further capable node clears it."""
    job = None
    for node in ("a", "b"):
        worker_id = new_worker(service.store, node)
        job = job or submit(service, submission()).job
        service.store.leases.release(claim_one(service, worker_id).lease_id, reason="no room", decline_ms=60_000)
    assert job is not None
    sweep(service)
    assert plan_of(service, job.job_id).condition == "declined-everywhere"
    new_worker(service.store, "c")
    sweep(service)
    assert plan_of(service, job.job_id).condition is None


def test_a_model_that_arrives_gets_its_plans(service_on_both: Service) -> None:
    """A plan made for nobody is made again when a worker brings the model: digest, passes and class are now known."""
    service = service_on_both
    job = submit(service, submission(model="org/name")).job
    before = plan_of(service, job.job_id)
    assert (before.condition, before.profile) == ("model-not-present", None)
    held = replace(PROFILE, repo_id="org/name", name="org--name")
    worker_id = new_worker(service.store, models=(held,))
    sweep(service)
    after = plan_of(service, job.job_id)
    assert (after.condition, after.profile) == (None, held)
    assert after.class_id != before.class_id
    assert claim_one(service, worker_id).plan_id == after.plan_id


def test_a_plan_whose_model_left_waits_for_it_unchanged(service: Service) -> None:
    """When the last worker with an opaque model goes, the plan keeps its digest and is looked at once, not at every sweep."""
    worker_id = new_worker(service.store)
    job = submit(service, submission()).job
    before = plan_of(service, job.job_id)
    service.store.leases.retire(worker_id)
    sweep(service)
    after = plan_of(service, job.job_id)
    assert (after.class_id, after.condition) == (before.class_id, "no-capable-worker")
    assert service.store.jobs.stale_plans(service.store.fleet.inventory_seq()) == []


def test_a_half_answered_plan_keeps_its_weights(service: Service) -> None:
    """Rows of one plan are answered by one model, even when there are only other weights under its name by now."""
    worker_id = new_worker(service.store, "a")
    job = submit(service, submission()).job
    lease_id = claim_one(service, worker_id).lease_id
    service.store.leases.record(lease_id, [RowResult(row=0, text="4", finish_reason="stop")], REPORT)
    service.store.leases.release(lease_id, reason="drain")
    service.store.leases.retire(worker_id)
    for node in ("b", "c"):
        new_worker(service.store, node, models=(replace(PROFILE, digest="e" * 64),))
    sweep(service)
    assert plan_of(service, job.job_id).requirements.model_digest == PROFILE.digest
    fresh = submit(service, submission()).job
    assert plan_of(service, fresh.job_id).requirements.model_digest == "e" * 64


def test_a_job_stays_with_its_model_while_somebody_has_it(service: Service) -> None:
    """Another model of the same name, however common, does not answer plans that were made for the first."""
    new_worker(service.store)
    job = submit(service, submission()).job
    for node in ("x", "y"):
        new_worker(service.store, node, models=(replace(PROFILE, digest="e" * 64),))
    sweep(service)
    assert plan_of(service, job.job_id).requirements.model_digest == PROFILE.digest


def test_the_sweep_hints_as_many_as_are_idle(service: Service) -> None:
    """A class is hinted once for each idle slot of a capable worker, at most once for each plan that may be claimed."""
    busy, _idle = new_worker(service.store, "busy"), new_worker(service.store, "idle")
    for _ in range(3):
        submit(service, submission())
    claim_one(service, busy)
    sent_hints(service).clear()
    sweep(service)
    assert [count for _, count in sent_hints(service)] == [1]
    service.store.leases.register(busy, capabilities("busy", slots=9), LIVE, pid=1)
    sent_hints(service).clear()
    sweep(service)
    assert [count for _, count in sent_hints(service)] == [2]


@pytest.mark.parametrize("column", ["planned", "config"])
def test_one_unreadable_plan_stops_no_sweep(
    service_on_both: Service, database_url: str, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    """The others are planned anew and hinted; the log names it, once for each change of the fleet and without its contents."""
    service = service_on_both
    spoilt, sound = (submit(service, submission(model="org/name")).job for _ in range(2))
    spoilt_id = plan_of(service, spoilt.job_id).plan_id
    spoil(database_url, "runtime_plans", column, spoilt_id)
    new_worker(service.store, models=(replace(PROFILE, repo_id="org/name", name="org--name"),))
    sent_hints(service).clear()
    with caplog.at_level(logging.WARNING):
        sweep(service)
        sweep(service)
    assert (plan_of(service, sound.job_id).profile, plan_of(service, sound.job_id).condition) != (None, "model-not-present")
    assert plan_of(service, sound.job_id).class_id in {class_id for class_id, _ in sent_hints(service)}
    (told,) = [record for record in caplog.records if record.message == "plan-unreadable"]
    assert told.__dict__["plan_id"] == spoilt_id
    assert BROKEN not in str(told.__dict__)


def test_an_unreadable_class_waits_for_nobody_to_come(
    service_on_both: Service, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its plans say that no worker can take them, the log names it once, and the other classes are hinted."""
    service = service_on_both
    new_worker(service.store, labels={"zone": "attic"})
    spoilt, sound = submit(service, submission(where='zone == "attic"')).job, submit(service, submission()).job
    (class_id,) = {item.class_id for item in service.store.fleet.backlog()} - {plan_of(service, sound.job_id).class_id}
    spoil(database_url, "plan_classes", "requirements", class_id)
    sent_hints(service).clear()
    with caplog.at_level(logging.WARNING):
        sweep(service)
        sweep(service)
    assert {name for name, _ in sent_hints(service)} == {plan_of(service, sound.job_id).class_id}
    told = [record.__dict__["class_id"] for record in caplog.records if record.message == "class-unreadable"]
    assert told == [class_id]
    assert service.store.jobs.refresh_conditions(class_id, ()) == 0, "it says so already"
    assert service.store.jobs.get(spoilt.job_id, DEFAULT_TENANT).state == "queued"


def test_reaping_waits_for_one_lease_after_the_start(service_on_both: Service) -> None:
    """A coordinator that has just come up gives workers a whole lease to renew before it reaps."""
    service = service_on_both
    worker_id = new_worker(service.store)
    job = submit(service, submission()).job
    claim_one(service, worker_id)
    before_ms = service.store.now_ms()
    assert service.store.leases.hold_off_reaping()
    wait_for(lambda: reap(service), timeout=20, what="reaping to go on")
    assert service.store.now_ms() - before_ms >= service.store.lease_ms
    assert plan_of(service, job.job_id).state is ExecutionState.QUEUED


def test_a_loop_outlives_outages_and_recovers_after_each() -> None:
    """Every turn comes, whatever the one before it raised; recovery runs at the start and after an outage, no more often."""
    calls: list[str] = []
    done = threading.Event()

    def turn() -> None:
        calls.append("turn")
        if calls.count("turn") == 2:
            raise DatabaseUnavailable("The database is away.")
        if calls.count("turn") == 4:
            raise ValueError("a bug")
        if calls.count("turn") == 5:
            done.set()

    loop = Loop("test", QUICK, turn, recover=lambda: calls.append("recover"))
    loop.start()
    wait_for(done.is_set, timeout=10, what="five turns")
    loop.stop(timeout=5)
    assert calls[:7] == ["recover", "turn", "turn", "recover", "turn", "turn", "turn"]


def test_a_loop_that_cannot_recover_does_not_take_its_turn() -> None:
    """While the database is away, nothing is reaped before reaping was held off."""
    calls: list[str] = []
    tried = threading.Event()

    def recover() -> None:
        calls.append("recover")
        if calls.count("recover") < 3:
            raise DatabaseUnavailable("The database is away.")

    def turn() -> None:
        calls.append("turn")
        tried.set()

    loop = Loop("test", QUICK, turn, recover=recover)
    loop.start()
    wait_for(tried.is_set, timeout=10, what="a turn")
    loop.stop(timeout=5)
    assert calls[:4] == ["recover", "recover", "recover", "turn"]


def test_workers_are_forgotten_a_week_after_they_left(service_on_both: Service, database_url: str) -> None:
    """Every restart makes a new worker: the old ones do not pile up, and those that left just now are still shown."""
    service = service_on_both
    for name in ("old", "late"):
        service.store.leases.retire(new_worker(service.store, name))
        let_time_pass(database_url, REMEMBER_MS if name == "old" else 60_000)
    sweep(service)
    assert [worker.node for worker in service.store.fleet.workers(active_only=False)] == ["late"]
