"""Does a real model answer right through the whole service, embedded, and does a bad disk or folder end in clear words?"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ollm_service import Client
from ollm_service.store.database import upgrade
from tests.chaos.checker import violations
from tests.chaos.history import Acknowledged, read_history
from tests.e2e.fleet import DEMO_MODELS, REPOSITORY, Fleet, Part, counts
from tests.e2e.model_folders import REASONS, make_models_root
from tests.e2e.scripted_jobs import MODEL, answers
from tests.servers import LOOPBACK, free_port
from tests.waiting import wait_for

START_SECONDS = 60
REAL_RUNNER = f"{sys.executable} -m workers.runner"
HELD_OUT: list[dict[str, Any]] = [
    json.loads(line) for line in (REPOSITORY / "demo" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
]
RIGHT: dict[str, str] = json.loads((REPOSITORY / "demo" / "heldout_answers.json").read_text(encoding="utf-8"))
SHORT = {"max_new_tokens": 8}


class Embedded(Part):
    """`ollm-service up` on a free port."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.base_url = f"http://{LOOPBACK}:{self.port}"
        program = str(Path(sys.executable).with_name("ollm-service"))
        options = ["--port", str(self.port), "--data-dir", str(directory / "data"), "--models-dir", str(DEMO_MODELS)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OLLM_")}
        super().__init__("ollm-service up", [program, "up", *options], environment, directory)

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.directory / 'data' / 'ollm.db'}"

    def is_ready(self) -> bool:
        """Whether it has said that its worker is there, with the demo model."""
        assert self.is_running, f"{self.name} ended:\n{self.log_tail()}"
        return f"Models: {MODEL}" in self.log_tail()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """The whole service on SQLite, as a newcomer starts it."""
    service = Embedded(tmp_path_factory.mktemp("embedded"))
    service.start()
    try:
        wait_for(service.is_ready, timeout=START_SECONDS, what="the embedded service to be ready")
        yield service
    finally:
        service.close()


@pytest.fixture(scope="module")
def answered(embedded: Embedded) -> dict[str, str]:
    """What the service answered to the held-out questions, submitted as one job and read while it ran."""
    with Client(embedded.base_url) as client:
        job = client.submit(MODEL, HELD_OUT, generation=SHORT)
        assert job.plans[0].runtime_plan.backend_id == "optimized-native"  # known before anything ran
        found = {result.custom_id: result.text or f"error: {result.error}" for result in job.results()}
        assert job.refresh().counts.done == len(HELD_OUT)
        plan = client.plan(job.plans[0].id)
    assert plan.runtime_plan.specialization_state == "applied", plan.runtime_plan.fallback_reason
    assert violations(read_history(embedded.database_url), {job.id: Acknowledged(row_count=len(HELD_OUT))}) == []
    return found


def test_a_real_model_answers_the_held_out_questions(answered: dict[str, str]) -> None:
    """At least 95 of 100 questions that the demo model never saw come back right, through client, service, worker and runner."""
    right = sum(answered[name].strip() == expected for name, expected in RIGHT.items())
    assert right >= 0.95 * len(RIGHT)


def test_batching_changes_no_answer(embedded: Embedded, answered: dict[str, str]) -> None:
    """A question asked alone gets the very tokens that it got in a batch, padded beside longer ones."""
    questions = HELD_OUT[:12]
    with Client(embedded.base_url) as client:
        jobs = [client.submit(MODEL, [question], generation=SHORT) for question in questions]
        alone = {result.custom_id: result.text for job in jobs for result in job.results()}
    assert alone == {question["custom_id"]: answered[question["custom_id"]] for question in questions}


