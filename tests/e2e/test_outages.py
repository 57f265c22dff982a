"""What does a user see when a server is away: at the start of our processes, and while jobs are submitted?"""

import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.fleet import SCRIPTED, Fleet, run_to_end
from tests.e2e.scripted_jobs import MODEL, rows_of
from tests.servers import LOOPBACK, Blackhole, PostgresServer, free_port, refused_port

SUBMISSIONS = 20
LONGEST_SUBMISSION_SECONDS = 1.0  # a broker that is waited for costs two seconds or more
COMMANDS = {
    "coordinator": ["ollm_service.api.server"],
    "worker": ["celery", "-A", "workers.app", "worker"],
}


def _start(part: str, tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    common = {"OLLM_DATA_DIR": str(tmp_path), "OLLM_PORT": str(free_port()), "OLLM_MODELS_DIR": str(tmp_path)}
    return run_to_end(COMMANDS[part], {**common, **settings}, timeout=60)


def _said(ended: subprocess.CompletedProcess[str]) -> str:
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("part", COMMANDS)
def test_a_database_that_is_away_at_the_start_is_said_in_a_sentence(part: str, tmp_path: Path) -> None:
    """The process ends with an exit status and a message that names the server, without a traceback and without the password."""
    port = refused_port()
    ended = _start(part, tmp_path, OLLM_DATABASE_URL=f"postgresql+psycopg://ollm:hush-hush@{LOOPBACK}:{port}/ollm")
    assert ended.returncode not in (0, None)
    assert "Traceback" not in _said(ended)
    assert "hush-hush" not in _said(ended)
    assert f"{LOOPBACK}:{port}" in _said(ended)


@pytest.mark.parametrize("part", COMMANDS)
def test_a_database_without_the_schema_is_said_in_a_sentence(part: str, tmp_path: Path, postgres_server: PostgresServer) -> None:
    """A process that finds no tables says which command makes them."""
    url = postgres_server.create_database()
    try:
        ended = _start(part, tmp_path, OLLM_DATABASE_URL=url)
    finally:
        postgres_server.drop_database(url)
    assert ended.returncode not in (0, None)
    assert "Traceback" not in _said(ended)
    assert "ollm-service db upgrade" in _said(ended)


@pytest.mark.parametrize("part", COMMANDS)
def test_a_broker_url_of_an_unknown_kind_is_said_in_a_sentence(part: str, tmp_path: Path, migrated_copy: str) -> None:
    """A broker that we do not speak ends the process with a message that names the setting."""
    ended = _start(part, tmp_path, OLLM_DATABASE_URL=migrated_copy, OLLM_BROKER_URL=f"carrier-pigeon://{LOOPBACK}")
    assert ended.returncode not in (0, None)
    assert "Traceback" not in _said(ended)
    assert "OLLM_BROKER_URL" in _said(ended)


@pytest.mark.parametrize("kind", ["refused", "blackholed"])
def test_a_broker_that_is_away_slows_no_submission_and_stops_no_job(kind: str, tmp_path: Path, migrated_copy: str) -> None:
    """With a broker that refuses, or accepts and never answers, the service starts, submissions stay fast, and jobs run."""
    with Blackhole() as blackhole:
        port = blackhole.port if kind == "blackholed" else refused_port()
        broker_url = f"redis://{LOOPBACK}:{port}/0"
        with Fleet(tmp_path, database_url=migrated_copy, broker_url=broker_url, runner=SCRIPTED) as fleet:
            fleet.start_coordinator()
            fleet.start_worker("only")
            jobs, slowest = [], 0.0
            for number in range(SUBMISSIONS):
                began = time.monotonic()
                jobs.append(fleet.calls.submit(MODEL, rows_of(2, f"{kind}-{number}"))["id"])
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < LONGEST_SUBMISSION_SECONDS
            for job_id in jobs:
                assert fleet.calls.wait_final(job_id, timeout=30)["state"] == "succeeded"
            fleet.workers["only"].terminate()
            assert fleet.workers["only"].wait(timeout=20) == 0, fleet.workers["only"].log_tail()


def test_a_coordinator_without_keys_refuses_to_listen_to_others(tmp_path: Path, migrated_copy: str) -> None:
    """Without API keys only loopback is served; any other address ends the process with a sentence and status 2."""
    ended = _start("coordinator", tmp_path, OLLM_DATABASE_URL=migrated_copy, OLLM_HOST="0.0.0.0")
    assert ended.returncode == 2
    assert "Traceback" not in _said(ended)
    assert "OLLM_API_KEYS" in _said(ended)
