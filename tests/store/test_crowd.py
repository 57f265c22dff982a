"""Do many workers, a reaper and a user who cancels get in each other's way?"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from ollm_service.core.retry import Failure
from ollm_service.store.database import Store
from tests.store.samples import LIVE, TENANT, answers, claim, new_job, new_worker, plans_of

CROWD = 6


def test_a_crowd_answers_every_row_once(store: Store) -> None:
    """Workers record, fail, crash, decline and renew while jobs are cancelled and reaped: no deadlock, nothing lost."""
    jobs = [new_job(*[3] * 8) for _ in range(4)]
    for job in jobs:
        store.jobs.submit(job)
    done = threading.Event()

    def work(number: int) -> None:
        draw = random.Random(number)
        node = 0
        worker = new_worker(store, f"n{number}-{node}")
        while any(not store.jobs.get(job.job_id, TENANT).state.is_final for job in jobs):
            assignment = claim(store, worker)
            if assignment is None:  # excluded from what is left: another node comes
                node += 1
                worker = new_worker(store, f"n{number}-{node}")
                continue
            lease, rows = assignment.lease_id, [row.row for row in assignment.rows]
            store.leases.start(lease)
            store.leases.heartbeat(worker, LIVE, [lease], 1)
            store.leases.record(lease, answers(*rows[: draw.randint(0, len(rows))]))
            match draw.randrange(4):
                case 0:
                    store.leases.fail(lease, Failure(code="x", message="y"))
                case 1:
                    store.leases.crash(lease, rows[-2:], "signal 11")
                case 2:
                    store.leases.release(lease, reason="no room", decline_ms=60_000)
                case _:
                    store.leases.record(lease, answers(*rows))

    def coordinate() -> None:
        while not done.is_set():
            store.leases.reap()
            store.leases.expire()
            store.jobs.refresh_conditions(plans_of(store, jobs[0])[0].class_id, ["n0-0"])

    with ThreadPoolExecutor(CROWD + 2) as pool:
        upkeep = pool.submit(coordinate)
        workers = [pool.submit(work, number) for number in range(CROWD)]
        store.jobs.cancel(jobs[-1].job_id, TENANT)
        for future in workers:
            future.result(timeout=90)
        done.set()
        upkeep.result(timeout=10)
    for job in jobs:
        view = store.jobs.get(job.job_id, TENANT)
        results = store.results.page(job.job_id, TENANT)
        assert view.pending == 0
        assert [result.cursor for result in results] == list(range(1, 25))
        assert {result.row for result in results} == set(range(24))
        assert all(plan.attempt >= 0 and plan.state.is_final for plan in plans_of(store, job))
