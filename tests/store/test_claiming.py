"""Which plan does a worker get, and which not?"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.dialects import postgresql, sqlite

from ollm_service.core.leasing import Released
from ollm_service.core.lifecycle import ExecutionState
from ollm_service.core.plan import PLAN_SCHEMA_VERSION
from ollm_service.store.claiming import best_classes, top_of_class
from ollm_service.store.database import Store
from ollm_service.store.engine import connect, parse_url
from tests.store.ageing import let_time_pass
from tests.store.samples import claim, class_of, must_claim, new_job, new_lease, new_worker, plan_of, plans_of


def test_priority_goes_first_and_age_second(store: Store) -> None:
    """Across classes, too: the best plan of all classes that the worker satisfies."""
    old, young = new_job(tag="a"), new_job(tag="b")
    urgent = new_job(tag="b", priority=5)
    for job in (old, young, urgent):
        store.jobs.submit(job)
    worker = new_worker(store)
    order = [must_claim(store, worker, "a", "b").job_id for _ in range(3)]
    assert order[0] == urgent.job_id
    assert set(order[1:]) == {old.job_id, young.job_id}
    if plan_of(store, old).created_ms < plan_of(store, young).created_ms:
        assert order[1] == old.job_id


def test_plans_of_a_job_go_in_order(store: Store) -> None:
    """Equal priority and age: by number."""
    job, worker = new_job(1, 1, 1), new_worker(store)
    store.jobs.submit(job)
    assert [must_claim(store, worker).rows[0].row for _ in range(3)] == [0, 1, 2]


def test_only_the_named_classes_are_claimed(store: Store) -> None:
    """A worker gets nothing from a class that it did not name."""
    store.jobs.submit(new_job(tag="a"))
    worker = new_worker(store)
    assert claim(store, worker, "b") is None
    assert store.leases.claim(worker, new_lease(), []) is None
    assert claim(store, worker, "b", "a") is not None


def test_more_classes_than_one_query_takes(store: Store) -> None:
    """A worker may satisfy hundreds of classes."""
    store.jobs.submit(new_job(tag="499"))
    worker = new_worker(store)
    assert must_claim(store, worker, *(str(number) for number in range(700))).class_id == class_of("499")


@pytest.mark.parametrize("become", ["unknown", "draining", "gone"])
def test_only_an_active_worker_claims(store: Store, become: str) -> None:
    """Unknown, draining and retired workers get nothing."""
    store.jobs.submit(new_job())
    worker = new_worker(store)
    if become == "unknown":
        worker = "wkr_nobody"
    elif become == "draining":
        assert store.fleet.drain("north") == 1
    else:
        store.leases.retire(worker)
    assert claim(store, worker) is None


def test_a_decline_keeps_its_node_away_for_a_while(store: Store, store_url: str) -> None:
    """The declining node is excluded in the same transaction, others are not; when the time is over it may claim again."""
    job, north, south = new_job(), new_worker(store, "north"), new_worker(store, "south")
    store.jobs.submit(job)
    work = must_claim(store, north)
    assert store.leases.release(work.lease_id, reason="no room", decline_ms=15_000) == Released(state="queued")
    assert claim(store, north) is None
    assert claim(store, new_worker(store, "north")) is None, "the node is excluded, not the process"
    work = must_claim(store, south)
    store.leases.release(work.lease_id, reason="draining")
    let_time_pass(store_url, 15_001)
    assert claim(store, north) is not None
    assert plan_of(store, job).declines == 1


def test_a_lost_reply_is_found_by_its_lease(store: Store) -> None:
    """Who does not know whether its claim committed asks by lease, and finds the same work."""
    store.jobs.submit(new_job(3))
    lease, worker = new_lease(), new_worker(store)
    work = store.leases.claim(worker, lease, [class_of()])
    assert store.leases.claimed(lease) == work
    assert store.leases.claimed(new_lease()) is None


def test_a_lease_is_good_for_one_claim(store: Store) -> None:
    """A lease id cannot hold two plans, whether the first is still held or not."""
    store.jobs.submit(new_job(1, 1, 1))
    lease, worker = new_lease(), new_worker(store)
    first = store.leases.claim(worker, lease, [class_of()])
    assert store.leases.claim(worker, lease, [class_of()]) == first
    store.leases.release(lease, reason="done")
    with pytest.raises(ValueError, match="used before"):
        store.leases.claim(worker, lease, [class_of()])


def test_claimers_in_a_race_never_share_a_plan(store: Store) -> None:
    """Eight workers at once empty a queue of forty plans; each plan is leased exactly once."""
    job = new_job(*[1] * 40)
    store.jobs.submit(job)
    crowd = [new_worker(store, f"node{number}") for number in range(8)]
    gate = threading.Barrier(len(crowd))

    def claim_all(worker: str) -> list[str]:
        gate.wait()
        taken = []
        while (work := claim(store, worker)) is not None:
            taken.append(work.plan_id)
        return taken

    with ThreadPoolExecutor(len(crowd)) as pool:
        taken = [plan_id for plans in pool.map(claim_all, crowd) for plan_id in plans]
    assert sorted(taken) == sorted(plan.plan_id for plan in plans_of(store, job))
    assert {plan.attempt for plan in plans_of(store, job)} == {1}


def _fill(url: str, count: int) -> Engine:
    """Queue copies of the one plan that is there, all in its class, and as many in another."""
    engine = connect(parse_url(url))
    with engine.begin() as connection:
        columns = [row[0] for row in connection.execute(text("SELECT * FROM runtime_plans LIMIT 1")).cursor.description]
        changed = {"id": "id || '-' || n", "number": "n", "class_id": "CASE WHEN n % 2 = 0 THEN class_id ELSE 'other' END"}
        changed |= {"priority": "n % 3", "created_ms": "created_ms + n"}
        numbers = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < :count) "
        source = ", ".join(changed.get(name, name) for name in columns)
        connection.execute(
            text(f"INSERT INTO runtime_plans ({', '.join(columns)}) {numbers} SELECT {source} FROM runtime_plans, t"),
            {"count": count},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return engine


@pytest.mark.parametrize("count", [100, 10_000])
def test_a_claim_reads_the_top_of_an_index(store: Store, store_url: str, count: int) -> None:
    """However many plans wait, a claim walks the claim index from its top and sorts nothing."""
    store.jobs.submit(new_job())
    engine = _fill(store_url, count)
    is_sqlite = engine.dialect.name == "sqlite"
    dialect = sqlite.dialect() if is_sqlite else postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    worker = new_worker(store)
    query = top_of_class("name").params(name=class_of(), worker=worker).with_for_update(skip_locked=True, key_share=True)
    compiled = str(query.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    with engine.connect() as connection:
        lines = [
            str(tuple(row)) for row in connection.execute(text(("EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ") + compiled))
        ]
        plan = "\n".join(lines)
        assert "ix_runtime_plans_claim" in plan, plan
        assert "Sort" not in plan, plan
        assert "TEMP B-TREE" not in plan, plan
        assert best_classes(connection, [class_of()], worker) == [class_of()]
    engine.dispose()
    assert claim(store, new_worker(store)) is not None


def test_a_plan_of_a_warm_class_starts_with_its_claim(store: Store) -> None:
    """Where nothing has to be loaded one transaction claims and starts; the history tells both, a second start is harmless."""
    warm, cold = new_job(tag="warm"), new_job(tag="cold")
    worker = new_worker(store)
    for job, is_warm in ((warm, True), (cold, False)):
        store.jobs.submit(job)
        tag = "warm" if is_warm else "cold"
        work = store.leases.claim(worker, new_lease(), [class_of(tag)], warm=[class_of("warm")])
        assert work is not None
        assert work.is_started == is_warm
        plan = plan_of(store, job)
        assert plan.state == ("running" if is_warm else "leased")
        assert (plan.started_ms is not None) == is_warm
        assert store.leases.start(work.lease_id)
    detail = store.jobs.plan(plan_of(store, warm).plan_id, "default")
    steps = [(event.kind, event.to_state) for event in detail.events]
    assert steps == [("submit", "queued"), ("claim", "leased"), ("start", "running")]


def _change(url: str, statement: str, **values: object) -> None:
    """Write what no release of ours writes."""
    engine = connect(parse_url(url))
    with engine.begin() as connection:
        assert connection.execute(text(statement), values).rowcount == 1
    engine.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runtime_plans SET planned = '{' WHERE id = :plan",
        "UPDATE runtime_plans SET profile = '[]' WHERE id = :plan",
        "UPDATE runtime_plans SET config = '{\"priority\"' WHERE id = :plan",
        "UPDATE runtime_plans SET lone_crashes = 'x' WHERE id = :plan",
        "UPDATE job_rows SET request = '7' WHERE plan_id = :plan",
    ],
)
def test_a_plan_that_cannot_be_read_fails_and_the_next_one_runs(store: Store, store_url: str, statement: str) -> None:
    """It would stop every worker that looks at it; its rows get the error, and the history says what happened."""
    spoilt, sound = new_job(1, priority=1), new_job(1)
    store.jobs.submit(spoilt)
    store.jobs.submit(sound)
    plan_id = spoilt.plans[0].plan_id
    _change(store_url, statement, plan=plan_id)
    lease, worker = new_lease(), new_worker(store)
    work = store.leases.claim(worker, lease, [class_of()])
    assert work is not None
    assert (work.job_id, work.lease_id, work.attempt) == (sound.job_id, lease, 1)
    assert store.leases.claimed(lease) == work
    job = store.jobs.get(spoilt.job_id, "default")
    assert (job.state, job.failed, job.pending) == ("failed", 1, 0)
    claimed, failed = store.events.page("default", plan_id=plan_id)[1:]
    assert [claimed.kind, failed.kind, failed.to_state] == ["claim", "fail", ExecutionState.FAILED]
    assert "cannot be read" in (failed.reason or "")


def test_a_plan_of_a_newer_release_waits_for_a_newer_worker(store: Store, store_url: str) -> None:
    """Its schema version is kept beside it, and who does not know that version leaves it alone."""
    job = new_job()
    store.jobs.submit(job)
    newer = f"UPDATE runtime_plans SET schema_version = {PLAN_SCHEMA_VERSION} + 1 WHERE schema_version = {PLAN_SCHEMA_VERSION}"
    _change(store_url, newer)
    assert claim(store, new_worker(store)) is None
    assert plan_of(store, job).state == "queued"
