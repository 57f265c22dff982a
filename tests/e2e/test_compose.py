"""Does the deployment of docker-compose.yml work? Its file is read, and its own services run as processes on private servers.

Docker itself is not needed: every command and variable comes from the file (and the image's variables from the Dockerfile), with
hosts, ports and folders replaced by those of this machine.
"""

import functools
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from tests.e2e.fleet import REPOSITORY, Part
from tests.servers import LOOPBACK, PostgresServer, RedisServer, free_port
from tests.waiting import wait_for

OURS = ("migrate", "coordinator", "worker-cpu", "worker-gpu")
ROWS = 1024  # four plans of 256 rows
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<operator>[-?])(?P<operand>[^}]*))?\}")
EXAMPLE_KEY = "change-me-too"


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a .env file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def read_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The compose file as Docker Compose sees it. Raises KeyError with its message for a demanded variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name, operator, operand = match["name"], match["operator"], match["operand"]
        if variables.get(name):
            return variables[name]
        if operator == "?":
            raise KeyError(f"{name}: {operand}")
        return operand if operator == "-" else ""

    text = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")
    composed = yaml.safe_load(VARIABLE.sub(value, text))
    assert isinstance(composed, dict)
    return composed


def image_environment(target: str) -> dict[str, str]:
    """What the ENV lines of a stage of the Dockerfile set for our own variables."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    stage = text.split(f" AS {target}\n", 1)[1].split("\nFROM ", 1)[0]
    words = itertools.chain.from_iterable(shlex.split(line)[1:] for line in stage.splitlines() if line.startswith("ENV "))
    return {name: value for name, _, value in (word.partition("=") for word in words)}


@pytest.fixture
def services() -> dict[str, Any]:
    """The services of the compose file, with the example's secrets."""
    found = read_compose(read_env_file(REPOSITORY / ".env.example"))["services"]
    assert isinstance(found, dict)
    return found


class ComposedFleet:
    """Our services of the compose file as processes of this machine."""

    def __init__(self, services: Mapping[str, Any], directory: Path, database_url: str, broker_url: str) -> None:
        self.port = free_port()
        self.parts: dict[str, Part] = {}
        self._services = services
        self._directory = directory
        self._places = {
            "postgres:5432/ollm": database_url.partition("@")[2],
            "redis:6379/0": broker_url.partition("//")[2],
            "/models": str(REPOSITORY / "demo" / "models"),
        }

    def environment(self, service: str, node: str) -> dict[str, str]:
        """What the service's container would see, in this machine's places."""
        target = "service" if service in ("migrate", "coordinator") else "worker"
        folder = self._directory / node
        seen = {**image_environment(target), **self._services[service]["environment"]}
        for name, value in seen.items():
            for theirs, ours in self._places.items():
                seen[name] = seen[name].replace(theirs, ours) if theirs in value else seen[name]
        # A container's host name is its own; processes of one machine share theirs.
        seen |= {"OLLM_DATA_DIR": str(folder), "OLLM_NODE": node}
        if "OLLM_PORT" in seen:
            seen["OLLM_PORT"] = str(self.port)
        return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self._directory), **seen}

    def launch(self, service: str, node: str) -> Part:
        """Start one container's worth of a service."""
        [program, *arguments] = self._services[service]["command"]
        command = [str(Path(sys.executable).parent / program), *arguments]
        part = Part(node, command, self.environment(service, node), self._directory / node)
        self.parts[node] = part
        part.start()
        return part

    def is_healthy(self, service: str, node: str) -> bool:
        """Whether the service's own health check passes."""
        part = self.parts[node]
        assert part.is_running, f"{node} ended:\n{part.log_tail()}"
        [kind, *check] = self._services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [word.replace(":8000", f":{self.port}") for word in check]
        environment = self.environment(service, node)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode == 0

    def close(self) -> None:
        """End every process."""
        for part in self.parts.values():
            part.close()


@pytest.fixture
def fleet(
    services: dict[str, Any], tmp_path: Path, postgres_server: PostgresServer, redis_server: RedisServer
) -> Iterator[ComposedFleet]:
    """The composed services, not yet started, on an empty database."""
    database_url = postgres_server.create_database()
    composed = ComposedFleet(services, tmp_path, database_url, redis_server.url)
    yield composed
    composed.close()
    postgres_server.drop_database(database_url)


@pytest.mark.timeout(300)
def test_the_composed_fleet_answers_every_row_once_on_both_scaled_workers(fleet: ComposedFleet) -> None:
    """Migrated, started and scaled to two workers as composed, the service answers a job of four plans on both, each row once."""
    migration = fleet.launch("migrate", "migrate")
    assert migration.wait(timeout=60) == 0, migration.log_tail()
    fleet.launch("coordinator", "coordinator")
    wait_for(lambda: fleet.is_healthy("coordinator", "coordinator"), timeout=60, what="the coordinator to be healthy")
    workers = ["worker-cpu-1", "worker-cpu-2"]
    for node in workers:
        fleet.launch("worker-cpu", node)
    for node in workers:
        wait_for(functools.partial(fleet.is_healthy, "worker-cpu", node), timeout=60, what=f"{node} to be healthy")

    headers = {"Authorization": f"Bearer {EXAMPLE_KEY}"}
    with httpx.Client(base_url=f"http://{LOOPBACK}:{fleet.port}", headers=headers, timeout=30, trust_env=False) as http:
        wait_for(lambda: active_nodes(http) == set(workers), timeout=60, what="both workers to be registered")
        rows = [{"custom_id": f"row-{row}", "prompt": f"{row % 100}+{row % 89}="} for row in range(ROWS)]
        submitted = http.post("/v1/jobs", json={"model": "sum-chat", "rows": rows, "generation": {"max_new_tokens": 4}})
        assert submitted.status_code == 201, submitted.text
        job = submitted.json()
        assert job["plans_total"] == 4
        wait_for(lambda: state_of(http, job["id"]) == "succeeded", timeout=200, what="the job to succeed")
        lines = http.get(f"/v1/jobs/{job['id']}/results").text.splitlines()

    answered = [json.loads(line) for line in lines]
    assert sorted(result["row"] for result in answered) == list(range(ROWS))
    assert [result["error"] for result in answered if result["error"]] == []
    assert nodes_that_answered(fleet.environment("coordinator", "reader")["OLLM_DATABASE_URL"], job["id"]) == set(workers)


