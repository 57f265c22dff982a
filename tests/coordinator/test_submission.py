"""What is stored when a user submits, what is hinted, and what is refused without a trace?"""

from dataclasses import replace
from typing import Any

import pytest

from ollm_service.coordinator.fleet import verdicts
from ollm_service.coordinator.preview import PreviewRequest, preview
from ollm_service.coordinator.service import DEFAULT_TENANT, Service
from ollm_service.coordinator.submission import ROWS_PER_PLAN, retry, submit
from ollm_service.coordinator.upkeep import sweep
from ollm_service.core.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidExpression,
    InvalidJob,
    InvalidOption,
    InvalidReference,
    ModelNotFound,
    OllmError,
    PlanNotExecutable,
)
from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.plan import BackendId, GenericModelKind, ModelModality, NativeFamily, PassId
from ollm_service.core.profile import ModelProfile
from tests.coordinator.services import ROWS, answer, claim_one, sent_hints, submission
from tests.store.samples import PROFILE, new_worker


def jobs_of(service: Service) -> list[str]:
    """The ids of all jobs."""
    return [job.job_id for job in service.store.jobs.list(DEFAULT_TENANT)]


@pytest.mark.parametrize(
    ("model", "runtime", "reason"),
    [
        (replace(PROFILE, kind=GenericModelKind.SEQ2SEQ_LM, family=None), {}, "models of kind seq2seq-lm: not yet"),
        (PROFILE, {"adapter_dir": "lora"}, "adapters: not known to this worker"),
    ],
)
def test_what_no_worker_runs_yet_waits_with_the_reason(
    service: Service, model: ModelProfile, runtime: dict[str, Any], reason: str
) -> None:
    """A kind of model or an adapter is planned and stored; every worker says why it cannot take it, and one that can may come."""
    backends = dict.fromkeys(BackendId)
    new_worker(service.store, models=(model,), backends=backends, kinds={"causal-lm": None, "seq2seq-lm": "not yet"})
    job = submit(service, submission(runtime=runtime)).job
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert (plan.planned.backend_id, plan.condition) == (BackendId.TRANSFORMERS_GENERIC, "no-capable-worker")
    (verdict,) = verdicts(plan.requirements, service.fleet.snapshot().workers)
    assert verdict.reasons == (reason,)
    kinds = dict.fromkeys(kind.value for kind in GenericModelKind)
    new_worker(service.store, "able", models=(model,), backends=backends, kinds=kinds, no_adapters_because=None)
    sweep(service)
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert plan.condition is None


def test_rows_are_split_into_plans_of_at_most_256(service: Service) -> None:
    """600 rows become plans of 256, 256 and 88 rows, in order, with one class."""
    new_worker(service.store)
    job = submit(service, submission({"prompt": str(number)} for number in range(600))).job
    plans = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert (job.row_count, job.plans_total, ROWS_PER_PLAN) == (600, 3, 256)
    assert [plan.row_count for plan in plans] == [256, 256, 88]
    assert len({plan.class_id for plan in plans}) == 1
    assert [row.row for row in claim_one(service, new_worker(service.store)).rows] == list(range(256))


def test_rows_far_longer_than_the_others_have_a_plan_of_their_own(service: Service) -> None:
    """The usual rows come first and keep their order, so that a machine too small for the long ones begins with them."""
    worker_id = new_worker(service.store)
    prompts = ["short", "x" * 20_000, "short", "", "x" * 20_000]
    job = submit(service, submission({"prompt": prompt} for prompt in prompts)).job
    assert [plan.row_count for plan in service.store.jobs.plans(job.job_id, DEFAULT_TENANT)] == [3, 2]
    assert [row.row for row in claim_one(service, worker_id).rows] == [0, 2]
    assert [row.row for row in claim_one(service, worker_id).rows] == [1, 4]


def test_what_is_beyond_the_context_needs_no_more_than_the_context(service: Service) -> None:
    """Such a row fails or is cut off, so it is not kept apart for its length."""
    new_worker(service.store, models=(replace(PROFILE, max_context_tokens=2048),))
    job = submit(service, submission([{"prompt": "short"}, {"prompt": "short"}, {"prompt": "x" * 20_000}])).job
    assert job.plans_total == 1


