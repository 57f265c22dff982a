"""What does a test of the client find? A real service on a real port, a worker that it knows, and a client of it."""

from collections.abc import Iterator

import pytest

from ollm_service.client import Client
from tests.client.live import LiveService
from tests.service_fixtures import live, migrated_file, service, worker_id

__all__ = ["live", "migrated_file", "service", "worker_id"]  # fixtures


@pytest.fixture
def client(live: LiveService) -> Iterator[Client]:
    """A client of the live service."""
    with Client(live.url) as opened:
        yield opened
