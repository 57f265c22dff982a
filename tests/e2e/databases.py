"""Which databases do tests of whole fleets start from? Copies of one that the migrations have made."""

from collections.abc import Iterator

import pytest

from ollm_service.store.database import upgrade
from tests.servers import PostgresServer


@pytest.fixture(scope="session")
def migrated_database(postgres_server: PostgresServer) -> str:
    """A PostgreSQL database with the newest schema and nothing in it, to be copied and never used."""
    url = postgres_server.create_database()
    upgrade(url)
    return url


@pytest.fixture(scope="module")
def fleet_database(postgres_server: PostgresServer, migrated_database: str) -> Iterator[str]:
    """An empty database with the newest schema for the tests of one module."""
    url = postgres_server.create_database(template=migrated_database)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def migrated_copy(postgres_server: PostgresServer, migrated_database: str) -> Iterator[str]:
    """An empty database with the newest schema for one test."""
    url = postgres_server.create_database(template=migrated_database)
    yield url
    postgres_server.drop_database(url)
