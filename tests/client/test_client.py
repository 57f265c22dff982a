"""Can a Python program submit, look, follow and mend, against the real service?"""

import threading

import pytest

from ollm_service import Client, RuntimeConfig
from ollm_service.client import ServiceUnreachable
from ollm_service.coordinator.service import Service
from ollm_service.core.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidExpression,
    InvalidJob,
    InvalidOption,
    ModelNotFound,
    NotFound,
    PlanNotExecutable,
    RequestError,
)
from ollm_service.core.leasing import RowError
from ollm_service.core.lifecycle import ExecutionState, JobState
from ollm_service.core.plan import BackendId, RuntimePlan
from tests.client.live import LiveService
from tests.coordinator.services import answer, claim_one
from tests.servers import refused_port
from tests.waiting import wait_for


def test_the_example_runs_as_it_is_written(
    live: LiveService, service: Service, worker_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's reason is known before anything runs, and the results then stream."""
    monkeypatch.setenv("OLLM_BASE_URL", live.url)
    client = Client()
    job = client.submit("tiny", ["…", "…"], runtime=RuntimeConfig(kv_cache_strategy="paged"))
    plan = job.plans[0].runtime_plan
    assert isinstance(plan, RuntimePlan)
    assert plan.reason
    assert job.plans[0].reason == plan.reason
    answer(service, claim_one(service, worker_id))
    assert [(result.custom_id, result.text) for result in job.results()] == [("row-0", "said …"), ("row-1", "said …")]
    client.close()


def test_rows_may_be_texts_conversations_and_mappings(client: Client, service: Service, worker_id: str) -> None:
    """A text is a prompt, a list is a conversation, a mapping goes as it is."""
    rows = ["one", [{"role": "user", "content": "two"}], {"custom_id": "three", "prompt": "3", "generation": {"seed": 4}}]
    client.submit("tiny", rows)
    work = claim_one(service, worker_id).rows
    assert (work[0].prompt, work[1].messages, work[2].custom_id) == ("one", ({"role": "user", "content": "two"},), "three")
    assert work[2].generation.seed == 4


def test_a_job_that_waits_can_be_changed(client: Client, service: Service, worker_id: str) -> None:
    """Options, labels and rows; the job knows its new state at once."""
    job = client.submit("tiny", ["one", "two"], runtime=RuntimeConfig(kv_cache_strategy="paged"), where='zone == "moon"')
    done = job.amend({"kv_cache_strategy": None}, where="any", skip_rows=[1])
    assert (done.plans_amended, done.plans_kept, done.rows_skipped) == (1, 0, 1)
    assert (job.counts.failed, job.plans[0].condition) == (1, None)
    assert [row.prompt for row in claim_one(service, worker_id).rows] == ["one"]


def test_a_row_that_is_wrong_fails_alone(client: Client, worker_id: str) -> None:
    """A row of another kind is sent as it is, and ends with the service's error for it."""
    job = client.submit("tiny", ["fine", 7])
    assert (job.counts.failed, job.counts.pending, job.counts.total, job.row_count) == (1, 1, 2, 2)
    (failed,) = job.results(follow=False)
    assert failed.error is not None
    assert (failed.row, failed.text, failed.error.code) == (1, None, "invalid_row")


def test_one_text_is_not_a_list_of_rows(client: Client) -> None:
    """A text in the place of rows would become one row a character; it is refused."""
    with pytest.raises(InvalidJob, match="must be a list"):
        client.submit("tiny", "Hello")


def test_results_stream_while_the_job_runs(client: Client, service: Service, worker_id: str) -> None:
    """A result is handed out before the next one exists, and the stream ends with the job."""
    job = client.submit("tiny", [str(number) for number in range(300)])
    first, second = claim_one(service, worker_id), None
    stream = job.results()
    answer(service, first)
    early = [next(stream) for _ in first.rows]
    assert not client.job(job.id).is_final
    second = claim_one(service, worker_id)
    threading.Thread(target=answer, args=(service, second), daemon=True).start()
    late = list(stream)
    assert [result.row for result in early + late] == list(range(300))
    assert job.refresh().state is JobState.SUCCEEDED


def test_reading_again_begins_after_the_given_cursor(client: Client, service: Service, worker_id: str) -> None:
    """Who has read up to a cursor gets the rest."""
    job = client.submit("tiny", ["a", "b", "c"])
    answer(service, claim_one(service, worker_id))
    first, *rest = job.results()
    assert [result.row for result in job.results(after=first.cursor)] == [result.row for result in rest]


def test_waiting_ends_with_the_job_or_in_time(client: Client, service: Service, worker_id: str) -> None:
    """wait() raises TimeoutError while the job runs, and returns the job once it has ended."""
    job = client.submit("tiny", ["a"])
    with pytest.raises(TimeoutError, match="queued"):
        job.wait(timeout=0.1)
    threading.Thread(target=lambda: answer(service, claim_one(service, worker_id)), daemon=True).start()
    assert job.wait(timeout=20).state is JobState.SUCCEEDED


def test_a_cancelled_job_can_be_retried_by_its_failed_rows(client: Client, worker_id: str) -> None:
    """cancel() ends it, each row says so, and retry() makes a new job of those rows."""
    job = client.submit("tiny", ["a", {"custom_id": "b", "prompt": "b"}])
    with pytest.raises(Conflict):
        job.retry()
    assert job.cancel().state is JobState.CANCELLED
    assert {result.error.code for result in job.results() if result.error} == {"cancelled"}
    again = job.retry(idempotency_key="once")
    assert again.id != job.id
    assert again.row_count == 2
    assert job.retry(idempotency_key="once").id == again.id


def test_a_plan_shows_its_history_and_tries(client: Client, service: Service, worker_id: str) -> None:
    """plan() has the events in order and every attempt with the plan as it ran."""
    job = client.submit("tiny", ["a"])
    waiting = client.plan(job.plans[0].id)
    assert [(verdict.node, verdict.eligible) for verdict in waiting.verdicts] == [("attic", True)]
    work = claim_one(service, worker_id)
    answer(service, work, errors={0: RowError(code="generation_failed", message="no")})
    done = client.plan(job.plans[0].id)
    assert done.state is ExecutionState.SUCCEEDED
    assert [event.after for event in done.events if event.kind in ("submit", "claim")] == ["queued", "leased"]
    assert done.attempts[0].worker == worker_id
    assert done.attempts[0].runtime_plan is not None


def test_plans_come_through_all_pages_and_jobs_newest_first(client: Client, worker_id: str) -> None:
    """A job of more plans than a page holds lists them all, in order; the list of jobs begins with the newest."""
    job = client.submit("tiny", ["x"] * (256 * 101 + 1))
    assert (len(job.plans), job.plans_total) == (100, 102)
    plans = list(client.plans(job))
    assert [plan.raw["number"] for plan in plans] == list(range(102))
    newer = client.submit("tiny", ["x"])
    assert [found.id for found in client.jobs()] == [newer.id, job.id]
    everything = [plan.id for plan in client.plans()]
    assert everything == [newer.plans[0].id, *(plan.id for plan in plans)]
    newer.cancel()
    assert [plan.id for plan in client.plans(state="cancelled")] == everything[:1]
    assert list(client.plans(job.id, state="cancelled")) == []
    with pytest.raises(NotFound):
        list(client.plans("job_no"))


def test_a_preview_names_who_can_run_it(client: Client, service: Service, worker_id: str) -> None:
    """preview() stores nothing, and says of each worker whether it could, and if not why."""
    found = client.preview("tiny", RuntimeConfig(use_specialization=False), where='zone == "moon"')
    assert found.runtime_plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    (verdict,) = found.workers
    assert not verdict.eligible
    assert any("moon" in reason for reason in verdict.reasons)
    assert found.condition == "no-capable-worker"
    assert list(client.jobs()) == []


def test_the_fleet_is_there_to_see(client: Client, worker_id: str) -> None:
    """workers(), models() and health() tell what there is; drain() asks a node to leave."""
    (worker,) = client.workers()
    assert (worker.id, worker.node, worker.state) == (worker_id, "attic", "active")
    assert any(model.id == "tiny" and model.raw["nodes"] == ["attic"] for model in client.models())
    assert client.health()["status"] == "ok"
    assert client.drain("attic")["workers"] == 1
    assert [worker.state for worker in client.workers()] == ["draining"]
    with pytest.raises(NotFound):
        client.drain("cellar/../..")


def test_refusals_arrive_as_the_exceptions_that_were_raised(client: Client, worker_id: str) -> None:
    """Each refusal is the core's own exception with its code, param and remedy."""
    with pytest.raises(ModelNotFound) as missing:
        client.submit("nobody-has-this", ["a"])
    assert (missing.value.code, missing.value.status, missing.value.param) == ("model_not_found", 404, "model")
    assert "tiny" in (missing.value.remedy or "")
    with pytest.raises(InvalidOption, match="kv_cache_strategy") as option:
        client.submit("tiny", ["a"], runtime={"kv_cache_strategy": "chunked"})
    assert option.value.param is not None
    with pytest.raises(PlanNotExecutable):
        client.submit("tiny", ["a"], runtime={"offload_gpu_layers": 2})
    with pytest.raises(InvalidExpression):
        client.submit("tiny", ["a"], where="zone = moon")
    with pytest.raises(NotFound):
        client.job("job_none")


def test_a_key_stands_for_one_body(client: Client, worker_id: str) -> None:
    """The same key and body give the same job, another body is refused at once."""
    first = client.submit("tiny", ["a"], idempotency_key="k")
    assert client.submit("tiny", ["a"], idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflict):
        client.submit("tiny", ["b"], idempotency_key="k")
    with pytest.raises(RequestError, match="idempotency_key"):  # a variable that is not set is no key
        client.submit("tiny", ["b"], idempotency_key="")


def test_nobody_there_is_said_soon_and_with_a_remedy() -> None:
    """A client of an address where nothing listens raises within seconds and names what to do."""
    with Client(f"http://127.0.0.1:{refused_port()}") as client, pytest.raises(ServiceUnreachable) as raised:
        client.workers()
    assert "OLLM_BASE_URL" in (raised.value.remedy or "")
    assert "ollm-service up" in (raised.value.remedy or "")


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://example", "http://", "http://[::1", "\x00"])
def test_a_malformed_address_is_refused(address: str) -> None:
    """What is not a web address is refused with a sentence, before anything is sent."""
    with pytest.raises(RequestError):
        Client(address)


def test_a_service_that_comes_back_is_waited_for(service: Service, worker_id: str) -> None:
    """A client whose service restarts goes on where it was."""
    with LiveService(service) as live:
        client = Client(live.url)
        job = client.submit("tiny", ["a"])
        port = live.port
    service.stopping.clear()
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(client.job(job.id).id), daemon=True)
    asking.start()
    with LiveService(service, port):
        wait_for(lambda: found, timeout=20, what="the client to reach the restarted service")
    client.close()
    assert found == [job.id]
