"""How fast do plans reach workers, how fast is a submission, and how fast does a loss heal?

Private PostgreSQL and Redis, one coordinator and two workers as processes of their own, and a runner that returns at once, so
that what is measured is the dispatch and not a model. Prints figures and judges none.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy

from bench.hardware import hardware
from ollm_service.store.database import upgrade
from tests.e2e.fleet import SCRIPTED, Fleet
from tests.e2e.scripted_jobs import MODEL, rows_of
from tests.e2e.service_calls import ServiceCalls
from tests.servers import LOOPBACK, Blackhole, MissingServer, PostgresServer, RedisServer, refused_port
from tests.waiting import wait_for

DEFAULT_LEASE_SECONDS = 30.0
SUBMITTERS = 4
NODES = ("first", "second")

_FINISHED = "SELECT count(*) FROM runtime_plans WHERE state NOT IN ('queued', 'leased', 'running')"
_DRAIN_SPAN = "SELECT max(finished_ms) - min(started_ms) FROM runtime_plans"
_WAITS = "SELECT a.started_ms - p.created_ms FROM attempts a JOIN runtime_plans p ON p.id = a.plan_id WHERE a.number = 1"
_CLAIMS = "SELECT number, worker_node, started_ms FROM attempts WHERE plan_id = :plan_id ORDER BY number"


class Bench:
    """The servers of one run, and fleets on fresh databases of it."""

    def __init__(self, postgres: PostgresServer, directory: Path) -> None:
        self._postgres, self._directory, self._made = postgres, directory, 0

    @contextmanager
    def fleet(self, broker_url: str, *, workers: bool = True, lease_seconds: float = DEFAULT_LEASE_SECONDS) -> Iterator[Fleet]:
        """A coordinator and, unless told otherwise, two registered workers."""
        self._made += 1
        database_url = self._postgres.create_database()
        upgrade(database_url)
        directory = self._directory / f"fleet-{self._made}"
        with Fleet(
            directory, database_url=database_url, broker_url=broker_url, lease_seconds=lease_seconds, runner=SCRIPTED
        ) as fleet:
            fleet.start_coordinator()
            if workers:
                fleet.start_workers(*NODES)
                warm_up(fleet)
            yield fleet


def warm_up(fleet: Fleet) -> None:
    """Have both workers start their runners."""
    for node in NODES:
        job = fleet.calls.submit(MODEL, rows_of(300, f"warm-{node}"))
        fleet.calls.wait_final(job["id"], timeout=60)


def ask(fleet: Fleet, query: str, **values: Any) -> list[Any]:
    """The rows of one query on the fleet's database."""
    engine = sqlalchemy.create_engine(fleet.database_url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return list(connection.execute(sqlalchemy.text(query), values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def submit_many(fleet: Fleet, count: int) -> None:
    """`count` jobs of one row, that is of one plan, from a few clients at once."""

    def submit_some(share: int) -> None:
        calls = ServiceCalls(f"http://{LOOPBACK}:{fleet.port}")
        for number in range(share, count, SUBMITTERS):
            calls.submit(MODEL, rows_of(1, f"rate-{number}"))
        calls.close()

    with ThreadPoolExecutor(SUBMITTERS) as pool:
        list(pool.map(submit_some, range(SUBMITTERS)))


def plans_per_second(bench: Bench, broker_url: str, plans: int) -> dict[str, float]:
    """End to end: from the first submission to the last end; and of a backlog that waits already: from the first claim on."""
    with bench.fleet(broker_url) as fleet:
        ask_before = ask(fleet, _FINISHED)[0][0]
        began = int(time.time() * 1000)
        submit_many(fleet, plans)
        wait_for(lambda: ask(fleet, _FINISHED)[0][0] >= ask_before + plans, timeout=300, what="every plan to end")
        ended = ask(fleet, "SELECT max(finished_ms) FROM runtime_plans")[0][0]
        end_to_end = plans / (ended - began) * 1000
    with bench.fleet(broker_url, workers=False) as fleet:
        submit_backlog(fleet, plans)
        fleet.start_workers(*NODES)
        wait_for(lambda: ask(fleet, _FINISHED)[0][0] >= plans, timeout=300, what="the backlog to end")
        backlog = plans / ask(fleet, _DRAIN_SPAN)[0][0] * 1000
    return {"plans_per_second": end_to_end, "backlog_plans_per_second": backlog}


def submit_backlog(fleet: Fleet, plans: int) -> None:
    """Submit while one frozen worker makes the model known and takes nothing."""
    witness = fleet.start_worker("witness")
    witness.freeze()
    submit_many(fleet, plans)
    witness.kill()


def claim_waits(bench: Bench, broker_url: str, samples: int, seed: int) -> list[float]:
    """Milliseconds from the commit of a lone plan to its claim by an idle worker, one at a time at random moments."""
    draw, pause = random.Random(seed), threading.Event()
    with bench.fleet(broker_url) as fleet:
        for number in range(samples):
            pause.wait(draw.uniform(0.1, 0.6))
            fleet.calls.wait_final(fleet.calls.submit(MODEL, rows_of(1, f"wait-{number}"))["id"], timeout=30)
        query = f"{_WAITS} AND p.row_count = 1"
        return [float(row[0]) for row in ask(fleet, query)]


def submit_times(bench: Bench, broker_url: str, samples: int) -> list[float]:
    """Milliseconds of each submission of one row, over a connection that is open already."""
    times = []
    with bench.fleet(broker_url) as fleet:
        for number in range(samples):
            began = time.perf_counter()
            fleet.calls.submit(MODEL, rows_of(1, f"submit-{number}"))
            times.append((time.perf_counter() - began) * 1000)
    return times


def recovery(bench: Bench, broker_url: str, hurt: Callable[[Fleet, str], object]) -> float:
    """Seconds from a loss to the next claim of the plan that it hit."""
    with bench.fleet(broker_url) as fleet:
        job = fleet.calls.submit(MODEL, rows_of(200, "recovery", "[slow=0.05]"))
        plan_id = job["plans"][0]["id"]
        plan = fleet.calls.wait_plan(plan_id, {"running"}, timeout=20)
        hurt_at = time.time() * 1000
        hurt(fleet, plan["node"])
        claims = wait_for(lambda: ask(fleet, _CLAIMS, plan_id=plan_id)[1:], timeout=90, what="another claim")
        return float(claims[0].started_ms - hurt_at) / 1000


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure."""
    with tempfile.TemporaryDirectory(prefix="ollm-bench-") as folder, PostgresServer() as postgres, RedisServer() as redis:
        Path(folder).chmod(0o755)
        bench = Bench(postgres, Path(folder))
        figures: dict[str, Any] = plans_per_second(bench, redis.url, arguments.plans)
        figures["hinted_p95_ms"] = percentile(claim_waits(bench, redis.url, arguments.samples, arguments.seed), 95)
        figures["polled_p95_ms"] = percentile(claim_waits(bench, "memory://", arguments.samples, arguments.seed), 95)
        refused = f"redis://{LOOPBACK}:{refused_port()}/0"
        with Blackhole() as hole:
            brokers = {"up": redis.url, "refused": refused, "blackholed": f"redis://{LOOPBACK}:{hole.port}/0"}
            figures["submit_p99_ms"] = {
                name: percentile(submit_times(bench, url, arguments.submissions), 99) for name, url in brokers.items()
            }
        figures["recovery_s"] = {
            "worker_kill": recovery(bench, redis.url, lambda fleet, node: fleet.workers[node].kill()),
            "runner_kill": recovery(bench, redis.url, lambda fleet, node: fleet.workers[node].kill_any_runner()),
        }
    return figures


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def _told(figures: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _told(value, f"{prefix}{name}.")
        else:
            yield f"{prefix + name:28} {value}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plans", type=int, default=1000, help="plans of the throughput measurement")
    parser.add_argument("--samples", type=int, default=40, help="claims that are timed, hinted and polled each")
    parser.add_argument("--submissions", type=int, default=200, help="submissions that are timed for each broker")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    machine = hardware()
    try:
        figures = _rounded({**measure(arguments), "hardware": machine})
    except MissingServer as missing:
        print(f"Not measured: {missing} is not installed. `make servers` installs it.", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(_told(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
