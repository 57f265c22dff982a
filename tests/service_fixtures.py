"""What do tests of the coordinator, the client and the command line share? A service on SQLite, a port for it, and a worker."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollm_service.coordinator.service import Service
from ollm_service.store.schema import upgrade
from tests.client.live import LiveService
from tests.coordinator.services import open_service
from tests.store.samples import new_worker


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing else; copied for each test."""
    path = tmp_path_factory.mktemp("schema") / "ollm.db"
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
def live(service: Service) -> Iterator[LiveService]:
    """The service on a port."""
    with LiveService(service) as started:
        yield started


@pytest.fixture
def worker_id(service: Service) -> str:
    """A worker that has the model `tiny`."""
    return new_worker(service.store, "attic")
