"""How does the fleet look over HTTP, and how is a node drained?"""

from starlette.testclient import TestClient

from ollm_service.coordinator.service import Service
from tests.store.samples import new_worker


def test_a_worker_shows_what_it_offers_and_has_free(http: TestClient, worker_id: str) -> None:
    """Capabilities with reasons for what it lacks, and live bytes."""
    (worker,) = http.get("/v1/workers").json()["data"]
    assert (worker["id"], worker["node"], worker["state"], worker["slots"], worker["running"]) == (
        worker_id,
        "attic",
        "active",
        1,
        0,
    )
    assert worker["capabilities"]["passes"]["disk-cache"] == "no writable cache directory"
    assert worker["live"]["host_free_bytes"] == 10**9
    assert worker["heartbeat_age_seconds"] >= 0


def test_a_node_is_drained_by_name_or_worker_id(http: TestClient, service: Service, worker_id: str) -> None:
    """A draining worker is still listed, one that has left only when asked for; an unknown name is 404."""
    other = new_worker(service.store, "cellar")
    assert http.post("/v1/workers/attic/drain").json() == {"object": "drain", "node": "attic", "workers": 1}
    assert http.post(f"/v1/workers/{other}/drain").json()["workers"] == 1
    assert {worker["state"] for worker in http.get("/v1/workers").json()["data"]} == {"draining"}
    service.store.leases.retire(other)
    assert [worker["id"] for worker in http.get("/v1/workers").json()["data"]] == [worker_id]
    assert len(http.get("/v1/workers", params={"gone": True}).json()["data"]) == 2
    missing = http.post("/v1/workers/nowhere/drain")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_readiness_names_database_and_broker(http: TestClient) -> None:
    """Without a broker, hints are none and polling does the work."""
    assert http.get("/readyz").json() == {"status": "ok", "database": "up", "broker": "none"}
    assert http.get("/healthz").json()["status"] == "ok"