def active_nodes(http: httpx.Client) -> set[str]:
    """The nodes of the active workers."""
    answer = http.get("/v1/workers")
    assert answer.status_code == 200, answer.text
    return {worker["node"] for worker in answer.json()["data"] if worker["state"] == "active"}


def state_of(http: httpx.Client, job_id: str) -> str:
    """The job's state now."""
    answer = http.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["state"])


def nodes_that_answered(database_url: str, job_id: str) -> set[str]:
    """The workers that ran the plans of a job, as the view for monitoring shows them."""
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        rows = connection.execute("SELECT worker_node FROM plan_states WHERE job_id = %s AND rows_done > 0", (job_id,)).fetchall()
    return {row[0] for row in rows}


@pytest.mark.timeout(120)
def test_the_composed_coordinator_admits_only_key_holders(fleet: ComposedFleet) -> None:
    """The coordinator, which listens on all interfaces of its container, demands one of the composed keys."""
    assert fleet.launch("migrate", "migrate").wait(timeout=60) == 0
    fleet.launch("coordinator", "coordinator")
    wait_for(lambda: fleet.is_healthy("coordinator", "coordinator"), timeout=60, what="the coordinator to be healthy")
    url = f"http://{LOOPBACK}:{fleet.port}/v1/jobs"
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {EXAMPLE_KEY}"}, trust_env=False).status_code == 200


@pytest.mark.timeout(180)
def test_the_composed_gpu_worker_registers_where_there_is_no_gpu(fleet: ComposedFleet) -> None:
    """Its command and variables make a worker that is healthy on a CPU as well."""
    assert fleet.launch("migrate", "migrate").wait(timeout=60) == 0
    fleet.launch("worker-gpu", "worker-gpu")
    wait_for(lambda: fleet.is_healthy("worker-gpu", "worker-gpu"), timeout=90, what="the GPU worker to be healthy")


@pytest.mark.timeout(120)
def test_the_composed_coordinator_refuses_an_open_network_without_keys(fleet: ComposedFleet) -> None:
    """With its keys taken away the coordinator ends with status 2 and a sentence, and serves nobody."""
    assert fleet.launch("migrate", "migrate").wait(timeout=60) == 0
    environment = {**fleet.environment("coordinator", "coordinator"), "OLLM_API_KEYS": ""}
    command = [str(Path(sys.executable).parent / "ollm-service"), "serve"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2
    assert "OLLM_API_KEYS" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_every_service_says_when_it_is_healthy(services: dict[str, Any]) -> None:
    """Each service has a health check, but for the one-shot migration, whose exit status counts."""
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"migrate"}


def test_ours_start_after_the_migration(services: dict[str, Any]) -> None:
    """Coordinator and workers wait until the schema is there, and the migration waits for the database."""
    for name in OURS[1:]:
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert services["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_the_cpu_worker_can_be_scaled(services: dict[str, Any]) -> None:
    """Nothing of the CPU worker can exist only once: no fixed name, node or host port, no shared volume that is written to."""
    worker = services["worker-cpu"]
    assert not worker.keys() & {"container_name", "hostname", "ports"}
    assert "OLLM_NODE" not in worker["environment"]
    assert all(volume.endswith(":ro") for volume in worker["volumes"])


def test_the_gpu_worker_is_asked_for(services: dict[str, Any]) -> None:
    """The GPU worker starts only with its profile, and reserves a device."""
    worker = services["worker-gpu"]
    assert worker["profiles"] == ["gpu"]
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_broker_appends_to_a_file(services: dict[str, Any]) -> None:
    """Redis is started with its append-only file, on a volume."""
    assert services["redis"]["command"] == ["redis-server", "--appendonly", "yes"]
    assert services["redis"]["volumes"]


@pytest.mark.parametrize("secret", ["POSTGRES_PASSWORD", "OLLM_API_KEYS"])
def test_no_secret_has_a_default(secret: str) -> None:
    """The file refuses to be composed without its secrets, and .env.example names each of them."""
    example = read_env_file(REPOSITORY / ".env.example")
    assert secret in example
    with pytest.raises(KeyError, match=secret):
        read_compose({**example, secret: ""})


def test_the_image_is_built_from_files_that_exist() -> None:
    """What the Dockerfile copies exists and is let through by .dockerignore."""
    admitted = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:-1] for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    for source in set(itertools.chain.from_iterable(copies)):
        assert (REPOSITORY / source).exists(), source
        assert source in admitted