def test_a_plan_of_wrong_rows_alone_is_born_final(service: Service) -> None:
    """A job whose rows are all wrong is stored, answered and done at once, and nobody is woken for it."""
    new_worker(service.store)
    job = submit(service, submission([7, {"prompt": ""}])).job
    assert (job.state, job.succeeded, job.failed, job.pending) == (JobState.SUCCEEDED, 0, 2, 0)
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert plan.state is ExecutionState.SUCCEEDED
    assert sent_hints(service) == []


def test_as_many_workers_are_woken_as_there_are_plans(service: Service) -> None:
    """Hints go to the job's class: one for each plan, but no more than capable workers have slots."""
    for node in ("a", "b"):
        new_worker(service.store, node)
    new_worker(service.store, "c", models=())
    one = submit(service, submission()).job
    submit(service, submission({"prompt": "x"} for _ in range(3 * ROWS_PER_PLAN)))
    (plan,) = service.store.jobs.plans(one.job_id, DEFAULT_TENANT)
    assert sent_hints(service) == [(plan.class_id, 1), (plan.class_id, 2)]


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"rows": []}, InvalidJob, "rows"),
        ({"rows": [{"prompt": "a", "custom_id": "x"}] * 2}, InvalidJob, "rows[1].custom_id"),
        ({"runtime": {"kv_cache_strategy": "nope"}}, InvalidOption, "kv_cache_strategy"),
        ({"runtime": {"colour": "red"}}, InvalidOption, "runtime.colour"),
        ({"generation": {"max_new_tokens": 0}}, InvalidOption, "max_new_tokens"),
        ({"generation": {"logprobs": True}}, InvalidOption, "generation.logprobs"),
        ({"where": "gpu_memory_gb >="}, InvalidExpression, "where"),
        ({"model": "   "}, InvalidReference, "model"),
        ({"model": "unheard-of"}, ModelNotFound, "model"),
        ({"model": "spoilt"}, PlanNotExecutable, "model"),
        ({"runtime": {"offload_gpu_layers": 2}}, PlanNotExecutable, "model"),
    ],
)
def test_what_is_wrong_as_a_whole_is_refused_and_leaves_nothing(
    service: Service, changes: dict[str, Any], error: type[OllmError], param: str
) -> None:
    """The error names the field; no job is stored and no idempotency key is used up."""
    new_worker(service.store, models=(PROFILE, replace(PROFILE, name="spoilt", unsafe_because="its weights are pickled")))
    with pytest.raises(error) as caught:
        submit(service, submission(**{"idempotency_key": "k", **changes}))
    assert caught.value.param == param
    assert jobs_of(service) == []
    assert submit(service, submission(idempotency_key="k", body_digest="other")).is_new


def test_an_unknown_model_is_answered_with_what_is_known(service: Service) -> None:
    """The remedy lists the fleet's models with the nodes that have them, and the aliases."""
    new_worker(service.store, "attic")
    with pytest.raises(ModelNotFound) as caught:
        submit(service, submission(model="tinny"))
    assert "tiny (on attic)" in (caught.value.remedy or "")
    assert "llama3-1B-chat" in (caught.value.remedy or "")


def test_an_unsafe_model_is_answered_with_its_reason(service: Service) -> None:
    """A folder that was refused is not `unknown`: the error says who refused it and why."""
    new_worker(service.store, "attic", models=(replace(PROFILE, name="spoilt", unsafe_because="its weights are pickled"),))
    with pytest.raises(PlanNotExecutable, match="attic: its weights are pickled"):
        submit(service, submission(model="spoilt"))


@pytest.mark.parametrize("model", ["llama3-1B-chat", "org/name", "org/name@v2"])
def test_a_model_that_may_come_later_is_accepted_and_waits(service: Service, model: str) -> None:
    """An alias or hub id that no worker has is stored with the condition `model-not-present`."""
    new_worker(service.store)
    job = submit(service, submission(model=model)).job
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert (plan.state, plan.condition) == (ExecutionState.QUEUED, "model-not-present")
    assert plan.requirements.download is not None


