"""What happens when the database goes away in the middle, and nobody knows whether the COMMIT was done?"""

import traceback
from collections.abc import Iterator

import pytest
from sqlalchemy import event, text

from ollm_service.core.errors import DatabaseUnavailable
from ollm_service.core.leasing import Recorded, Released
from ollm_service.core.retry import Failure
from ollm_service.store.database import Store, open_database
from ollm_service.store.engine import TRIES, Database, parse_url
from ollm_service.store.schema import upgrade
from tests.servers import PostgresServer
from tests.store.cut_proxy import Cut, CutProxy
from tests.store.samples import LIVE, TENANT, answers, class_of, must_claim, new_job, new_lease, new_worker, plan_of
from tests.waiting import wait_for

BOTH = pytest.mark.parametrize("cut", ["before", "after"])


@pytest.fixture
def postgres_url(migrated_postgres: str, postgres_server: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database of this test's own, with the real schema."""
    url = postgres_server.create_database(template=migrated_postgres)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[CutProxy]:
    """What stands between the store and its database."""
    with CutProxy(postgres_server.port) as between:
        yield between


@pytest.fixture
def store(postgres_url: str, proxy: CutProxy, postgres_server: PostgresServer) -> Iterator[Store]:
    """A store whose connection can be cut."""
    opened = open_database(postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/"), draw=lambda: 0.0)
    yield opened
    opened.close()


@BOTH
def test_a_submission_is_stored_once(store: Store, proxy: CutProxy, cut: Cut) -> None:
    """Whether its COMMIT was done or not, the caller gets its job, as new."""
    job = new_job(2)
    proxy.cut(cut)
    view, created = store.jobs.submit(job)
    assert (created, view.pending, proxy.is_done) == (True, 2, True)
    assert [event.kind for event in store.events.page(TENANT)] == ["submit"]


@BOTH
def test_a_claim_takes_one_plan(store: Store, proxy: CutProxy, cut: Cut) -> None:
    """The store asks by lease before it claims again, so that no second plan is taken and none is forgotten."""
    store.jobs.submit(new_job(1, 1))
    worker, lease = new_worker(store), new_lease()
    proxy.cut(cut)
    work = store.leases.claim(worker, lease, [class_of()])
    assert work is not None
    assert (work.attempt, work.lease_id, proxy.is_done) == (1, lease, True)
    assert store.leases.claimed(lease) == work
    assert [(item.queued) for item in store.fleet.backlog()] == [1]


@BOTH
def test_results_are_recorded_once(store: Store, proxy: CutProxy, cut: Cut) -> None:
    """In the middle and at the end of a plan."""
    job = new_job(2)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    for row in range(2):
        proxy.cut(cut)
        recorded = store.leases.record(lease, answers(row))
        assert isinstance(recorded, Recorded)
        assert (recorded.is_finished, proxy.is_done) == (row == 1, True)
    view = store.jobs.get(job.job_id, TENANT)
    assert (view.succeeded, view.completion_tokens, view.state) == (2, 4, "succeeded")
    assert [result.cursor for result in store.results.page(job.job_id, TENANT)] == [1, 2]


@BOTH
def test_handing_back_counts_once(store: Store, proxy: CutProxy, cut: Cut) -> None:
    """A failure, a decline and a crash are counted once each, and the holder hears what became of the plan."""
    job = new_job(4)
    store.jobs.submit(job)
    proxy.cut()
    lease = must_claim(store, new_worker(store, "a")).lease_id
    proxy.cut(cut)
    assert store.leases.fail(lease, Failure(code="x", message="y")) == Released(state="queued")
    lease = must_claim(store, new_worker(store, "b")).lease_id
    proxy.cut(cut)
    assert store.leases.release(lease, reason="no room", decline_ms=60_000) == Released(state="queued")
    lease = must_claim(store, new_worker(store, "c")).lease_id
    proxy.cut(cut)
    assert store.leases.crash(lease, [0, 1, 2, 3], "signal 11") == Released(state="queued")
    plan = plan_of(store, job)
    assert (plan.failures, plan.declines, plan.attempt) == (1, 1, 3)
    assert must_claim(store, new_worker(store, "d")).micro_batch_limit == 2


@BOTH
def test_start_renew_and_cancel_may_be_repeated(store: Store, proxy: CutProxy, cut: Cut) -> None:
    """They say the same the second time."""
    job = new_job(2)
    store.jobs.submit(job)
    worker = new_worker(store)
    lease = must_claim(store, worker).lease_id
    proxy.cut(cut)
    assert store.leases.start(lease)
    proxy.cut(cut)
    store.jobs.cancel(job.job_id, TENANT)
    proxy.cut(cut)
    renewal = store.leases.heartbeat(worker, LIVE, [lease], 1)
    assert (set(renewal.held), set(renewal.cancelled), proxy.is_done) == ({lease}, {lease}, True)


def test_a_store_that_gives_up_leaves_the_answer_to_the_lease(store: Store, proxy: CutProxy) -> None:
    """When every try is cut the verb raises; later the holder asks by lease and finds its work."""
    store.jobs.submit(new_job(1))
    worker, lease = new_worker(store), new_lease()
    again: list[Cut] = ["before"] * TRIES
    proxy.cut("after", *again)
    with pytest.raises(DatabaseUnavailable):
        store.leases.claim(worker, lease, [class_of()])
    proxy.cut()
    assert store.leases.claimed(lease) is not None


def test_a_partition_frees_its_locks(store: Store, proxy: CutProxy) -> None:
    """A server that does not learn of the broken connection ends its transaction by itself, before the second try gives up."""
    job = new_job(1)
    store.jobs.submit(job)
    lease = must_claim(store, new_worker(store)).lease_id
    proxy.cut("partition")
    assert store.leases.record(lease, answers(0)) == Recorded(inserted=1, is_finished=True)
    assert proxy.is_done


def test_a_restarted_database_is_found_again() -> None:
    """Its clients reconnect by themselves; what was acknowledged is there, even when it was killed."""
    with PostgresServer(fsync=False) as server:
        url = server.create_database()
        from_scratch = _migrated(url)
        job = new_job(2)
        from_scratch.jobs.submit(job)
        lease = must_claim(from_scratch, new_worker(from_scratch)).lease_id
        server.kill()
        with pytest.raises(DatabaseUnavailable):
            from_scratch.ping()
        server.start()
        wait_for(lambda: _answers(from_scratch), timeout=20, what="the database to answer again")
        assert from_scratch.leases.record(lease, answers(0, 1)) == Recorded(inserted=2, is_finished=True)
        from_scratch.close()


def _migrated(url: str) -> Store:
    upgrade(url)
    return open_database(url)


def _answers(store: Store) -> bool:
    try:
        store.ping()
    except DatabaseUnavailable:
        return False
    return True


def test_a_full_disk_is_an_outage_that_shows_no_prompt(store_url: str) -> None:
    """Writing says that the database is unavailable; no error text on the way holds what was to be written."""
    database = Database(parse_url(store_url))
    secret = "nobody should read this " * 1_000
    if database.is_sqlite:
        event.listen(database.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
        fill = text("UPDATE counters SET name = name || :text")
    else:
        full = "BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END"
        function = f"CREATE FUNCTION fill(text) RETURNS int LANGUAGE plpgsql AS $$ {full} $$"
        database.write(lambda connection: connection.execute(text(function)))
        fill = text("SELECT fill(:text)")
    with pytest.raises(DatabaseUnavailable, match=r"full|extend") as raised:
        database.write(lambda connection: connection.execute(fill, {"text": secret}))
    database.close()
    told = "".join(traceback.format_exception(raised.value))
    assert "[SQL" in told, "the failed statement is told"
    assert secret[:20] not in told
