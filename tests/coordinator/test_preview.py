"""What does a preview promise, and does a submission keep it?"""

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.coordinator.preview import Preview, PreviewRequest, preview
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import submit
from ollm_service.core.capabilities import Device
from ollm_service.core.errors import InvalidJob, InvalidOption, NotFound, PlanChanged, RequestError
from ollm_service.core.leasing import AttemptReport
from tests.coordinator.services import ROWS, claim_one, submission
from tests.store.samples import APPLIED, LIVE, PROFILE, answers, new_worker
from tests.store.samples import capabilities as offers

MODEL = replace(PROFILE, weight_bytes=1_000_000, layer_count=2, hidden_size=64, intermediate_size=256, kv_bytes_per_token=512)
FAST = Device(
    device_id="cpu", name="a CPU", memory_bytes=10**9, dtypes=("float32",), memory_rate=1e9, arithmetic={"float32": 1e9}
)


def fast_worker(service: Service, node: str = "attic") -> str:
    """A worker with the model whose runner has told how fast its device is."""
    return new_worker(service.store, node, models=(MODEL,), devices=(FAST,))


def asked(service: Service, **changes: Any) -> Preview:
    """A preview of the usual two rows."""
    return preview(service, PreviewRequest(**({"model": "tiny", "rows": ROWS} | changes)))


def test_rows_are_quoted_and_nothing_is_stored(service: Service) -> None:
    """Tokens, a time with its range, and the worker's part; no job comes of it."""
    fast_worker(service)
    quote = asked(service, generation={"max_new_tokens": 10}).quote
    assert quote is not None
    assert (quote.row_count, quote.most_output_tokens, quote.is_measured) == (2, 20, False)
    assert quote.seconds is not None
    (part,) = quote.workers
    assert (part.name, part.share, part.refused) == ("attic", 1.0, ())
    assert not service.store.jobs.list(DEFAULT_TENANT, limit=1)


def test_what_attempts_measured_is_what_quotes_go_by(service: Service) -> None:
    """After one attempt on the same device and tier, the quote is measured and follows its figures."""
    worker = fast_worker(service)
    before = asked(service).quote
    assert before is not None
    placement = before.workers[0].placement
    assert placement is not None
    submit(service, submission())
    figures = {"prefill_tokens": 10, "prefill_seconds": 10.0, "decode_tokens": 10, "decode_passes": 10, "decode_seconds": 50.0}
    report = AttemptReport(
        runtime_plan=APPLIED,
        placement={"tier": placement.tier},
        measured={**figures, "device": FAST.name, "backend": "optimized-native"},
    )
    (known,) = service.store.leases.new_classes(0)
    claimed = service.store.leases.claim(worker, "0f0e0d0c-0000-4000-8000-000000000001", [known.class_id])
    assert claimed is not None
    service.store.leases.record(claimed.lease_id, answers(0, 1), report)
    after = asked(service).quote
    assert after is not None
    assert (before.is_measured, after.is_measured) == (False, True)
    assert after.workers[0].rate is not None
    assert (after.workers[0].rate.prefill, after.workers[0].rate.pass_seconds) == (1.0, 5.0)


def test_plans_of_other_jobs_are_counted_in(service: Service) -> None:
    """Those that wait, and those that a worker runs; an imagined machine has the model, and helps."""
    worker = fast_worker(service)
    alone = asked(service).quote
    submit(service, submission([{"prompt": "x" * 400}] * 600))
    queued = asked(service).quote
    claim_one(service, worker)
    held = asked(service, if_workers=["h200"]).quote
    assert alone is not None
    assert queued is not None
    assert held is not None
    assert (alone.plans_ahead, queued.plans_ahead, held.plans_ahead) == (0, 3, 3)
    assert alone.seconds is not None
    assert queued.seconds is not None
    assert held.seconds is not None
    assert queued.workers[0].begins_seconds is not None
    assert queued.workers[0].begins_seconds > 0
    assert alone.seconds < held.seconds < queued.seconds


def test_a_worker_that_runs_something_now_will_have_room(service: Service) -> None:
    """What its plan takes is free again when this job's turn comes; of an idle worker what is free now counts."""
    worker = fast_worker(service)
    idle = asked(service).quote
    submit(service, submission())
    claim_one(service, worker)
    full = replace(LIVE, device_free_bytes={"cpu": 0}, host_free_bytes=0)
    service.store.leases.register(worker, offers("attic", models=(MODEL,), devices=(FAST,)), full, 1)
    busy = asked(service).quote
    assert idle is not None
    assert busy is not None
    assert (busy.unplaceable_rows, busy.plans_ahead) == (0, 1)
    assert busy.seconds is not None
    assert idle.seconds is not None
    assert busy.seconds > idle.seconds
    new_worker(service.store, "cellar", models=(MODEL,), devices=(FAST,))
    service.store.leases.register("wkr_full", offers("full", models=(MODEL,), devices=(FAST,)), full, 1)
    again = asked(service).quote
    assert again is not None
    assert {part.name: bool(part.refused) for part in again.workers} == {"attic": False, "cellar": False, "full": True}


