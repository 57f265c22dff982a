"""Does every plan that an agent claims leave it in the right way? A real store, real runner processes, no model."""

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.core.lifecycle import ExecutionState as State
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import PassId, SpecializationState
from tests.doubles.scripted_runner import SPEED
from tests.servers import PostgresServer
from tests.store.crowd import multiply_workers
from tests.store.samples import new_worker
from tests.store.spoiling import spoil
from tests.unit.model_folders import TINY_LLAMA, make_model
from tests.waiting import wait_for
from tests.worker.place import SCRIPTED, SECONDS, TENANT, Place
from workers.attempt import Patience

QUICK = Patience(stall=1.0, terminate=0.3, kill=0.6, kill_when_lost=0.3)
RUNNER = " ".join(SCRIPTED)
MOST_TOKENS = 2**31 - 1


def kinds(place: Place, job_id: str) -> list[str]:
    """The history of the job's only plan."""
    return [event.kind for event in place.detail(job_id).events]


def test_every_row_is_answered_and_the_runner_stays_warm(place: Place, tmp_path: Path) -> None:
    """Plans run one after another in one process, and each history tells the way."""
    mark = f"[where={tmp_path}/pids]"
    job = place.submit([f"one {mark}", "two"], [f"three {mark}"])
    with place.agent():
        place.wait_for_end(job)
    assert list(place.texts(job)) == [0, 1, 2]
    assert place.texts(job)[1] == "TWO"
    first, second = place.details(job)
    assert [event.kind for event in first.events] == ["submit", "claim", "start", "applied", "finish"]
    assert first.plan.runtime_plan.applied_specialization_pass_ids
    assert first.attempts[0].placement is not None
    assert first.attempts[0].placement["device_id"] == "cpu"
    assert (first.attempts[0].measured or {})["was_warm"] is False
    assert (second.attempts[0].measured or {})["was_warm"] is True
    assert len(set((tmp_path / "pids").read_text().split())) == 1


def test_work_that_comes_later_is_found_quickly(place: Place) -> None:
    """An idle worker sees a commit by the database's change token, and a new class with it."""
    with place.agent():
        first = place.submit(["one"])
        place.wait_for_end(first, timeout=5)
        second = place.submit(["two"], config=RuntimeConfig(backend="transformers-generic"))
        place.wait_for_end(second, timeout=5)
    assert place.texts(second) == {0: "TWO"}