def test_sigterm_ends_the_embedded_service_and_everything_that_it_started(embedded: Embedded, answered: dict[str, str]) -> None:
    """After SIGTERM the command ends with status 0, and no process of it is left."""
    family = psutil.Process(embedded.pid).children(recursive=True)
    assert len(family) >= 3, "a coordinator, a worker and a warm runner"
    embedded.terminate()
    assert embedded.wait(timeout=30) == 0, embedded.log_tail()
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A worker with a real runner for which the cache disk is full as soon as it writes."""
    directory = tmp_path_factory.mktemp("cramped")
    make_models_root(directory / "models")
    cache = directory / "kv"
    cache.mkdir()
    database_url = f"sqlite:///{directory / 'ollm.db'}"
    upgrade(database_url)
    settings = {"OLLM_CACHE_DIR": str(cache)}
    runner = _cramped_runner(cache, directory)
    models = directory / "models"
    with Fleet(
        directory, database_url=database_url, broker_url="memory://", models_dir=models, runner=runner, settings=settings
    ) as fleet:
        fleet.start_coordinator()
        fleet.start_worker("only")
        yield fleet


def _cramped_runner(cache: Path, directory: Path) -> str:
    """A command that runs the real runner on a cache disk of a few pages; where mounting is not allowed, with a file-size limit.

    The mount is the runner's alone, so that the worker goes on to see a disk with room, as it would just before it fills up.
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
        script = directory / "runner.sh"
        script.write_text(f'#!/bin/sh\nmount -t tmpfs -o size=16k none "{cache}" || exit 9\nexec {REAL_RUNNER} "$@"\n')
        script.chmod(0o755)
        return " ".join([*unshare, str(script)])
    return f"prlimit --fsize=4096 {REAL_RUNNER}"


def test_a_full_cache_disk_makes_a_plan_fall_back(cramped: Fleet, answered: dict[str, str]) -> None:
    """A plan that only preferred KV files ends with the very same answers from the generic backend, and says why."""
    questions = HELD_OUT[:8]
    job = cramped.calls.submit(MODEL, questions, generation=SHORT)
    ended = cramped.calls.wait_final(job["id"], timeout=60)
    assert counts(ended) == (8, 0, 0)
    plan = ended["plans"][0]["runtime_plan"]
    assert (plan["backend_id"], plan["specialization_state"]) == ("transformers-generic", "fallback")
    assert "No space left" in plan["fallback_reason"] or "File too large" in plan["fallback_reason"]
    found = answers(cramped.calls.results(job["id"]))
    assert found == {question["custom_id"]: answered[question["custom_id"]] for question in questions}


def test_a_full_cache_disk_fails_a_plan_that_demands_it_with_the_reason(cramped: Fleet) -> None:
    """A plan that demands KV files is not answered another way: it is tried again, then its rows name the full disk."""
    job = cramped.calls.submit(MODEL, HELD_OUT[:2], generation=SHORT, runtime={"kv_cache_strategy": "paged"})
    ended = cramped.calls.wait_final(job["id"], timeout=60)
    assert (ended["state"], counts(ended)) == ("failed", (0, 2, 0))
    messages = {result["error"]["message"] for result in cramped.calls.results(job["id"])}
    assert all("No space left" in message or "File too large" in message for message in messages), messages


def test_spoilt_model_folders_are_shown_as_refused_with_the_reason(cramped: Fleet) -> None:
    """Pickled weights, a broken header, a missing shard and a link out of the root are listed, unusable, each with its reason."""
    listed = {model["id"]: model for model in cramped.calls.get("/v1/models").json()["data"]}
    assert listed[MODEL]["usable"]
    for name, word in REASONS.items():
        assert not listed[name]["usable"]
        assert word in listed[name]["unsafe_because"]


@pytest.mark.parametrize("name", REASONS)
def test_a_job_for_a_spoilt_model_is_refused(cramped: Fleet, name: str) -> None:
    """Nobody can submit a job for a model that every worker refuses, and the answer says so."""
    answer = cramped.calls.post("/v1/jobs", {"model": name, "rows": [{"prompt": "1+1="}]})
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["error"]["code"] in ("model_not_found", "plan_not_executable")
