"""Do all promises hold together while everything breaks at random? Seeded faults under load, then the whole history is checked.

`CHAOS_SEED` repeats a run, `CHAOS_SECONDS` makes it longer.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.checker import violations
from tests.chaos.faults import Fault, Hands, schedule
from tests.chaos.history import read_history
from tests.chaos.users import Users
from tests.e2e.fleet import SCRIPTED, Fleet
from tests.servers import LOOPBACK, PostgresServer, RedisServer

SECONDS = float(os.environ.get("CHAOS_SECONDS", "30"))
LEASE_SECONDS = 3.0
QUIET_SECONDS = 90.0  # after the last fault, for what is left to do
WITH_DISK, WITHOUT_DISK = ("north", "south"), "west"


@pytest.fixture
def seed() -> int:
    """What fixes the faults and the jobs."""
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))


@pytest.fixture
def fleet(postgres_server: PostgresServer, redis_server: RedisServer, migrated_copy: str, tmp_path: Path) -> Iterator[Fleet]:
    """Three workers, one of them with nowhere to write KV files."""
    (tmp_path / "file").touch()
    with Fleet(
        tmp_path,
        database_url=migrated_copy,
        broker_url=redis_server.url,
        lease_seconds=LEASE_SECONDS,
        runner=f"{SCRIPTED} --micro-batch 16",
    ) as fleet:
        fleet.start_coordinator()
        for node in WITH_DISK:
            fleet.launch_worker(node, OLLM_WORKER_LABELS=f"side={node}")
        no_disk = str(tmp_path / "file" / "kv")
        fleet.launch_worker(WITHOUT_DISK, OLLM_WORKER_LABELS=f"side={WITHOUT_DISK}", OLLM_CACHE_DIR=no_disk)
        fleet.await_workers(*fleet.workers)
        yield fleet


@pytest.mark.timeout(SECONDS + QUIET_SECONDS + 120)
def test_random_faults_break_no_promise(
    seed: int, fleet: Fleet, postgres_server: PostgresServer, redis_server: RedisServer
) -> None:
    """Whatever was killed, frozen or restarted, every acknowledged row is answered once, by a lease holder that was capable."""
    faults = schedule(seed, seconds=SECONDS, nodes=list(fleet.workers), lease_seconds=LEASE_SECONDS)
    told = "\n".join([f"CHAOS_SEED={seed} CHAOS_SECONDS={SECONDS:g}", *(str(fault) for fault in faults)])
    print(told)  # noqa: T201 - shown where the test fails
    users = Users(
        f"http://{LOOPBACK}:{fleet.port}", seed, all_nodes=frozenset(fleet.workers), nodes_with_disk=frozenset(WITH_DISK)
    )
    users.start()
    try:
        _carry_out(faults, Hands(fleet, postgres_server, redis_server))
        fleet.restore()
        users.stop_submitting()
        for job_id in users.acknowledged:
            fleet.calls.wait_final(job_id, timeout=QUIET_SECONDS)
    finally:
        users.stop()
        for server in (postgres_server, redis_server):
            if not server.is_running:
                server.start()
    history = read_history(fleet.database_url)
    assert users.problems == [], told
    assert violations(history, users.acknowledged) == [], told
    succeeded = sum(job["succeeded"] for job in history.jobs)
    total = sum(job["row_count"] for job in history.jobs)
    print(f"{len(history.jobs)} jobs, {total} rows, {succeeded} answered, {len(history.attempts)} attempts")  # noqa: T201
    assert succeeded > total / 2, f"{succeeded} of {total} rows were answered; {told}"


def _carry_out(faults: list[Fault], hands: Hands) -> None:
    """Strike and mend at the scheduled times."""
    steps = [(fault.at, hands.strike, fault) for fault in faults] + [(fault.until, hands.mend, fault) for fault in faults]
    began, pause = time.monotonic(), threading.Event()
    for at, act, fault in sorted(steps, key=lambda step: step[0]):
        pause.wait(max(0.0, at - (time.monotonic() - began)))
        act(fault)