def test_plans_whose_speed_nobody_knows_are_told_and_not_counted(service: Service) -> None:
    """A worker that has never been probed for another model's numbers will run them first all the same."""
    other = replace(MODEL, name="other", digest="e" * 64, dtype="float16")
    new_worker(service.store, "attic", models=(MODEL, other), devices=(replace(FAST, dtypes=()),))
    submit(service, submission(model="other"))
    quote = asked(service).quote
    assert quote is not None
    assert (quote.plans_ahead, quote.plans_not_counted) == (0, 1)
    assert quote.seconds is not None


def test_an_imagined_machine_takes_its_share(service: Service) -> None:
    """By name or by description; it can do what the fleet's software can, and a wrong one is refused."""
    fast_worker(service)
    rows = [{"prompt": "x" * 400}] * 2_000
    quote = asked(service, rows=rows, if_workers=["h200", {"name": "mine", "memory_bytes": 10**10}]).quote
    assert quote is not None
    here, h200, mine = quote.workers
    assert (here.is_hypothetical, h200.is_hypothetical, h200.name, mine.name) == (False, True, "if h200", "if mine")
    assert h200.share > here.share
    assert mine.rate is None  # nobody has said how fast it is
    for wrong in ("abacus", {"memory_bytes": "much"}, {"wheels": 4}, {"memory_bytes": -1}):
        with pytest.raises(InvalidOption, match="if:"):
            asked(service, if_workers=[wrong])
    with pytest.raises(InvalidOption, match="if: a device needs memory_bytes"):
        asked(service, if_workers=[{"name": "mine"}])


def test_an_imagined_machine_has_the_draft_model_that_some_worker_has(service: Service) -> None:
    """Who lacks it says so; an imagined machine has what the fleet has, and lacks what nobody has."""
    draft = replace(MODEL, name="draft", path=PurePosixPath("small/draft"), digest="e" * 64)
    fast_worker(service)
    new_worker(service.store, "cellar", models=(MODEL, draft), devices=(FAST,))
    refusals = {}
    for name in ("small/draft", "nowhere"):
        quote = asked(service, runtime={"draft_model": name}, if_workers=["h200"]).quote
        assert quote is not None
        refusals[name] = {part.name: part.refused for part in quote.workers}
    lacks = ("the draft model small/draft is not in this worker's models folder",)
    assert refusals["small/draft"] == {"attic": lacks, "cellar": (), "if h200": ()}
    assert all("draft model nowhere" in reasons[0] for reasons in refusals["nowhere"].values())


def test_an_imagined_machine_runs_the_kinds_of_models_that_the_fleet_runs(service: Service) -> None:
    """What a worker's software can, it can; what that cannot, it refuses with the worker's own reason."""
    kind = MODEL.kind
    assert kind is not None
    new_worker(service.store, "attic", models=(MODEL,), devices=(FAST,), kinds={kind: "not in this version"})
    quote = asked(service, if_workers=["h200"]).quote
    assert quote is not None
    here, h200 = quote.workers
    assert h200.refused == here.refused == (f"models of kind {kind}: not in this version",)


def test_a_submission_runs_what_was_previewed(service: Service) -> None:
    """Naming the preview is enough: its model and options are the job's."""
    fast_worker(service)
    shown = asked(service, runtime={"kv_cache_strategy": "paged"}, generation={"max_new_tokens": 3})
    job = submit(service, submission(model=None, plan=shown.preview_id)).job
    assert job.config is not None
    assert job.generation is not None
    assert (job.model, job.config.kv_cache_strategy, job.generation.max_new_tokens) == ("tiny", "paged", 3)
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert plan.planned == shown.draft.planned.plan
    assert shown.quote is not None
    assert job.quoted is not None
    assert job.quoted["seconds"] == shown.quote.seconds
    assert service.store.jobs.get(job.job_id, DEFAULT_TENANT).quoted == job.quoted
    assert submit(service, submission()).job.quoted is None


def test_a_submission_says_what_has_changed_since_the_preview(service: Service) -> None:
    """Other rows, another model under the same name, other options: refused, each by name, and nothing is stored."""
    worker = fast_worker(service)
    shown = asked(service)
    with pytest.raises(PlanChanged, match="the rows"):
        submit(service, submission([{"prompt": "another"}], model=None, plan=shown.preview_id))
    with pytest.raises(InvalidJob, match="`model` differs"):
        submit(service, submission(model="other", plan=shown.preview_id))
    with pytest.raises(NotFound, match="no preview pl_none"):
        submit(service, submission(model=None, plan="pl_none"))
    changed = offers("attic", models=(replace(MODEL, digest="e" * 64),), devices=(FAST,))
    service.store.leases.register(worker, changed, LIVE, 1)
    with pytest.raises(PlanChanged, match="required model_digest"):
        submit(service, submission(model=None, plan=shown.preview_id))
    assert not service.store.jobs.list(DEFAULT_TENANT, limit=1)


def test_a_job_names_a_model_or_a_preview(service: Service) -> None:
    """With neither there is nothing to run."""
    with pytest.raises(RequestError, match="`model` is missing"):
        submit(service, submission(model=None))
