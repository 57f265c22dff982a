"""Is it explained why rows wait: what every worker says, which demands cannot all hold, and what giving one up brings?"""

from dataclasses import replace
from typing import Any

from ollm_service.coordinator.explaining import Explanation, explain_job, explain_plan
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import submit
from ollm_service.core.capabilities import CacheDisk, Device
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.plan import PassId
from ollm_service.store.views import JobView
from tests.coordinator.services import answer, claim_one, submission
from tests.store.samples import LIVE, PROFILE, capabilities, new_worker

MODEL = replace(PROFILE, layer_count=2, hidden_size=64, intermediate_size=256, vocabulary_size=100, kv_bytes_per_token=100_000)
PAGED = {"passes": dict.fromkeys(PassId), "kv_strategies": {"resident": None, "paged": None}}
HOME = 'zone == "home"'


def submitted(service: Service, prompts: list[str], **changes: Any) -> JobView:
    """A job of these prompts."""
    return submit(service, submission([{"prompt": prompt} for prompt in prompts], **changes)).job


def only(service: Service, job: JobView) -> Explanation:
    """Why the job's plans wait, all for the same."""
    (found,) = explain_job(service, job.job_id, DEFAULT_TENANT).waiting
    return found


def test_demands_that_cannot_all_hold_come_with_their_commands(service: Service) -> None:
    """The worker at home lacks the pass, the able one is elsewhere: either demand may go, each with what it brings."""
    new_worker(service.store, "home", labels={"zone": "home"}, models=(MODEL,))
    away = capabilities("away", models=(MODEL,), cache_disk=CacheDisk(path="/cache", total_bytes=10**10), **PAGED)
    service.store.leases.register("wkr_away", away, replace(LIVE, cache_free_bytes=10**10), pid=1)
    job = submitted(service, ["a", "b"], where=HOME, runtime={"dense_projection_chunk_rows": 8, "kv_cache_strategy": "paged"})
    found = only(service, job)
    assert (found.stuck_count, found.stuck_rows, found.rows_left) == (2, (0, 1), 2)
    told = [(offer.way.demands[0].words, offer.node, offer.command) for offer in found.offers]
    assert told == [
        (HOME, "away", f"ollm-service amend {job.job_id} --where any"),
        ("KV cache paged", "home", f"ollm-service amend {job.job_id} --kv-cache-strategy any"),
    ]
    assert {standing.worker.node: standing.reasons for standing in found.workers} == {
        "home": (
            "pass disk-cache: no writable cache directory",
            "KV cache strategy paged: not known to this worker",
            "cache disk: 16,777,216 bytes needed, 0 there",
        ),
        "away": (f"labels: `{HOME}` does not hold here",),
    }


def test_long_rows_are_told_apart_from_those_that_fit(service: Service) -> None:
    """Only they are stuck, they are named with the command that skips them, and the bytes that they lack are told."""
    worker_id = new_worker(service.store, "small", models=(MODEL,))
    long_row = "x" * 12_000
    job = submitted(service, ["a", long_row, "b", long_row + "x", "c"], runtime={"use_cache": False})
    found = only(service, job)
    assert (found.stuck_count, found.stuck_rows, found.rows_left) == (2, (1, 3), 5)
    (offer,) = found.offers
    assert offer.skipped_rows == (1, 3)
    assert offer.command == f"ollm-service amend {job.job_id} --skip-rows 1,3"
    (standing,) = found.workers
    assert (standing.is_eligible, standing.placement, standing.fits_when_free) == (True, None, False)
    assert standing.refused[0].needed_bytes > standing.refused[0].free_bytes
    answer(service, claim_one(service, worker_id))
    assert explain_job(service, job.job_id, DEFAULT_TENANT).rows_left == {ExecutionState.QUEUED: 2}


def test_a_draft_model_that_a_worker_lacks_is_told(service: Service) -> None:
    """The worker has the model and the room; what it has not is named."""
    new_worker(service.store, "attic", models=(MODEL,))
    job = submitted(service, ["a"], runtime={"draft_model": "small/draft"})
    (standing,) = only(service, job).workers
    assert standing.reasons == ("the draft model small/draft is not in this worker's models folder",)


