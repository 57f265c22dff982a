"""What does a test of the coordinator find? A service on SQLite, or on both databases where SQL is what is tested."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.coordinator.service import Service
from ollm_service.store.schema import upgrade
from tests.coordinator.services import open_service
from tests.service_fixtures import migrated_file, service

__all__ = ["migrated_file", "service"]  # fixtures


@pytest.fixture
def service_on_both(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """A coordinator on SQLite, and once more on PostgreSQL; its leases last 50 ms."""
    upgrade(database_url)
    opened = open_service(database_url, tmp_path, lease_ms=50)
    yield opened
    opened.close()
