"""Is a model that nobody has fetched, offered and run, whatever breaks in between? Real processes and a hub on loopback."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ollm_service.store.database import upgrade
from tests.doubles.hub import Hub
from tests.e2e.fleet import DEMO_MODELS, SCRIPTED, Fleet
from tests.e2e.scripted_jobs import MODEL
from tests.unit.model_folders import TENSORS, make_model
from tests.waiting import wait_for

SECONDS = 60
SECRET = "hf_very_secret_token"
CHUNK_BYTES = 10 * 1024**2
LARGE = {**TENSORS, "model.layers.0.mlp.up_proj.weight": ("F32", (4, CHUNK_BYTES // 4))}
ALLOWED = {"OLLM_ALLOW_DOWNLOADS": "true"}
ROWS = [{"custom_id": "a", "prompt": "say it"}]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    with Hub() as started:
        yield started


@pytest.fixture
def make_fleet(tmp_path: Path, hub: Hub) -> Iterator[Callable[..., Fleet]]:
    """Fleets whose workers find the hub and an empty models root: on SQLite, with scripted runners, unless told otherwise."""
    made: list[Fleet] = []

    def make(*, runner: str | None = SCRIPTED, url: str = f"sqlite:///{tmp_path}/ollm.db") -> Fleet:
        upgrade(url)
        (tmp_path / "models").mkdir()
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        fleet = Fleet(
            tmp_path,
            database_url=url,
            broker_url="memory://",
            models_dir=tmp_path / "models",
            lease_seconds=2,
            runner=runner,
            settings=settings,
        )
        made.append(fleet)
        fleet.start_coordinator()
        return fleet

    yield make
    for fleet in made:
        fleet.close()


def downloads(fleet: Fleet) -> list[dict[str, Any]]:
    """Every download, the newest first."""
    found: list[dict[str, Any]] = fleet.calls.get("/v1/downloads").json()["data"]
    return found


def wait_ended(fleet: Fleet, count: int = 1) -> list[dict[str, Any]]:
    """The downloads, once so many have ended."""

    def ended() -> list[dict[str, Any]]:
        found = [download for download in downloads(fleet) if download["state"] in ("done", "failed")]
        return found if len(found) >= count else []

    return wait_for(ended, timeout=SECONDS, what=f"{count} downloads to end")


def history(fleet: Fleet, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a job's only plan."""
    events: list[dict[str, Any]] = fleet.calls.plan(job["plans"][0]["id"])["events"]
    return events


