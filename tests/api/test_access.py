"""Who is let in? With keys, who has one; without, who is on this machine and no stranger's web page."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ollm_service.api.app import create_app
from ollm_service.api.middleware import is_loopback
from ollm_service.api.server import check_is_safe
from ollm_service.core.errors import MisconfiguredService
from ollm_service.settings import Settings
from tests.coordinator.services import open_service

KEYS = "first-key, second-key"


@pytest.fixture
def guarded(url: str, tmp_path: Path) -> TestClient:
    """A client without a key of a service that demands one."""
    return TestClient(create_app(open_service(url, tmp_path, api_keys=KEYS)), base_url="http://coordinator.example")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer first-key,", "Basic first-key", "first-key"])
def test_without_a_key_nothing_but_health_is_told(guarded: TestClient, header: str | None) -> None:
    """401 in the envelope, before the body is read or the path is looked at."""
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/jobs", "/v1/nothing", "/openapi.json"):
        refused = guarded.get(path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "authentication_failed")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert guarded.post("/v1/jobs", headers=headers, content=b"{").status_code == 401
    assert guarded.get("/healthz", headers=headers).status_code == 200
    assert guarded.get("/readyz", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_any_of_the_keys_opens(guarded: TestClient, key: str) -> None:
    """From any host, and however the scheme is written."""
    assert guarded.get("/v1/jobs", headers={"authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "https://elsewhere.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_keys_other_sites_cannot_reach_in_through_a_browser(
    http: TestClient, headers: dict[str, str], status: int
) -> None:
    """A name that was rebound to loopback and a page from elsewhere are refused; local ones are not."""
    assert http.get("/v1/jobs", headers=headers).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_keys_the_service_listens_on_loopback_only(host: str) -> None:
    """Anything that others can reach is refused with a remedy; with keys it is allowed."""
    with pytest.raises(MisconfiguredService) as caught:
        check_is_safe(Settings(host=host))
    assert "OLLM_API_KEYS" in (caught.value.remedy or "")
    check_is_safe(Settings(host=host, api_keys=KEYS))
    with pytest.raises(MisconfiguredService):
        check_is_safe(Settings(host=host, api_keys=" , "))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST", "[::1]"])
def test_loopback_has_several_names(host: str) -> None:
    """All of them are this machine."""
    assert is_loopback(host)
