"""What does a test of the command line find? A live service, and the command, in this process or in one of its own."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ollm_service.cli import main
from tests.client.live import LiveService
from tests.service_fixtures import live, migrated_file, service, worker_id

__all__ = ["live", "migrated_file", "service", "worker_id"]  # fixtures

REPOSITORY = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


def run_process(*arguments: str, base_url: str, folder: Path, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    """`ollm-service …` as a process, in a folder, without a terminal; its output is decoded as UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "ollm_service.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **_environment(base_url, folder)},
        input=given,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def run_here(*arguments: str, base_url: str, folder: Path, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves a second of imports. Whatever is not an exit is raised."""
    streams = CliRunner().isolation(given, _environment(base_url, folder))
    with contextlib.chdir(folder), streams as (stdout, stderr, _):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        printed, told = stdout.getvalue().decode(), stderr.getvalue().decode()
    code = ended.value.code
    assert code is None or isinstance(code, int), code
    return subprocess.CompletedProcess(arguments, code or 0, printed, told)


def _environment(base_url: str, folder: Path) -> dict[str, str]:
    """Where the service is, and a place for what the command remembers."""
    return {"OLLM_BASE_URL": base_url, "XDG_STATE_HOME": str(folder / "state")}


@pytest.fixture
def command(live: LiveService, tmp_path: Path) -> Command:
    """The command, pointed at the live service."""
    return functools.partial(run_here, base_url=live.url, folder=tmp_path)


@pytest.fixture
def process(live: LiveService, tmp_path: Path) -> Command:
    """The command as a user runs it, pointed at the live service."""
    return functools.partial(run_process, base_url=live.url, folder=tmp_path)
