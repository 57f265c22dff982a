"""Does a worker's downloader keep its word to the store, whatever becomes of the process that fetches?"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ollm_service.core.downloading import DownloadState, hub_model
from ollm_service.store.downloads import DownloadView
from tests.doubles.hub import Hub
from tests.store.ageing import let_time_pass
from tests.unit.model_folders import TENSORS, make_model
from tests.waiting import wait_for
from tests.worker.place import SECONDS, Place

CHUNK_BYTES = 10 * 1024**2
LARGE = {**TENSORS, "model.layers.0.mlp.up_proj.weight": ("F32", (4, CHUNK_BYTES // 4))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model `org/large`, which this process's workers find."""
    with Hub() as started:
        started.add("org/large", make_model(tmp_path / "source", tensors=LARGE))
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield started


def ask(place: Place) -> None:
    """Ask for the model."""
    place.store.downloads.request(hub_model("org/large"), "dl_1")


def seen(place: Place) -> DownloadView:
    """The download as the store knows it."""
    return place.store.downloads.get("dl_1")


def wait_for_state(place: Place, state: DownloadState) -> None:
    """Wait until the download is in this state."""
    wait_for(lambda: seen(place).state is state, timeout=SECONDS, what=f"a download that is {state}")


def fetching_process() -> psutil.Process | None:
    """The process that fetches, if there is one."""
    for child in psutil.Process().children(recursive=True):
        try:
            if "workers.download" in child.cmdline():
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def test_a_process_that_dies_is_started_again(place: Place, hub: Hub) -> None:
    """By itself, after a pause, with the reason on show meanwhile; what it had fetched is not fetched again."""
    hub.held = {"model.safetensors"}
    ask(place)
    with place.agent(allow_downloads=True):
        assert hub.is_held.wait(SECONDS)
        wait_for(lambda: seen(place).bytes_done >= CHUNK_BYTES, timeout=SECONDS, what="progress to be told")
        process = fetching_process()
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: seen(place).reason, timeout=SECONDS, what="a reason")
        assert seen(place).reason == "the process on here that fetched it ended"
        hub.go_on.set()
        hub.held = set()
        wait_for_state(place, DownloadState.DONE)
    assert (seen(place).attempt, seen(place).reason, seen(place).bytes_done) == (2, None, seen(place).bytes_total)
    assert [file for file, _ in hub.ranges] == ["model.safetensors"]


def test_a_folder_that_has_lost_a_file_is_made_whole_again(place: Place, hub: Hub) -> None:
    """What the worker thought of the folder before is not what came of fetching the rest."""
    ask(place)
    with place.agent(allow_downloads=True):
        wait_for_state(place, DownloadState.DONE)
    (place.models_dir / "org--large" / "model.safetensors").unlink()
    with place.agent(allow_downloads=True):
        (worker,) = place.store.fleet.workers()
        refused = {model.name: model.unsafe_because for model in worker.capabilities.models}
        assert refused["org--large"]
        place.store.downloads.request(hub_model("org/large"), "dl_2")
        ended = (DownloadState.DONE, DownloadState.FAILED)
        wait_for(lambda: place.store.downloads.get("dl_2").state in ended, timeout=SECONDS, what="an end")
    assert (place.store.downloads.get("dl_2").state, place.store.downloads.get("dl_2").reason) == (DownloadState.DONE, None)


def test_a_lost_lease_ends_the_process(place: Place, hub: Hub) -> None:
    """As when the worker was frozen for too long: what another may do by now is left to it."""
    hub.held = {"model.safetensors"}
    ask(place)
    with place.agent(allow_downloads=True):
        assert hub.is_held.wait(SECONDS)
        process = fetching_process()
        assert process is not None
        wait_for(lambda: _reaped(place), timeout=SECONDS, what="the lease to run out")
        process.wait(timeout=SECONDS)


def _reaped(place: Place) -> bool:
    """Whether a coordinator took it back before the worker renewed its lease again."""
    let_time_pass(place.database_url, 60_000)
    return place.store.downloads.reap() == 1


def test_a_models_root_that_cannot_be_written_to_takes_no_downloads(place: Place, hub: Hub, tmp_path: Path) -> None:
    """The worker does not offer to fetch then, so that another may."""
    (tmp_path / "file").write_text("in the way")
    with place.agent(allow_downloads=True, models_dir=tmp_path / "file" / "models"):
        (worker,) = place.store.fleet.workers()
        assert not worker.capabilities.may_download
    with place.agent(allow_downloads=True, models_dir=tmp_path / "new" / "models", download_repos="org/*, x/y"):
        (worker,) = place.store.fleet.workers()
        assert (worker.capabilities.may_download, worker.capabilities.downloadable) == (True, ("org/*", "x/y"))


def test_without_leave_nothing_is_fetched(place: Place, hub: Hub) -> None:
    """Unless told otherwise a worker may not, and its downloads go on waiting."""
    ask(place)
    with place.agent() as agent:
        job = place.submit(["one"])
        place.wait_for_end(job)
        assert agent.worker_id
    assert seen(place).state is DownloadState.QUEUED
    assert hub.asked == {}
    assert not any(worker.capabilities.may_download for worker in place.store.fleet.workers(active_only=False))
