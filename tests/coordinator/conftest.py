"""What does a test of the coordinator find? A service on SQLite, or on both databases where SQL is what is tested."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.coordinator.service import Service
from ollm_service.store.schema import upgrade
from tests.coordinator.services import open_service


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing else; copied for each test."""
    path = tmp_path_factory.mktemp("coordinator") / "ollm.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def service(migrated_file: Path, tmp_path: Path) -> Iterator[Service]:
    """A coordinator on SQLite, without loops."""
    path = tmp_path / "ollm.db"
    shutil.copy(migrated_file, path)
    opened = open_service(f"sqlite:///{path}", tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def service_on_both(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """A coordinator on SQLite, and once more on PostgreSQL; its leases last 50 ms."""
    upgrade(database_url)
    opened = open_service(database_url, tmp_path, lease_ms=50)
    yield opened
    opened.close()
