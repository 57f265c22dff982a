"""What does a test of the API find? The app on a real service, and a client that speaks HTTP to it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ollm_service.api.app import create_app
from ollm_service.coordinator.service import Service
from ollm_service.store.schema import upgrade
from tests.coordinator.services import open_service
from tests.store.samples import new_worker

LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing else; copied for each test."""
    path = tmp_path_factory.mktemp("api") / "ollm.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def url(migrated_file: Path, tmp_path: Path) -> str:
    """The URL of an empty SQLite database."""
    path = tmp_path / "ollm.db"
    shutil.copy(migrated_file, path)
    return f"sqlite:///{path}"


@pytest.fixture
def service(url: str, tmp_path: Path) -> Iterator[Service]:
    """A coordinator on SQLite, without loops."""
    opened = open_service(url, tmp_path, max_body_bytes=4096)
    yield opened
    opened.close()


@pytest.fixture
def http(service: Service) -> TestClient:
    """A client of the service, which has no API keys."""
    return TestClient(create_app(service), base_url=LOCAL)


@pytest.fixture
def worker_id(service: Service) -> str:
    """A worker that has the model `tiny`."""
    return new_worker(service.store, "attic")
