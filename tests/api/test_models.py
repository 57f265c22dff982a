"""How do the fleet's models look over HTTP, and how is one asked for?"""

from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from ollm_service.coordinator.service import Service
from ollm_service.core.retry import Failure
from tests.store.samples import PROFILE, new_lease, new_worker


def test_models_are_listed_with_who_has_them_and_why_some_are_refused(http: TestClient, service: Service) -> None:
    """One entry a name and digest, refused folders with their reason, then the aliases that nobody has."""
    spoilt = replace(PROFILE, name="spoilt", digest="e" * 64, unsafe_because="its weights are pickled")
    alias = replace(PROFILE, name="llama3-1B-chat", digest="f" * 64)
    new_worker(service.store, "attic", models=(PROFILE, spoilt))
    new_worker(service.store, "cellar", models=(PROFILE, alias))
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert (models["tiny"]["usable"], models["tiny"]["nodes"]) == (True, ["attic", "cellar"])
    assert (models["spoilt"]["usable"], models["spoilt"]["unsafe_because"]) == (False, "its weights are pickled")
    assert models["llama3-1B-chat"]["nodes"] == ["cellar"]
    assert (models["llama3-8B-chat"]["nodes"], models["llama3-8B-chat"]["owned_by"]) == ([], "catalog")
    shown = http.get("/v1/models/tiny").json()
    assert models["tiny"].items() <= shown.items()
    assert http.get("/v1/models/org%2Fname").json()["error"]["code"] == "model_not_found"


def test_one_model_is_shown_with_every_digest_and_what_a_plan_needs(http: TestClient, service: Service) -> None:
    """The digest that most workers have comes first; both are there with their holders, and a refused folder with its reason."""
    other = replace(PROFILE, digest="e" * 64)
    spoilt = replace(PROFILE, digest="", unsafe_because="it has no config.json")
    for node, held in (("attic", PROFILE), ("cellar", PROFILE), ("shed", other), ("yard", spoilt)):
        new_worker(service.store, node, models=(held,))
    shown = http.get("/v1/models/tiny").json()
    assert (shown["digest"], shown["nodes"], shown["alias"]) == (PROFILE.digest, ["attic", "cellar"], None)
    assert [(found["digest"][:1], found["nodes"]) for found in shown["variants"]] == [
        *(("d", ["attic", "cellar"]), ("e", ["shed"]), ("", ["yard"])),
    ]
    assert shown["variants"][2]["unsafe_because"] == "it has no config.json"
    assert (shown["profile"]["weight_bytes"], shown["requirements"]["model_digest"]) == (1_000, PROFILE.digest)
    assert (shown["condition"], shown["problem"], shown["plan"]["backend_id"]) == (None, None, "optimized-native")
    pinned = http.get("/v1/models/tiny@sha256:eeeeee").json()
    assert (pinned["digest"], len(pinned["variants"])) == ("e" * 64, 1)
    alias = http.get("/v1/models/llama3-8B-chat").json()
    assert (alias["alias"], alias["profile"], alias["variants"], alias["condition"]) == (
        *("llama3-8B-chat", None, [], "model-not-present"),
    )
    assert alias["requirements"]["download"] == alias["repo_id"]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("path:tiny", "a path on the workers' own disks"),
        ("tiny", "neither an alias nor a repository of the hub"),
        ("org/name@sha256:abcdef", "what a model is, not where it is found"),
        ("../../etc", "not a path inside the models root"),
        ("hf:..", "not a repository id"),
        ("org/name@../../x", "not a repository id"),
    ],
)
def test_what_is_not_on_the_hub_cannot_be_asked_for(http: TestClient, service: Service, model: str, problem: str) -> None:
    """A clear error, and nothing is stored."""
    new_worker(service.store, may_download=True)
    answer = http.post("/v1/models/pull", json={"model": model})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_model_reference")
    assert problem in answer.json()["error"]["message"]
    assert http.get("/v1/downloads").json()["data"] == []