def test_a_class_that_cannot_be_read_is_passed_over(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """It is named in the log, once, and the plans of the others run."""
    spoilt = place.submit(["never"], where='zone == "moon"')
    class_id = place.detail(spoilt).plan.class_id
    spoil(place.database_url, "plan_classes", "requirements", class_id)
    with caplog.at_level(logging.WARNING), place.agent():
        for number in range(2):
            place.wait_for_end(place.submit([f"row {number}"]))
    told = [record.__dict__["class_id"] for record in caplog.records if record.message == "class-unreadable"]
    assert set(told) == {class_id}


def test_a_row_that_crashes_with_others_is_answered_alone(place: Place) -> None:
    """A crash halves the micro-batch until the row is alone; it burns no failure, and every row is answered."""
    job = place.submit(["a", "b [crash-batch]", "c", "d"])
    with place.agent():
        place.wait_for_end(job)
    assert place.texts(job) == {0: "A", 1: "B [CRASH-BATCH]", 2: "C", 3: "D"}
    detail = place.detail(job)
    assert (detail.plan.state, detail.plan.failures, detail.plan.losses) == (State.SUCCEEDED, 0, 0)
    crashes = [event for event in detail.events if event.kind == "crash"]
    assert len(crashes) == 2
    assert all(event.reason == "killed by SIGSEGV" for event in crashes)


def test_a_row_that_crashes_alone_twice_gets_its_error(place: Place) -> None:
    """The second lone crash is the row's error; all the others are answered."""
    job = place.submit(["a", "b [crash]", "c", "d"])
    with place.agent():
        place.wait_for_end(job)
    assert place.texts(job) == {0: "A", 1: "!runner_crashed", 2: "C", 3: "D"}


def test_a_runner_that_hangs_is_killed(place: Place) -> None:
    """No sign of life for the stall time counts as a crash."""
    job = place.submit(["[hang]"])
    with place.agent(patience=QUICK):
        place.wait_for_end(job)
    assert place.texts(job) == {0: "!runner_crashed"}
    reasons = [event.reason for event in place.detail(job).events if event.kind == "crash"]
    assert reasons == ["no sign of life for 1 s"]


def test_a_row_error_is_the_rows_own(place: Place) -> None:
    """The job goes on, and the plan succeeds."""
    job = place.submit(["a", "[row-error]"])
    with place.agent():
        place.wait_for_end(job)
    assert place.texts(job) == {0: "A", 1: "!generation_failed"}
    assert place.detail(job).plan.state == State.SUCCEEDED


def test_a_failed_pass_falls_back(place: Place) -> None:
    """The generic backend takes over, and the plan says what was planned and why it could not be had."""
    job = place.submit(["a", "b"])
    with place.agent(runner_command=f"{RUNNER} --fail-pass mlp-chunking"):
        place.wait_for_end(job)
    assert place.texts(job) == {0: "A", 1: "B"}
    plan = place.detail(job).plan
    assert plan.runtime_plan.specialization_state is SpecializationState.FALLBACK
    assert plan.runtime_plan.fallback_reason == "the script wants it to fail"
    assert plan.runtime_plan.backend_id == "transformers-generic"
    assert plan.runtime_plan.details["pass_mlp_chunking"] == "failed(the script wants it to fail)"


def test_a_runner_that_left_when_it_had_failed_is_replaced(place: Place, tmp_path: Path) -> None:
    """It has told what happened, so its end is no crash: a new one answers what comes next."""
    mark = f"[where={tmp_path}/pids]"
    failing = place.submit([f"[fail-permanently] {mark}"])
    with place.agent(runner_command=f"{RUNNER} --leave-after-failure"):
        place.wait_for_end(failing)
        job = place.submit([f"a {mark}"])
        place.wait_for_end(job)
    assert "crash" not in kinds(place, failing) + kinds(place, job)
    assert place.detail(job).plan.attempt == 1
    assert len(set((tmp_path / "pids").read_text().split())) == 2


def test_a_fallback_outlives_the_runner_whose_pass_failed(place: Place) -> None:
    """A runner that ends after telling of the failed pass takes nothing along: a new one answers in the same attempt."""
    job = place.submit(["a", "b"])
    with place.agent(runner_command=f"{RUNNER} --fail-pass mlp-chunking --leave-after-failure"):
        place.wait_for_end(job)
    assert place.texts(job) == {0: "A", 1: "B"}
    plan = place.detail(job).plan
    assert (plan.attempt, plan.failures) == (1, 0)
    assert plan.runtime_plan.specialization_state is SpecializationState.FALLBACK


def test_a_fallback_that_does_not_fit_fails_the_attempt(place: Place) -> None:
    """It is counted, so that the pass cannot fail here for ever, and it tells what the pass said and which room is lacking."""
    make_model(place.models_dir / "deep", {**TINY_LLAMA, "max_position_embeddings": MOST_TOKENS, "num_hidden_layers": 64})
    place.use_model("deep")
    # Keys and values of one row take more than the limit; a layer's part of them does not, and files hold the others.
    job = place.submit(["a"], max_new_tokens=300_000)
    with place.agent(runner_command=f"{RUNNER} --fail-pass mlp-chunking", memory_limit_gb=1.0):
        wait_for(lambda: {"fail", "decline"} & set(kinds(place, job)), timeout=SECONDS, what="the end of an attempt")
    detail = place.detail(job)
    assert (detail.plan.state, detail.plan.failures, detail.plan.declines) == (State.QUEUED, 1, 0)
    assert detail.plan.runtime_plan.specialization_state is SpecializationState.PLANNED
    (failure,) = [event for event in detail.events if event.kind == "fail"]
    assert failure.reason is not None
    assert failure.reason.startswith(
        "pass_failed: the script wants it to fail (the fallback to transformers-generic does not fit here: cpu, "
    )
    assert "bytes needed for one row" in failure.reason
    attempt = detail.attempts[0]
    assert attempt.placement is not None
    assert attempt.placement["tier"] == "KV cache in files"
    assert attempt.measured is not None
    assert attempt.measured["passes"] == {"mlp-chunking": "failed(the script wants it to fail)"}


def test_a_runner_that_dies_while_falling_back_blames_no_row(place: Place) -> None:
    """Rows were in flight when the pass failed; they are not when the runner dies at loading the model again."""
    job = place.submit(["a"])
    with place.agent(runner_command=f"{RUNNER} --fail-pass mlp-chunking --die-loading-generic"):
        wait_for(lambda: {"fail", "crash"} & set(kinds(place, job)), timeout=SECONDS, what="the runner's death")
    detail = place.detail(job)
    assert (detail.plan.failures, "crash" in kinds(place, job)) == (1, False)


def test_a_demanded_pass_that_fails_fails_the_attempt(place: Place) -> None:
    """No fallback replaces what the user asked for: the plan waits for another worker."""
    job = place.submit(["a"], config=RuntimeConfig(dense_projection_chunk_rows=8))
    with place.agent(runner_command=f"{RUNNER} --fail-pass mlp-chunking"):
        wait_for(lambda: place.detail(job).plan.failures == 1, timeout=SECONDS, what="the failure")
    detail = place.detail(job)
    assert detail.plan.state == State.QUEUED
    (failure,) = [event for event in detail.events if event.kind == "fail"]
    assert failure.reason is not None
    assert failure.reason.startswith("pass_failed: the script wants it to fail (no fallback: mlp-chunking was asked for")
    assert detail.attempts[0].measured is not None
    assert detail.attempts[0].measured["passes"]["mlp-chunking"].startswith("failed(")


def test_a_permanent_failure_ends_the_plan(place: Place) -> None:
    """Trying again anywhere cannot help, so every other row carries the error."""
    job = place.submit(["a", "[fail-permanently]"])
    with place.agent():
        place.wait_for_end(job)
    assert place.texts(job) == {0: "!failed", 1: "!failed"}


def test_a_runner_that_dies_while_loading_is_a_failure(place: Place) -> None:
    """No row is to blame; after three such failures the plan has failed."""
    job = place.submit(["a"])
    with place.agent(runner_command=f"{RUNNER} --die-loading"):
        wait_for(lambda: place.detail(job).plan.failures == 1, timeout=SECONDS, what="the failure")
    (failure,) = [event for event in place.detail(job).events if event.kind == "fail"]
    assert failure.reason == "runner_died_loading: The runner died: killed by SIGKILL"


def test_a_runner_that_cannot_be_started_is_a_failure(place: Place) -> None:
    """A wrong command shows in the plan's history."""
    job = place.submit(["a"])
    with place.agent(runner_command="/nonexistent/runner"):
        wait_for(lambda: place.detail(job).plan.failures == 1, timeout=SECONDS, what="the failure")


def test_a_plan_that_does_not_fit_is_declined(place: Place) -> None:
    """Nothing is burned, and the reason names the bytes."""
    make_model(place.models_dir / "huge", {**TINY_LLAMA, "max_position_embeddings": MOST_TOKENS, "num_hidden_layers": 64})
    place.use_model("huge")
    job = place.submit(["a"], max_new_tokens=MOST_TOKENS)
    with place.agent():
        wait_for(lambda: place.detail(job).plan.declines == 1, timeout=SECONDS, what="the decline")
    plan = place.detail(job).plan
    assert (plan.state, plan.failures) == (State.QUEUED, 0)
    (decline,) = [event for event in place.detail(job).events if event.kind == "decline"]
    assert "bytes needed for one row" in (decline.reason or "")


def test_a_plan_whose_adapter_is_elsewhere_is_declined(place: Place) -> None:
    """Another worker may have the adapter; the reason names its folder."""
    job = place.submit(["a"], config=RuntimeConfig(adapter_dir="lora"))
    with place.agent():
        wait_for(lambda: place.detail(job).plan.declines == 1, timeout=SECONDS, what="the decline")
    (decline,) = [event for event in place.detail(job).events if event.kind == "decline"]
    assert decline.reason == "the adapter lora is not in the models folder"


def test_a_broken_adapter_fails_the_attempt(place: Place) -> None:
    """A folder that is no adapter never reaches a runner, and the failure says what is wrong with it."""
    (place.models_dir / "lora").mkdir()
    (place.models_dir / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    job = place.submit(["a"], config=RuntimeConfig(adapter_dir="lora"))
    with place.agent():
        wait_for(lambda: place.detail(job).plan.failures == 1, timeout=SECONDS, what="the failure")
    (failure,) = [event for event in place.detail(job).events if event.kind == "fail"]
    assert failure.reason == "adapter_refused: The adapter lora cannot be used: it has no adapter_model.safetensors."


def test_cancel_stops_the_work_and_keeps_the_runner(place: Place, tmp_path: Path) -> None:
    """The plan ends cancelled, what was finished stays, and the same runner takes the next plan."""
    mark = f"[where={tmp_path}/pids]"
    job = place.submit(["done", f"[slow=600] {mark}"])
    with place.agent(runner_command=f"{RUNNER} --micro-batch 1", lease_seconds=3.0):
        wait_for(lambda: place.texts(job), timeout=SECONDS, what="the first row")
        place.store.jobs.cancel(job, TENANT)
        place.wait_for_end(job, timeout=10)
        following = place.submit([f"next {mark}"])
        place.wait_for_end(following)
    assert place.texts(job) == {0: "DONE", 1: "!cancelled"}
    assert len(set((tmp_path / "pids").read_text().split())) == 1


@pytest.mark.parametrize("word", ["[hang]", "[stubborn]"])
def test_cancel_kills_a_runner_that_does_not_listen(place: Place, word: str) -> None:
    """A runner that ignores Stop is killed, and the plan is still cancelled, not crashed."""
    job = place.submit([word])
    patience = Patience(stall=60, terminate=0.3, kill=0.6)
    with place.agent(patience=patience, lease_seconds=3.0):
        place.wait_for_state(job, State.RUNNING)
        place.store.jobs.cancel(job, TENANT)
        place.wait_for_end(job, timeout=10)
        assert "crash" not in kinds(place, job)
        following = place.submit(["next"])
        place.wait_for_end(following)
    assert place.detail(job).plan.state == State.CANCELLED


def test_a_drain_finishes_what_runs(place: Place) -> None:
    """A draining worker claims no more and leaves when its plan is done."""
    job = place.submit(["[slow=1]"])
    with place.agent() as agent:
        place.wait_for_state(job, State.RUNNING)
        agent.drain()
        later = place.submit(["later"])
        assert agent.wait(timeout=SECONDS)
    assert place.detail(job).plan.state == State.SUCCEEDED
    assert place.detail(later).plan.state == State.QUEUED
    assert [worker.state for worker in place.store.fleet.workers(active_only=False)] == ["gone"]


def test_a_drain_releases_what_does_not_finish_in_time(place: Place) -> None:
    """After the drain time the plan is queued again, unharmed, with the rows that were done."""
    job = place.submit(["done", "[slow=600]"])
    with place.agent(drain_seconds=0.5, runner_command=f"{RUNNER} --micro-batch 1") as agent:
        wait_for(lambda: place.texts(job), timeout=SECONDS, what="the first row")
        agent.drain()
        assert agent.wait(timeout=SECONDS)
    plan = place.detail(job).plan
    assert (plan.state, plan.rows_done, plan.failures, plan.losses) == (State.QUEUED, 1, 0, 0)


def test_the_end_at_once_releases_everything(place: Place) -> None:
    """A runner that listens to nothing does not hold up a worker that must go."""
    job = place.submit(["[stubborn]"])
    with place.agent() as agent:
        place.wait_for_state(job, State.RUNNING)
        agent.stop_now()
        assert agent.wait(timeout=5)
    assert place.detail(job).plan.state == State.QUEUED
    assert "release" in kinds(place, job)


def test_an_operators_drain_ends_the_worker(place: Place) -> None:
    """A drain asked for in the database is seen at the next heartbeat."""
    with place.agent(lease_seconds=1.5) as agent:
        assert place.store.fleet.drain("here") == 1
        assert agent.wait(timeout=SECONDS)


def test_a_lost_lease_stops_the_work(place: Place, tmp_path: Path) -> None:
    """When the plan belongs to somebody else, nothing more is written and the runner is free for the next plan."""
    job = place.submit(["[slow=600]"])
    with place.agent(lease_seconds=3.0, patience=QUICK):
        place.wait_for_state(job, State.RUNNING)
        with sqlite3.connect(tmp_path / "ollm.db", timeout=10) as connection:
            connection.execute("UPDATE runtime_plans SET lease_id = 'another'")
        following = place.submit(["next"])
        place.wait_for_end(following, timeout=15)
    assert place.texts(job) == {}
    assert place.detail(job).plan.state == State.RUNNING


def test_a_worker_that_cannot_claim_leaves(place: Place, tmp_path: Path) -> None:
    """When claims break for a reason that is not the database's absence, the worker ends with 1 instead of looking alive."""
    codes: list[int] = []
    with place.agent(on_end=codes.append) as agent:
        with sqlite3.connect(tmp_path / "ollm.db", timeout=10) as connection:
            connection.execute("ALTER TABLE plan_classes RENAME TO elsewhere")
        assert agent.wait(timeout=SECONDS)
    assert codes == [1]


def test_a_renewed_lease_outlives_its_first_end(place: Place) -> None:
    """Work that takes several leases long is not lost while its worker is alive, though the reaper looks."""
    job = place.submit(["[slow=4]"])
    with place.agent(lease_seconds=1.5):
        wait_for(lambda: place.store.leases.reap() > 0 or place.texts(job), timeout=SECONDS, what="the answer")
    assert place.detail(job).plan.losses == 0
    assert place.detail(job).plan.attempt == 1


def test_a_worker_of_a_large_fleet_asks_for_longer_leases(place: Place) -> None:
    """It hears of the others by its heartbeats; from then on it renews and claims for as long as their number asks."""
    new_worker(place.store)
    multiply_workers(place.database_url, 99)  # with the one that comes: leases of 12 s

    def lease_of(job_id: str) -> float:
        (plan_id,) = (plan.plan_id for plan in place.store.jobs.plans(job_id, TENANT))
        with sqlite3.connect(place.directory / "ollm.db", timeout=10) as connection:
            query = "SELECT COALESCE(MAX(lease_expires_ms), 0) FROM runtime_plans WHERE id = ?"
            ends = connection.execute(query, (plan_id,)).fetchone()[0]
        return max(0.0, (int(ends) - place.store.now_ms()) / 1000)

    with place.agent(lease_seconds=6.0, slots=2):
        early = place.submit(["[slow=600]"])
        place.wait_for_state(early, State.RUNNING)
        wait_for(lambda: lease_of(early) > 10, timeout=SECONDS, what="a renewal for 12 s")
        late = place.submit(["[slow=600]"])
        assert wait_for(lambda: lease_of(late), timeout=SECONDS, what="the claim") > 10


def test_slots_run_side_by_side(place: Place) -> None:
    """Two slots take two plans at a time, each in a runner of its own."""
    job = place.submit(["[slow=2]"], ["[slow=2]"])
    with place.agent(slots=2):
        wait_for(
            lambda: all(detail.plan.state == State.RUNNING for detail in place.details(job)),
            timeout=SECONDS,
            what="both plans to run",
        )
        place.wait_for_end(job)


def test_only_a_worker_with_the_label_gets_the_plan(place: Place) -> None:
    """Two workers with different capabilities get only the plans that they can run."""
    job = place.submit(["a"], where='zone == "b"')
    with place.agent(node="first", worker_labels="zone=a"):
        other = place.submit(["for anyone"])
        place.wait_for_end(other)
        assert place.detail(job).plan.state == State.QUEUED
        with place.agent(node="second", worker_labels="zone=b"):
            place.wait_for_end(job)
    assert place.detail(job).attempts[0].node == "second"


def test_without_a_cache_directory_there_is_no_disk_cache(place: Place, tmp_path: Path) -> None:
    """Such a worker says why, runs plans that merely prefer the disk cache, and never gets one that demands it."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    demanding = place.submit(["a"], config=RuntimeConfig(kv_cache_strategy="paged"))
    easy = place.submit(["b"])
    with place.agent(cache_dir=blocked / "cache"):
        place.wait_for_end(easy)
        (worker,) = place.store.fleet.workers()
        assert "no writable cache directory" in (worker.capabilities.passes[PassId.DISK_CACHE] or "")
        assert place.detail(demanding).plan.state == State.QUEUED
    assert place.texts(easy) == {0: "B"}


def test_what_the_runner_measures_of_the_devices_is_offered(place: Place) -> None:
    """The fleet hears how fast a worker's devices are as soon as its runner has told."""
    with place.agent():
        cpu = wait_for(
            lambda: next((found for found in place.store.fleet.workers()[0].capabilities.devices if found.memory_rate), None),
            timeout=SECONDS,
            what="the speed of the CPU",
        )
    assert (cpu.memory_rate, cpu.arithmetic) == (SPEED.memory_rate, SPEED.arithmetic)


def test_models_come_and_go(place: Place) -> None:
    """A model that appears is offered without a restart; an unsafe one is reported and not offered."""
    with place.agent(rescan_seconds=0.1):
        make_model(place.models_dir / "later")
        poisoned = make_model(place.models_dir / "poisoned")
        (poisoned / "weights.pkl").write_bytes(b"x")

        def names() -> dict[str, bool]:
            return {model.name: model.is_usable for model in place.store.fleet.workers()[0].capabilities.models}

        wanted = {"tiny": True, "later": True, "poisoned": False}
        wait_for(lambda: names() == wanted, timeout=SECONDS, what="the new models")


@pytest.fixture
def postgres_place(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[Place]:
    """A place on PostgreSQL."""
    url = postgres_server.create_database()
    made = Place(tmp_path, url)
    yield made
    made.close()
    postgres_server.drop_database(url)


def test_results_wait_for_a_database_that_is_away(postgres_place: Place, postgres_server: PostgresServer) -> None:
    """Rows finished while the database is down are recorded when it is back, by the same attempt."""
    place = postgres_place
    mark = place.directory / "mark"
    job = place.submit(["done", "[slow=1]", "two", f"last [where={mark}]"])
    with place.agent(runner_command=f"{RUNNER} --micro-batch 1"):
        wait_for(lambda: place.texts(job), timeout=SECONDS, what="the first row")
        postgres_server.kill()
        wait_for(mark.exists, timeout=SECONDS, what="the last row to be generated")
        postgres_server.start()
        place.wait_for_end(job)
    texts = place.texts(job)
    assert list(texts) == [0, 1, 2, 3]
    assert not any((text or "!").startswith("!") for text in texts.values())
    assert place.detail(job).plan.attempt == 1