def test_a_plan_that_no_worker_satisfies_says_so_at_once(service: Service) -> None:
    """Labels that nobody has give the condition `no-capable-worker` in the answer to the submission."""
    new_worker(service.store)
    job = submit(service, submission(where='zone == "moon"')).job
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert plan.condition == "no-capable-worker"
    assert sent_hints(service) == []


def test_the_same_key_and_body_give_the_same_job(service: Service) -> None:
    """Submitting again returns the first job, even when the model has left the fleet since; another body is a conflict."""
    worker_id = new_worker(service.store)
    first = submit(service, submission(idempotency_key="k", body_digest="one"))
    service.store.leases.retire(worker_id)
    again = submit(service, submission(idempotency_key="k", body_digest="one"))
    assert (first.is_new, again.is_new, again.job.job_id) == (True, False, first.job.job_id)
    with pytest.raises(IdempotencyConflict):
        submit(service, submission(idempotency_key="k", body_digest="two"))
    assert jobs_of(service) == [first.job.job_id]


def test_a_new_worker_is_seen_by_the_next_submission(service: Service) -> None:
    """The kept snapshot of the fleet is dropped as soon as a worker joins."""
    with pytest.raises(ModelNotFound) as caught:
        submit(service, submission())
    assert "No worker is connected yet" in (caught.value.remedy or "")
    new_worker(service.store)
    assert submit(service, submission()).is_new


def test_retry_makes_a_new_job_of_the_rows_that_failed_while_they_ran(service: Service) -> None:
    """It has the old job's options and custom_ids, leaves out rows that were wrong as submitted, and is linked to it."""
    worker_id = new_worker(service.store)
    rows = [{"prompt": "a"}, {"prompt": "b", "custom_id": "bad"}, 7, {"prompt": "c", "generation": {"seed": 4}}]
    old = submit(service, submission(rows, generation={"max_new_tokens": 3}, priority=5)).job
    crash = RowError(code="runner_crashed", message="The runner crashed twice.")
    answer(service, claim_one(service, worker_id), errors={1: crash, 3: crash})
    new = retry(service, old.job_id, DEFAULT_TENANT, None).job
    assert (new.row_count, new.retry_of, new.priority, new.generation) == (2, old.job_id, 5, old.generation)
    work = claim_one(service, worker_id).rows
    assert [(row.row, row.custom_id, row.prompt) for row in work] == [(0, "bad", "b"), (1, "row-3", "c")]
    assert [row.generation.seed for row in work] == [None, 4]
    assert service.store.jobs.get(old.job_id, DEFAULT_TENANT).failed == 3


def test_retry_with_a_key_happens_once(service: Service) -> None:
    """The same key retries a job once, and cannot retry another one."""
    worker_id = new_worker(service.store)
    crash = RowError(code="runner_crashed", message="The runner crashed twice.")
    old = [submit(service, submission()).job for _ in range(2)]
    for _ in old:
        answer(service, claim_one(service, worker_id), errors={0: crash})
    first = retry(service, old[0].job_id, DEFAULT_TENANT, "again")
    assert retry(service, old[0].job_id, DEFAULT_TENANT, "again").job.job_id == first.job.job_id
    with pytest.raises(IdempotencyConflict):
        retry(service, old[1].job_id, DEFAULT_TENANT, "again")


def test_retry_is_refused_while_a_job_runs_and_when_nothing_failed(service: Service) -> None:
    """Both are conflicts that say what to do."""
    worker_id = new_worker(service.store)
    job = submit(service, submission()).job
    with pytest.raises(Conflict, match="still queued"):
        retry(service, job.job_id, DEFAULT_TENANT, None)
    answer(service, claim_one(service, worker_id))
    with pytest.raises(Conflict, match="no failed rows"):
        retry(service, job.job_id, DEFAULT_TENANT, None)