def test_a_model_is_asked_for_where_a_worker_may_fetch_it(http: TestClient, service: Service) -> None:
    """Refused where nobody may; else a download, seen by its id, in the list and with its model. Asking twice changes nothing."""
    new_worker(service.store, "attic")
    refused = http.post("/v1/models/pull", json={"model": "org/name"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert "OLLM_ALLOW_DOWNLOADS" in refused.json()["error"]["remedy"]
    worker = new_worker(service.store, "cellar", may_download=True, downloadable=("org/*", "unsloth/*"))
    assert http.post("/v1/models/pull", json={"model": "other/name"}).status_code == 409
    assert http.post("/v1/models/pull", json={"model": "org/name", "worker": "attic"}).status_code == 409
    assert http.post("/v1/models/pull", json={"model": "org/name", "worker": "nowhere"}).status_code == 404
    asked = http.post("/v1/models/pull", json={"model": "org/name@v1"})
    download = asked.json()["download"]
    assert (asked.status_code, asked.headers["location"]) == (202, f"/v1/downloads/{download['id']}")
    assert (download["model"], download["folder"], download["state"]) == ("org/name@v1", "org--name--v1", "queued")
    assert http.post("/v1/models/pull", json={"model": "org/name@v1"}).json()["download"]["id"] == download["id"]
    lease = new_lease()
    service.store.downloads.claim(worker, "cellar", lease, lambda _: True)
    service.store.downloads.progress(lease, 40, bytes_total=100)
    seen = http.get(f"/v1/downloads/{download['id']}").json()
    assert (seen["state"], seen["node"], seen["bytes_done"], seen["bytes_total"]) == ("running", "cellar", 40, 100)
    (listed,) = [model for model in http.get("/v1/models").json()["data"] if model["owned_by"] == "hub"]
    assert (listed["id"], listed["downloads"]) == ("org/name@v1", [seen])
    assert http.get("/v1/models/org/name@v1").json()["downloads"] == [seen]
    alias = http.post("/v1/models/pull", json={"model": "unsloth/Llama-3.2-1B-Instruct"}).json()["download"]
    assert (alias["folder"], alias["model"]) == ("llama3-1B-chat", "unsloth/Llama-3.2-1B-Instruct")
    assert [found["id"] for found in http.get("/v1/downloads").json()["data"]] == [alias["id"], download["id"]]
    assert http.get("/v1/downloads", params={"model": "org/name@v1"}).json()["data"] == [seen]
    assert http.get("/v1/downloads/dl_nothing").status_code == 404


def test_what_is_there_is_not_fetched_again(http: TestClient, service: Service) -> None:
    """The answer names who has it; another worker may still be asked to fetch it."""
    held = replace(PROFILE, name="org--name")
    new_worker(service.store, "attic", models=(held,), may_download=True)
    new_worker(service.store, "cellar", models=(), may_download=True)
    there = http.post("/v1/models/pull", json={"model": "org/name"})
    assert (there.status_code, there.json()["held_by"], there.json()["download"]) == (200, ["attic"], None)
    assert http.post("/v1/models/pull", json={"model": "org/name", "worker": "attic"}).status_code == 200
    asked = http.post("/v1/models/pull", json={"model": "org/name", "worker": "cellar"}).json()["download"]
    assert (asked["target"], asked["state"]) == ("cellar", "queued")


def test_a_job_says_how_far_its_model_is(http: TestClient, service: Service) -> None:
    """While it is fetched, and why it could not be."""
    worker = new_worker(service.store, "attic", may_download=True)
    job = http.post("/v1/jobs", json={"model": "org/name", "rows": [{"prompt": "a"}]}).json()
    assert (job["plans"][0]["condition"], job["downloads"]) == ("model-not-present", [])
    http.post("/v1/models/pull", json={"model": "org/name"})
    assert http.get(f"/v1/jobs/{job['id']}").json()["downloads"][0]["state"] == "queued"
    lease = new_lease()
    service.store.downloads.claim(worker, "attic", lease, lambda _: True)
    gated = Failure(code="gated", message="set HF_TOKEN on the worker", is_permanent=True)
    service.store.downloads.fail(lease, gated)
    (download,) = http.get(f"/v1/jobs/{job['id']}").json()["downloads"]
    assert (download["state"], download["reason"], download["node"]) == ("failed", "set HF_TOKEN on the worker", "attic")
