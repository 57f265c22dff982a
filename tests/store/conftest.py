"""What does a store test find? An empty database with the real schema and a store on it, on SQLite and on PostgreSQL."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.store.database import Store, open_database
from ollm_service.store.schema import upgrade
from tests.servers import PostgresServer

LEASE_MS = 30_000


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing else; copied for each test."""
    path = tmp_path_factory.mktemp("template") / "ollm.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: PostgresServer) -> str:
    """The URL of a PostgreSQL database with the schema and nothing else; a template for each test's own."""
    url = postgres_server.create_database()
    upgrade(url)
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database of this test's own, with the real schema."""
    if request.param == "sqlite":
        copy = tmp_path / "ollm.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), copy)
        yield f"sqlite:///{copy}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.create_database(template=request.getfixturevalue("migrated_postgres"))
    yield url
    server.drop_database(url)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A store whose leases last 30 s, and whose retries are due at once."""
    opened = open_database(store_url, lease_ms=LEASE_MS, draw=lambda: 0.0)
    yield opened
    opened.close()
