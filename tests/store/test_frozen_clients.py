"""Can a process that freezes in the middle of a write hold its locks for ever?"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from ollm_service.store.database import Store
from ollm_service.store.engine import Database, parse_url
from tests.servers import PostgresServer
from tests.store.samples import answers, class_of, new_job, new_lease, new_worker


@pytest.fixture
def postgres_url(migrated_postgres: str, postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated PostgreSQL database."""
    url = postgres_server.create_database(template=migrated_postgres)
    yield url
    postgres_server.drop_database(url)


def test_no_statement_is_sent_in_pieces(postgres_url: str) -> None:
    """No write waits for more of a statement: the server ends a transaction that is idle, but not one in mid-statement.

    psycopg sends the same statement with many parameters as a pipeline. A client that stops in its middle looks busy to the
    server, for which no timeout of PostgreSQL 15 applies, and whoever needs its locks waits for as long as it is stopped.
    """
    database = Database(parse_url(postgres_url))
    pipelined: list[str] = []

    @event.listens_for(database.engine, "do_executemany")
    def _note(_cursor: Any, statement: str, *_: Any) -> None:
        pipelined.append(statement)

    store = Store(database, lease_ms=30_000, draw=lambda: 0.5)
    try:
        store.jobs.submit(new_job(40, 40))
        worker = new_worker(store)
        work = store.leases.claim(worker, new_lease(), [class_of()], warm=[class_of()])
        assert work is not None
        store.leases.record(work.lease_id, answers(*(row.row for row in work.rows[:30])))
        store.jobs.cancel(work.job_id, "default")
        store.leases.release(work.lease_id, reason="drain")
    finally:
        store.close()
    assert pipelined == []
