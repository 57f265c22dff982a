"""When does the health check of a worker pass?"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.store.database import Store, open_database, upgrade
from tests.store.ageing import let_time_pass
from tests.store.crowd import multiply_workers
from tests.store.samples import new_worker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a database with the schema."""
    url = f"sqlite:///{tmp_path}/ollm.db"
    upgrade(url)
    return url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store on it."""
    with contextlib.closing(open_database(url)) as opened:
        yield opened


def check(url: str, node: str = "north") -> subprocess.CompletedProcess[str]:
    """Run the check as a container would."""
    environment = {**os.environ, "OLLM_DATABASE_URL": url, "OLLM_NODE": node}
    command = [sys.executable, "-m", "workers.health"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_node_is_healthy_while_its_worker_is_heard_of(store: Store, url: str) -> None:
    """A worker passes its check until its last heartbeat is a lease old; another node's worker does not help."""
    new_worker(store, "north")
    assert check(url).returncode == 0
    elsewhere = check(url, "south")
    assert (elsewhere.returncode, elsewhere.stderr) == (1, "No worker of node south was heard of in the last 30 s.\n")
    let_time_pass(url, 31_000)
    assert check(url).returncode == 1


def test_a_worker_of_a_large_fleet_may_be_silent_for_longer(store: Store, url: str) -> None:
    """The more workers there are, the less often each is heard of."""
    new_worker(store, "north")
    multiply_workers(url, 300)
    let_time_pass(url, 31_000)
    assert check(url).returncode == 0
    let_time_pass(url, 5_001)
    assert "in the last 36 s" in check(url).stderr


def test_a_check_without_a_database_says_so(tmp_path: Path) -> None:
    """Where the database is missing the check fails with a sentence."""
    failed = check(f"sqlite:///{tmp_path}/nowhere.db")
    assert failed.returncode in (1, 2)
    assert failed.stderr.count("\n") == 1
