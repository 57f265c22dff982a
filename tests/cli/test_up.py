"""Does `up` run everything, keep it running, and leave nothing behind, however it ends? Real processes on free ports."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ollm_service.client import Client
from ollm_service.core.errors import OllmError
from tests.cli.conftest import REPOSITORY
from tests.servers import LOOPBACK, free_port, kill_tree
from tests.waiting import wait_for

pytestmark = [pytest.mark.serial, pytest.mark.slow]

START_SECONDS = 60.0  # imports on a busy machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """A running `ollm-service up`."""

    process: subprocess.Popen[bytes]
    url: str
    data_dir: Path

    def children(self) -> list[psutil.Process]:
        """Everything that it has started and what that has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process | None:
        """Its worker's process, if there is one."""
        return next((child for child in self.children() if "workers.app" in child.cmdline()), None)

    def active_workers(self) -> list[str]:
        """The ids of the workers that are registered and active."""
        try:
            with Client(self.url) as client:
                return [worker.id for worker in client.workers() if worker.state == "active"]
        except OllmError:
            return []


def command(port: int, data_dir: Path, *more: str) -> list[str]:
    """`ollm-service up` on a port and a folder."""
    folders = ["--data-dir", str(data_dir), "--models-dir", str(data_dir)]
    return [sys.executable, "-m", "ollm_service.cli", "up", "--port", str(port), *folders, *more]


def environment() -> dict[str, str]:
    """What its processes need."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OLLM_NODE": "here"}


@contextmanager
def running(folder: Path) -> Iterator[Up]:
    """It, with its worker registered; killed with all its children in any case."""
    port, data_dir, log = free_port(), folder / "data", folder / "up.log"
    data_dir.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(command(port, data_dir), env=environment(), cwd=folder, stdout=output, stderr=output)
    up = Up(process=process, url=f"http://127.0.0.1:{port}", data_dir=data_dir)
    try:
        wait_for(lambda: f"runs at {up.url}" in log.read_text(), timeout=START_SECONDS, what="its URL to be printed")
        wait_for(up.active_workers, timeout=START_SECONDS, what="its worker to be registered")
        yield up
    finally:
        kill_tree(process)


def test_it_runs_until_it_is_asked_to_end_and_takes_everything_with_it(tmp_path: Path) -> None:
    """SIGTERM ends it with 0 and its children with it; meanwhile its folder is refused to a second one."""
    with running(tmp_path) as up:
        second = subprocess.run(
            command(free_port(), up.data_dir), env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert "Another `ollm-service up`" in second.stderr
        assert up.url in second.stderr
        family = up.children()
        assert len(family) >= 2
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(timeout=30) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []


def test_killing_it_leaves_nothing_running(tmp_path: Path) -> None:
    """kill -9 for it alone: the kernel ends its children, and the folder is free again."""
    with running(tmp_path) as up:
        family = up.children()
        up.process.kill()
        up.process.wait(timeout=10)
        assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_dead_worker_is_started_again(tmp_path: Path) -> None:
    """After kill -9 for the worker another one registers by itself."""
    with running(tmp_path) as up:
        before = up.active_workers()
        victim = up.worker()
        assert victim is not None
        victim.kill()
        wait_for(lambda: set(up.active_workers()) - set(before), timeout=START_SECONDS, what="another worker")
        found = up.worker()
        assert found is not None
        assert found.pid != victim.pid


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    """It ends with 1 and says why."""
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(port, tmp_path / "other"), env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr
