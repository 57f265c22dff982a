"""Which of request, user's machine, server's machine and default says how a job runs?"""

from dataclasses import replace
from pathlib import Path

import pytest

from ollm_service import Client, GenerationConfig, RuntimeConfig
from ollm_service.configuration import read_options
from ollm_service.coordinator.service import Service
from ollm_service.core.errors import InvalidOption, MisconfiguredService
from tests.client.live import LiveService
from tests.coordinator.services import claim_one


@pytest.fixture
def service_says(service: Service, tmp_path: Path) -> Service:
    """The service on a machine with options of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "ollm.toml").write_text("[generation]\nmax_new_tokens = 4\ntop_k = 4\nseed = 4\ntop_p = 0.4\ntemperature = 0.4")
    environment = {"OLLM_GENERATION__TOP_P": "0.3", "OLLM_RUNTIME__STRATEGY_SELECTOR_PROFILE": "capacity"}
    return replace(service, options=read_options(environment, folder, owner="the server's"))


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's machine with options of its own."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "ollm.toml").write_text("[generation]\nmax_new_tokens = 2\ntop_k = 2\nseed = 2")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLLM_GENERATION__TOP_K", "1")


def test_request_then_user_then_server_then_default(service_says: Service, worker_id: str, at_home: None) -> None:
    """And a worker gets what came of it, whatever its own machine says."""
    with LiveService(service_says) as live, Client(live.url) as client:
        job = client.submit("tiny", ["a"], generation={"max_new_tokens": 1, "temperature": None})
        assert job.status.raw["runtime"] == {"strategy_selector_profile": "capacity"}
        work = claim_one(service_says, worker_id)
    assert work.rows[0].generation == GenerationConfig(max_new_tokens=1, top_k=1, seed=2, top_p=0.3)
    assert work.config == RuntimeConfig(strategy_selector_profile="capacity")


def test_a_preview_asks_as_a_submission_does(service_says: Service, worker_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same places say the same to both."""
    monkeypatch.setenv("OLLM_RUNTIME__KV_CACHE_STRATEGY", "paged")
    with LiveService(service_says) as live, Client(live.url) as client:
        seen = client.preview("tiny", rows=["a"])
        job = client.submit("tiny", ["a"])
        assert seen.requirements == job.plans[0].requirements
        assert seen.requirements is not None
        assert seen.requirements["kv_cache_strategy"] == "paged"
        assert job.status.raw["runtime"] == {"kv_cache_strategy": "paged", "strategy_selector_profile": "capacity"}


def test_whoever_is_in_the_way_of_a_request_is_named(live: LiveService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own variable contradicts the user's own request: nothing needs to be sent to say so."""
    monkeypatch.setenv("OLLM_RUNTIME__DEVICE", "cpu")
    with Client(live.url) as client, pytest.raises(InvalidOption, match="this sets device by OLLM_RUNTIME__DEVICE"):
        client.submit("tiny", ["a"], runtime={"offload_cpu_layers": 2})


def test_a_client_is_not_made_on_wrong_settings(live: LiveService, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which."""
    monkeypatch.setenv("OLLM_CONFIG_FILE", "/nowhere/ollm.toml")
    with pytest.raises(MisconfiguredService, match="OLLM_CONFIG_FILE names /nowhere"):
        Client(live.url)
