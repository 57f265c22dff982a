"""What does every test find? Private servers, an empty database, no network but loopback, and no settings from outside."""

import ipaddress
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.servers import MissingServer, PostgresServer, RabbitServer, RedisServer

MISSING = "missing server: "
# Whole services, killed processes and clocks: these tests run one at a time.
SERIAL_FOLDERS = {"e2e", "chaos", "browser", "gpu"}
# In those folders, but with time enough to run beside others.
PATIENT_MODULES = {"test_compose.py", "test_checker.py", "test_downloads.py", "test_offload.py", "test_kv_strategies.py"}

for _name in [name for name in os.environ if name.startswith("OLLM_")]:
    del os.environ[_name]
# No model or tokenizer is ever fetched, by us or by a child.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

# A shared machine may stall an example for longer than any deadline worth having. HYPOTHESIS_PROFILE=thorough takes minutes.
_EXAMPLES = {"ollm": 50, "thorough": 1_000}
for _name, _count in _EXAMPLES.items():
    hypothesis.settings.register_profile(
        _name, max_examples=_count, deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ollm"))


class OutsideConnection(BaseException):
    """A test tried to connect to something that is not on this machine. Not an Exception, so that no retry swallows it."""


def _refuse_the_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not _is_local(str(arguments[1][0])):
        raise OutsideConnection(f"tests may connect to loopback only, not to {arguments[1]}")


def _is_local(host: str) -> bool:
    if host in {"", "localhost"}:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    return address.is_loopback or address.is_unspecified


sys.addaudithook(_refuse_the_network)


# ---------------------------------------------------------------------------------------- servers and databases


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A private PostgreSQL for this run. A test that kills it starts it again."""
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A private Redis for this run, which persists nothing. A test that kills it starts it again."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def rabbit_server() -> Iterator[RabbitServer]:
    """A private RabbitMQ for this run; it takes some ten seconds to start. A test that kills it starts it again."""
    with RabbitServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database: each test that asks runs once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ollm.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.create_database()
    yield url
    server.drop_database(url)


# ---------------------------------------------------------------------------------------- what runs, and what a skip means


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what must run alone, and give everything that needs RabbitMQ, so slow to start, to one test process."""
    for item in items:
        if "rabbit_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("rabbit"))
        if item.path.name in PATIENT_MODULES:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        elif SERIAL_FOLDERS & set(item.path.parts):
            item.add_marker(pytest.mark.serial)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests on a machine without one."""
    if item.get_closest_marker("gpu") is not None and not _has_cuda():
        pytest.skip("needs a CUDA device")


def _has_cuda() -> bool:
    import torch  # noqa: PLC0415 - seconds of import that only GPU tests should pay

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A server that is not installed skips the test that wanted it, but where CI is set the failure stays."""
    report = yield
    missing = call.excinfo.value if call.excinfo is not None else None
    if isinstance(missing, MissingServer) and not os.environ.get("CI"):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"{MISSING}{missing}")
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Say loudly, as the last thing, which tests did not run for want of a server."""
    yield
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    missing = sorted(reason.removeprefix(MISSING) for reason in reasons if reason.startswith(MISSING))
    if missing:
        terminalreporter.section("NOT EVERYTHING WAS TESTED", sep="!", red=True, bold=True)
        for name in dict.fromkeys(missing):
            terminalreporter.line(f"{missing.count(name)} test(s) skipped: {name} is not installed", red=True, bold=True)
