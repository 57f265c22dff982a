"""Does the coordinator's process start, serve, refuse and end as an operator expects?"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ollm_service.api.server import bind, serve
from ollm_service.core.errors import MisconfiguredService
from ollm_service.core.precedence import OptionLayers
from ollm_service.settings import Settings
from ollm_service.store.database import open_database
from tests.servers import Blackhole, refused_port
from tests.store.samples import new_worker
from tests.waiting import wait_for

COMMAND = [sys.executable, "-m", "ollm_service.api.server"]
START_SECONDS = 60.0


def environment(**settings: str) -> Mapping[str, str]:
    """The test's environment with these OLLM_ settings."""
    return os.environ | {f"OLLM_{name.upper()}": value for name, value in settings.items()}


@contextmanager
def server(**settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running coordinator on a free port and its URL, which it says itself."""
    process = subprocess.Popen(COMMAND, env=environment(port="0", **settings), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listens on http://" in line, "the server ended at its start"
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()


def ended(**settings: str) -> subprocess.CompletedProcess[str]:
    """A coordinator that ended by itself."""
    return subprocess.run(
        COMMAND, env=environment(**settings), capture_output=True, text=True, timeout=START_SECONDS, check=False
    )


def test_it_serves_and_ends_on_sigterm_with_readers_waiting(url: str) -> None:
    """The URL is printed once it listens; SIGTERM ends a long poll that waits, and the process with exit code 0."""
    with server(database_url=url) as (process, base), httpx.Client(base_url=base, timeout=70, trust_env=False) as http:
        assert http.get("/readyz").json()["status"] == "ok"
        job = http.post("/v1/jobs", json={"model": "org/name", "rows": [{"prompt": "a"}]}).json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/results", params={"wait_seconds": 60}) as waiting:
            process.send_signal(signal.SIGTERM)
            assert waiting.read() == b""
        assert process.wait(timeout=20) == 0


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """An answer in two writes would otherwise wait 40 ms for the client's delayed acknowledgement of the first."""

    async def has_no_delay() -> int:
        with bind(Settings(port=0)) as bound:
            seen: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
            listening = await asyncio.start_server(lambda _, writer: seen.set_result(writer), sock=bound)
            async with listening:
                _, client = await asyncio.open_connection(*bound.getsockname())
                accepted = (await seen).get_extra_info("socket")
                is_set: int = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
                (await seen).close()
        return is_set

    assert asyncio.run(has_no_delay())


def test_a_body_over_the_limit_gets_its_answer(url: str) -> None:
    """A client that is still writing reads the 413, whether it announced the length or not."""
    body = b"x" * 3_000_000

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    with server(database_url=url, max_body_bytes="2048") as (_, base), httpx.Client(base_url=base, trust_env=False) as http:
        for content in (body, chunks()):
            refused = http.post("/v1/jobs", content=content)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_a_broken_broker_is_no_hindrance(url: str) -> None:
    """Refused or swallowed by a dead network, hints hold up no submission; readiness tells that the broker is down."""
    store = open_database(url)
    new_worker(store)
    store.close()
    with Blackhole() as blackhole:
        for port in (refused_port(), blackhole.port):
            broker = f"redis://127.0.0.1:{port}/0"
            with server(database_url=url, broker_url=broker) as (_, base), httpx.Client(base_url=base, trust_env=False) as http:
                submitted = http.post("/v1/jobs", json={"model": "tiny", "rows": [{"prompt": "a"}]})
                assert (submitted.status_code, submitted.json()["plans"][0]["condition"]) == (201, None)
                wait_for(lambda: http.get("/readyz").json()["broker"] == "down", timeout=20, what="the broker to be seen down")


def test_a_missing_database_is_a_sentence_and_exit_code_1() -> None:
    """No traceback, and no password."""
    result = ended(database_url=f"postgresql+psycopg://user:secret@127.0.0.1:{refused_port()}/nothing")
    assert result.returncode == 1
    assert "cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr


def test_a_taken_port_is_a_sentence_and_exit_code_1(url: str) -> None:
    """The address is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = ended(database_url=url, port=str(taken.getsockname()[1]))
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert str(taken) not in result.stderr
    assert "Cannot listen on 127.0.0.1:" in result.stderr


def test_an_unsafe_address_is_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    """Without keys nobody but this machine may command the service."""
    result = ended(data_dir=str(tmp_path), host="0.0.0.0")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "OLLM_API_KEYS" in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"broker_url": "carrier-pigeon://x"}, "OLLM_BROKER_URL"),
        ({"database_url": "mysql://localhost/x"}, "not supported"),
        ({"port": "many"}, "OLLM_PORT"),
        ({}, "ollm-service db upgrade"),
    ],
)
def test_a_wrong_setting_names_itself(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    """And so does a database that has no schema yet: it names the command that makes one."""
    with pytest.raises(MisconfiguredService, match=said):
        serve(Settings.load(**{"data_dir": str(tmp_path), "port": "0", **settings}), OptionLayers())


def test_a_server_fills_in_what_a_request_leaves_open(url: str, tmp_path: Path) -> None:
    """From its environment, then its file, which are read at its start; what contradicts them is told whose they are."""
    file = tmp_path / "server.toml"
    file.write_text("[generation]\nmax_new_tokens = 9\n[runtime]\nstrategy_selector_profile = 'latency'\ndevice = 'cpu'")
    variables = {"config_file": str(file), "runtime__strategy_selector_profile": "capacity"}
    with server(database_url=url, **variables) as (_, base), httpx.Client(base_url=base, trust_env=False) as http:
        store = open_database(url, lease_ms=30_000)
        new_worker(store, "attic")
        store.close()
        rows = [{"prompt": "a"}]
        asked = http.post("/v1/jobs", json={"model": "tiny", "rows": rows, "runtime": {"device": None}}).json()
        assert http.get(f"/v1/jobs/{asked['id']}").json()["generation"] == {"max_new_tokens": 9}
        assert http.get(f"/v1/jobs/{asked['id']}").json()["runtime"] == {"strategy_selector_profile": "capacity"}
        refused = http.post("/v1/jobs", json={"model": "tiny", "rows": rows, "runtime": {"offload_cpu_layers": 1}}).json()
        assert f"device by the server's {file}, [runtime] device" in refused["error"]["message"]


def test_wrong_options_end_a_server_at_its_start(tmp_path: Path) -> None:
    """With status 2 and the variable, before anybody asks for anything."""
    result = ended(data_dir=str(tmp_path), runtime__device="gpu")
    assert result.returncode == 2
    assert "the server's OLLM_RUNTIME__DEVICE: `gpu` is not known" in result.stderr


def test_it_logs_requests_without_keys_or_prompts(url: str, tmp_path: Path) -> None:
    """A line a request with its id, and neither the key that came with it nor what was asked."""
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            COMMAND,
            env=environment(port="0", database_url=url, api_keys="my-key"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            base = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=base, headers={"authorization": "Bearer my-key"}, trust_env=False) as http:
                body = {"model": "org/name", "rows": [{"prompt": "my prompt"}]}
                request_id = http.post("/v1/jobs", json=body).headers["x-request-id"]
                http.post("/v1/jobs", content=b'{"my prompt')
            wait_for(lambda: log.read_text().count("path=/v1/jobs") == 2, timeout=10, what="both requests in the log")
        finally:
            process.terminate()
            process.wait(timeout=20)
            if process.stdout is not None:
                process.stdout.close()
    text = log.read_text()
    assert f"request_id={request_id} method=POST path=/v1/jobs status=201" in text
    assert "my-key" not in text
    assert "my prompt" not in text