def test_a_plan_that_fits_has_nothing_in_its_way(service: Service) -> None:
    """It waits its turn; how a worker would run it is told."""
    new_worker(service.store, "attic", models=(MODEL,))
    found = only(service, submitted(service, ["a"]))
    assert (found.stuck_count, found.conflicts, found.offers) == (0, None, ())
    assert found.workers[0].placement is not None


def test_a_worker_that_is_busy_has_room_later(service: Service) -> None:
    """What is free now decides whether the plan fits; what the device has, whether it ever will."""
    busy = replace(LIVE, device_free_bytes={"cpu": 0})
    service.store.leases.register("wkr_busy", capabilities("busy", models=(MODEL,)), busy, pid=1)
    (standing,) = only(service, submitted(service, ["a"])).workers
    assert (standing.placement, standing.fits_when_free) == (None, True)


def test_a_plan_that_waits_for_its_turn_fits(service: Service) -> None:
    """The worker is full because it runs another plan, which ends before: nothing has to be given up."""
    worker = new_worker(service.store, "attic", models=(MODEL,))
    submitted(service, ["a"])
    claim_one(service, worker)
    full = replace(LIVE, device_free_bytes={"cpu": 0}, host_free_bytes=0)
    service.store.leases.register(worker, capabilities("attic", models=(MODEL,)), full, pid=1)
    found = only(service, submitted(service, ["b"]))
    assert (found.stuck_count, found.conflicts) == (0, None)
    assert found.workers[0].placement is not None


def test_who_is_offline_is_remembered(service: Service) -> None:
    """The last process of a node that is not connected, and whether the plan would fit it when it returns."""
    old, last = (new_worker(service.store, "desktop", models=(MODEL,)) for _ in range(2))
    other = new_worker(service.store, "laptop", models=(MODEL,))
    job = submitted(service, ["a"])
    for worker_id in (old, last, other):
        service.store.leases.retire(worker_id)
    back = new_worker(service.store, "laptop", models=())
    found = only(service, job)
    assert [standing.worker.worker_id for standing in found.workers] == [back]
    (gone,) = found.offline
    assert (gone.worker.node, gone.worker.state, gone.is_eligible, gone.fits_when_free) == ("desktop", "gone", True, True)
    assert 0 <= service.store.now_ms() - gone.seen_ms < 60_000
    assert [offer.command for offer in found.offers] == [None], "no command brings a model"


def test_a_way_out_tells_how_long_it_takes_where_speeds_are_known(service: Service) -> None:
    """By the measured or probed rate of the worker that it names."""
    fast = Device(device_id="cpu", name="cpu", memory_bytes=10**9, memory_rate=1e10, arithmetic={"float32": 1e11})
    new_worker(service.store, "fast", devices=(fast,), models=(MODEL,))
    (offer,) = only(service, submitted(service, ["a", "b"], where=HOME)).offers
    assert offer.seconds is not None
    assert 0 < offer.seconds < 3600


def test_a_model_that_nobody_knows_is_explained_too(service: Service) -> None:
    """What it lacks is the right to download, or the model."""
    new_worker(service.store, "attic")
    found = only(service, submitted(service, ["a"], model="llama3-1B-chat"))
    assert [(offer.way.demands[0].kind, offer.command) for offer in found.offers] == [("model", None)]


def test_one_plan_is_explained_alone(service: Service) -> None:
    """While it waits, with its rows; while it runs, only who could take it; when it has ended, not at all."""
    worker_id = new_worker(service.store, "attic", models=(MODEL,))
    job = submitted(service, ["a"])

    def found() -> Explanation:
        (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
        return explain_plan(service, plan, DEFAULT_TENANT)

    assert [standing.placement is not None for standing in found().workers] == [True]
    work = claim_one(service, worker_id)
    assert [(standing.is_eligible, standing.placement) for standing in found().workers] == [(True, None)]
    answer(service, work)
    assert found().workers == ()
    assert explain_job(service, job.job_id, DEFAULT_TENANT).waiting == ()


def test_rows_with_a_limit_of_their_own_are_measured_by_it(service: Service) -> None:
    """A short prompt may ask for a long answer."""
    new_worker(service.store, "small", models=(MODEL,))
    rows = [{"prompt": "a"}, {"prompt": "b", "generation": {"max_new_tokens": 100_000}}]
    job = submit(service, submission(rows, runtime={"use_cache": False})).job
    assert only(service, job).stuck_rows == (1,)
