"""What does a caller see while the database is away, and does everything go on when it is back?"""

import logging
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ollm_service.api.app import create_app
from ollm_service.coordinator.upkeep import Upkeep
from ollm_service.store.schema import upgrade
from tests.coordinator.services import ROWS, open_service
from tests.servers import PostgresServer
from tests.store.samples import new_worker
from tests.waiting import wait_for


def test_an_outage_is_a_503_and_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The envelope says when to try again and names no server; the loops and the next requests go on as if nothing was."""
    with PostgresServer(fsync=False) as server, caplog.at_level(logging.INFO):
        url = server.create_database()
        upgrade(url)
        service = open_service(url, tmp_path)
        new_worker(service.store)
        http = TestClient(create_app(service), base_url="http://127.0.0.1")
        upkeep = Upkeep(service, reap_seconds=0.05, sweep_seconds=0.05)
        upkeep.start()
        job = http.post("/v1/jobs", json={"model": "tiny", "rows": ROWS}).json()
        server.kill()

        refused = http.get(f"/v1/jobs/{job['id']}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert str(server.port) not in refused.text
        assert (http.get("/readyz").status_code, http.get("/healthz").status_code) == (503, 200)
        assert http.get(f"/v1/jobs/{job['id']}/results").status_code == 503
        wait_for(lambda: _told(caplog, "database-down") == {"reap", "sweep"}, timeout=30, what="both loops to notice")

        server.start()
        wait_for(lambda: http.get("/readyz").status_code == 200, timeout=30, what="readiness")
        assert http.get(f"/v1/jobs/{job['id']}").json()["counts"] == job["counts"]
        wait_for(lambda: _told(caplog, "database-up") == {"reap", "sweep"}, timeout=30, what="both loops to go on")
        upkeep.stop()
        service.close()


def _told(caplog: pytest.LogCaptureFixture, event: str) -> set[str]:
    """The loops that have logged the event."""
    return {record.__dict__["loop"] for record in caplog.records if record.getMessage() == event}