def test_a_preview_stores_nothing_and_names_every_worker(service: Service) -> None:
    """It gives the plan, each worker's verdict with reasons, and the rows that would fail."""
    able, unable = new_worker(service.store, "able"), new_worker(service.store, "unable", models=())
    found = preview(service, PreviewRequest(model="tiny", rows=[*ROWS, 7]))
    assert found.draft.planned.plan.backend_id == BackendId.OPTIMIZED_NATIVE
    assert {verdict.worker_id: verdict.is_eligible for verdict in found.verdicts} == {able: True, unable: False}
    assert all(verdict.reasons for verdict in found.verdicts if not verdict.is_eligible)
    assert [row.row for row in found.rows or () if row.error] == [2]
    assert found.plans_total == 1
    assert jobs_of(service) == []


def test_a_preview_shows_a_plan_that_cannot_be_executed(service: Service) -> None:
    """Where a submission is refused with 422, a preview shows the plan with its reason and no requirements."""
    new_worker(service.store)
    found = preview(service, PreviewRequest(model="tiny", runtime={"offload_gpu_layers": 2}))
    assert not found.draft.planned.plan.is_executable()
    assert "gpu-offload" in found.draft.planned.plan.reason
    assert (found.draft.requirements, found.verdicts, found.rows) == (None, (), None)


IMAGE_ROW = {
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
}


def test_an_image_to_a_model_of_text_is_that_rows_error(service: Service) -> None:
    """The job goes on with its other rows, and the error names what the model takes."""
    worker_id = new_worker(service.store)
    job = submit(service, submission([IMAGE_ROW, {"prompt": "a"}])).job
    assert (job.failed, job.pending) == (1, 1)
    (result,) = service.store.results.page(job.job_id, DEFAULT_TENANT)
    assert result.error is not None
    assert (result.row, result.error.code) == (0, "unsupported_content")
    assert [row.row for row in claim_one(service, worker_id).rows] == [1]


def test_an_image_makes_the_plan_multimodal_where_the_model_sees(service: Service) -> None:
    """The pass is planned though nobody asked for it, and only a worker that has what images take gets the plan."""
    model = replace(
        PROFILE,
        architecture="Gemma3ForConditionalGeneration",
        family=NativeFamily.GEMMA3,
        kind=GenericModelKind.IMAGE_TEXT_TO_TEXT,
        modalities=(ModelModality.TEXT, ModelModality.IMAGE),
        requires_processor=True,
        has_processor=True,
    )
    offers: dict[str, Any] = {"models": (model,), "kinds": {model.kind: None}, "passes": dict.fromkeys(PassId)}
    new_worker(service.store, "blind", **offers, modalities={ModelModality.IMAGE: "pillow is not installed on this worker"})
    job = submit(service, submission([IMAGE_ROW, {"prompt": "a"}])).job
    (plan,) = service.store.jobs.plans(job.job_id, DEFAULT_TENANT)
    assert PassId.MULTIMODAL_SHELL in plan.planned.specialization_pass_ids
    assert ModelModality.IMAGE in plan.requirements.modalities
    assert (plan.condition, job.failed) == ("no-capable-worker", 0)
    (verdict,) = verdicts(plan.requirements, service.fleet.snapshot().workers)
    assert verdict.reasons == ("image input: pillow is not installed on this worker",)
    seeing = new_worker(service.store, "seeing", **offers, modalities={ModelModality.IMAGE: None})
    sweep(service)
    claimed = claim_one(service, seeing)
    assert claimed.config.multimodal
    assert claimed.rows[0].messages == tuple(IMAGE_ROW["messages"])
    text = submit(service, submission([{"prompt": "a"}])).job
    (plan,) = service.store.jobs.plans(text.job_id, DEFAULT_TENANT)
    assert PassId.MULTIMODAL_SHELL not in plan.planned.specialization_pass_ids


def test_a_sampling_option_out_of_range_is_refused(service: Service) -> None:
    """For the whole job it is an error that names the option; a row's own fails that row alone."""
    new_worker(service.store)
    for name, value in (("temperature", -1), ("top_p", 1.5), ("top_k", 0), ("seed", -1), ("max_new_tokens", 0)):
        with pytest.raises(InvalidOption, match="must be") as caught:
            submit(service, replace(submission(), generation={name: value}))
        assert caught.value.param == name
        job = submit(service, submission([{"prompt": "a", "generation": {name: value}}, {"prompt": "b"}])).job
        assert (job.failed, job.pending) == (1, 1)