def wait_event(fleet: Fleet, job: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first event of this kind in a job's history, once there is one."""
    return wait_for(
        lambda: next((event for event in history(fleet, job) if event["kind"] == kind), None), timeout=SECONDS, what=kind
    )


def test_a_job_for_a_model_that_nobody_has_is_answered(make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path) -> None:
    """It waits, one worker fetches the model, the plan is made anew with an event that says so, and the real model answers."""
    hub.add("org/sums", DEMO_MODELS / MODEL)
    fleet = make_fleet(runner=None)
    job = fleet.calls.submit("org/sums", [{"prompt": "12+30="}], generation={"max_new_tokens": 8})
    assert (job["plans"][0]["condition"], job["downloads"]) == ("model-not-present", [])
    fleet.start_worker("attic", **ALLOWED)
    ended = fleet.calls.wait_final(job["id"], timeout=SECONDS)
    assert ended["counts"]["succeeded"] == 1
    assert "42" in fleet.calls.results(job["id"])[0]["text"]
    (download,) = downloads(fleet)
    assert (download["state"], download["node"], download["folder"]) == ("done", "attic", "org--sums")
    assert download["bytes_done"] == download["bytes_total"] > 2_000_000
    kinds = [event["kind"] for event in history(fleet, job)]
    assert kinds[:2] == ["submit", "download-started"]
    assert kinds.index("download-started") < kinds.index("replan") < kinds.index("claim")
    assert "download-done" in kinds
    assert wait_event(fleet, job, "replan")["reason"] == "the fleet's models changed"
    (held,) = [model for model in fleet.calls.get("/v1/models").json()["data"] if model["nodes"]]
    assert (held["id"], held["downloads"]) == ("org--sums", [])
    assert ended["downloads"] == []


def test_a_worker_that_is_killed_in_the_middle_loses_nothing(
    make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path, migrated_copy: str
) -> None:
    """SIGKILL takes the fetching process along; another worker on the same disk goes on with what lies there."""
    hub.add("org/large", make_model(tmp_path / "source", tensors=LARGE))
    hub.held = {"model.safetensors"}
    fleet = make_fleet(url=migrated_copy)
    attic = fleet.start_worker("attic", **ALLOWED)
    job = fleet.calls.submit("org/large", ROWS)
    assert hub.is_held.wait(SECONDS)
    part = tmp_path / "models" / ".ollm-downloads" / "org--large" / "parts" / "model.safetensors"
    wait_for(lambda: part.is_file() and part.stat().st_size >= CHUNK_BYTES, timeout=SECONDS, what="a part on the disk")
    seen = wait_for(
        lambda: [found for found in downloads(fleet) if found["bytes_done"]], timeout=SECONDS, what="progress to be told"
    )[0]
    assert (seen["state"], seen["node"], fleet.calls.job(job["id"])["downloads"][0]["id"]) == ("running", "attic", seen["id"])
    family = attic.runner_pids()
    attic.kill()
    have = part.stat().st_size
    hub.go_on.set()
    hub.held = set()
    fleet.start_worker("cellar", **ALLOWED)
    assert fleet.calls.wait_final(job["id"], timeout=SECONDS)["counts"]["succeeded"] == 1
    (download,) = downloads(fleet)
    assert (download["state"], download["node"], download["attempt"]) == ("done", "cellar", 2)
    assert hub.ranges == [("model.safetensors", have)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)


def test_what_cannot_be_fetched_is_told_to_the_job(make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path) -> None:
    """An unknown and a gated repository: the job shows why. A worker with a token fetches the gated one, and keeps it."""
    hub.add("org/gated", make_model(tmp_path / "source"), token=SECRET)
    fleet = make_fleet()
    fleet.start_worker("attic", **ALLOWED)
    gated, unknown = (fleet.calls.submit(name, ROWS) for name in ("org/gated", "org/nothing"))
    reason = wait_event(fleet, gated, "download-failed")["reason"]
    assert "set HF_TOKEN on the worker" in reason
    assert f"there is no org/nothing at {hub.url}" in wait_event(fleet, unknown, "download-failed")["reason"]
    shown = fleet.calls.job(gated["id"])
    assert (shown["state"], shown["plans"][0]["condition"]) == ("queued", "model-not-present")
    assert (shown["downloads"][0]["state"], shown["downloads"][0]["reason"]) == ("failed", reason)
    cellar = fleet.start_worker("cellar", HF_TOKEN=SECRET, **ALLOWED)
    assert fleet.calls.wait_final(gated["id"], timeout=SECONDS)["counts"]["succeeded"] == 1
    assert SECRET not in fleet.calls.get("/v1/downloads").text + fleet.calls.get("/v1/workers").text
    for place in tmp_path.rglob("*"):
        assert not place.is_file() or SECRET.encode() not in place.read_bytes(), place
    assert cellar.log.is_file()
    assert hub.tokens == {SECRET}


def test_a_worker_that_may_not_download_does_not(make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path) -> None:
    """The plan waits with the reason; a pull is refused; a model that comes in another way is found, and the plan made anew."""
    source = make_model(tmp_path / "source")
    hub.add("org/name", source)
    fleet = make_fleet()
    fleet.start_worker("attic", OLLM_ALLOW_DOWNLOADS="true", OLLM_DOWNLOAD_REPOS="other/*")
    fleet.start_worker("cellar")
    job = fleet.calls.submit("org/name", ROWS)
    verdicts = fleet.calls.plan(job["plans"][0]["id"])["workers"]
    assert {verdict["node"]: verdict["reasons"] for verdict in verdicts} == {
        "attic": ["model org/name: not here, and this worker may not download anything but other/*"],
        "cellar": ["model org/name: not here, and this worker may not download"],
    }
    refused = fleet.calls.post("/v1/models/pull", {"model": "org/name"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert downloads(fleet) == []
    assert hub.asked == {}
    shutil.copytree(source, tmp_path / "models" / "org--name")
    fleet.start_worker("shed")  # which looks at once, where the others do within half a minute
    assert wait_event(fleet, job, "replan")["reason"] == "the fleet's models changed"
    assert fleet.calls.wait_final(job["id"], timeout=SECONDS)["counts"]["succeeded"] == 1


def test_a_pull_goes_to_the_worker_that_was_named(make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path) -> None:
    """Each into its own models root; what inspection refuses has failed with its reason."""
    hub.add("org/name", make_model(tmp_path / "source"))
    coded = make_model(tmp_path / "coded", tokenizer_config={"auto_map": {"AutoTokenizer": "tokenizer.T"}})
    (coded / "tokenizer.json").rename(coded / "tokenizer.model")
    hub.add("org/coded", coded)
    fleet = make_fleet()
    for node in ("attic", "cellar"):
        fleet.start_worker(node, OLLM_MODELS_DIR=str(tmp_path / node / "models"), **ALLOWED)
    asked = fleet.calls.post("/v1/models/pull", {"model": "org/name", "worker": "cellar"})
    assert asked.status_code == 202
    (done,) = wait_ended(fleet)
    assert (done["state"], done["node"]) == ("done", "cellar")
    assert (tmp_path / "cellar" / "models" / "org--name" / "config.json").is_file()
    assert not (tmp_path / "attic" / "models" / "org--name").exists()
    there = wait_for(
        lambda: fleet.calls.post("/v1/models/pull", {"model": "org/name"}).json()["held_by"],
        timeout=SECONDS,
        what="the model to be on offer",
    )
    assert there == ["cellar"]
    fleet.calls.post("/v1/models/pull", {"model": "org/coded"})
    refused = wait_ended(fleet, 2)[0]
    assert (refused["state"], refused["reason"]) == (
        *("failed", "it is there, but: it needs remote code: its tokenizer is a program of its own"),
    )


def test_a_drain_gives_a_download_back(make_fleet: Callable[..., Fleet], hub: Hub, tmp_path: Path) -> None:
    """At once, and the worker leaves in time."""
    hub.add("org/large", make_model(tmp_path / "source", tensors=LARGE))
    hub.held = {"model.safetensors"}
    fleet = make_fleet()
    attic = fleet.start_worker("attic", **ALLOWED)
    fleet.calls.post("/v1/models/pull", {"model": "org/large"})
    assert hub.is_held.wait(SECONDS)
    attic.terminate()
    assert attic.wait(timeout=30) == 0
    (download,) = downloads(fleet)
    assert (download["state"], download["reason"], download["attempt"]) == ("queued", "attic left", 1)
