"""Does the runner live and die as its supervisor expects? Real processes, real frames."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from ollm_service.core.leasing import WorkRow
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.plan import PassId
from ollm_service.core.wire import (
    AttemptFailed,
    BatchDone,
    BatchStarted,
    Execute,
    Finished,
    Hello,
    Loaded,
    Message,
    Progress,
    SpecializationFailed,
    Stop,
    Stopped,
)
from tests.runner.commands import make_command, of_kind, only, results_of, work_row
from tests.runner.models import DEMO_MODEL, ROOT
from tests.waiting import wait_for
from workers.runner.__main__ import DEVICE_LOST
from workers.runner.channel import Channel

LAST = (Finished, Stopped, SpecializationFailed, AttemptFailed)
PATIENCE = 100.0


class Runner:
    """A runner process and our end of its socket."""

    def __init__(self, module: str) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.channel = Channel(self.connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(timeout=PATIENCE)

    def until_last(self) -> list[Message]:
        """Every message up to the one that ends the plan, or up to the end of the socket."""
        messages: list[Message] = []
        while (message := self.channel.receive()) is not None:
            messages.append(message)
            if isinstance(message, LAST):
                break
        return messages

    def until(self, kind: type[Message]) -> Message:
        """The next message of that kind."""
        while not isinstance(message := self.channel.receive(), kind):
            assert message is not None, f"the runner ended before it said {kind}"
        return message


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """A runner that has said Hello, and only then that it imports torch."""
    with Runner("workers.runner") as started:
        hello = started.channel.receive()
        assert isinstance(hello, Hello)
        assert started.channel.receive() == Progress(stage="importing")
        assert hello.pid == started.process.pid
        assert set(hello.versions) == {"torch", "transformers"}
        yield started


def test_plans_run_one_after_another(runner: Runner, llama: Path) -> None:
    """Two plans for one model and one for another are answered in turn, the second from the warm model."""
    rows = [work_row(index, f"{index}+40=", max_new_tokens=8) for index in range(10, 20)]
    for folder in (DEMO_MODEL, DEMO_MODEL, llama):
        runner.channel.send(make_command(folder, rows, micro_batch=4))
    runs = [runner.until_last() for _ in range(3)]
    assert [only(messages, Loaded).was_warm for messages in runs] == [False, True, False]
    assert {row: result.text for row, result in results_of(runs[1]).items()} == {row: str(row + 40) for row in range(10, 20)}
    assert all(isinstance(messages[-1], Finished) for messages in runs)


def test_rows_are_in_flight_before_their_results(runner: Runner) -> None:
    """Rows are announced before they run, never more than may run together, and every result is of a row that was announced."""
    runner.channel.send(make_command(DEMO_MODEL, [work_row(index, "1+1=") for index in range(5)], micro_batch=2))
    announced: set[int] = set()
    for message in runner.until_last():
        match message:
            case BatchStarted(rows=rows):
                assert 0 < len(rows) <= 2
                announced |= set(rows)
            case BatchDone(results=results):
                assert {result.row for result in results} <= announced
    assert announced == set(range(5))


def test_a_stop_is_heeded_in_the_middle(runner: Runner, llama: Path) -> None:
    """A Stop that arrives while rows are generated ends the plan with Stopped; a late one does not touch the next plan."""
    runner.channel.send(make_command(llama, [work_row(index, "hello", max_new_tokens=900) for index in range(8)]))
    runner.until(BatchStarted)
    runner.channel.send(Stop())
    assert isinstance(runner.until_last()[-1], Stopped)
    runner.channel.send(Stop())
    runner.channel.send(make_command(llama, [work_row(0, "hello", max_new_tokens=2)]))
    assert isinstance(runner.until_last()[-1], Finished)


def test_a_surprise_ends_the_plan_and_not_the_runner(llama: Path) -> None:
    """What nobody expected fails the attempt with the error's kind; the next plan runs."""
    with Runner("tests.runner.faulty_runner") as runner:
        runner.channel.send(make_command(llama, [work_row(0, "[surprise]", max_new_tokens=2)]))
        failure = only(runner.until_last(), AttemptFailed)
        assert (failure.code, failure.error_type) == ("runner_error", "LookupError")
        runner.channel.send(make_command(llama, [work_row(0, "hello", max_new_tokens=2)]))
        assert isinstance(runner.until_last()[-1], Finished)


def test_a_runner_leaves_when_its_device_cannot_be_used(llama: Path) -> None:
    """The attempt fails as it would anyway, and then the process ends: every later plan would fail in it, too."""
    command = make_command(llama, [work_row(0, "hello", max_new_tokens=2)])
    with Runner("workers.runner") as runner:
        runner.channel.send(replace(command, placement=replace(command.placement, device_id="no-such-device")))
        failure = only(runner.until_last(), AttemptFailed)
        assert failure.error_type == "RuntimeError"
        assert runner.channel.receive() is None
        assert runner.process.wait(timeout=PATIENCE) == DEVICE_LOST


@pytest.fixture
def file_limit(runner: Runner) -> Iterator[Callable[[int], None]]:
    """Sets how many bytes a file of the runner may have: the error path of a full disk, without one."""
    before = resource.prlimit(runner.process.pid, resource.RLIMIT_FSIZE)

    def limit(most: int) -> None:
        resource.prlimit(runner.process.pid, resource.RLIMIT_FSIZE, (most, before[1]))

    yield limit
    resource.prlimit(runner.process.pid, resource.RLIMIT_FSIZE, before)


def test_a_full_disk_fails_the_pass_before_rows_are_reported(
    runner: Runner, file_limit: Callable[[int], None], tmp_path: Path
) -> None:
    """When the first pages do not fit on the disk the pass fails, no result is reported and no file is left."""
    file_limit(8192)
    runner.channel.send(paged([work_row(0, "1+1=" * 20)], tmp_path))
    messages = runner.until_last()
    failure = only(messages, SpecializationFailed)
    assert failure.reason == "disk-cache: the KV cache cannot be written or read back: File too large"
    assert not of_kind(messages, BatchDone)
    assert not list(tmp_path.iterdir())


def paged(rows: list[WorkRow], cache_dir: Path, model: Path = DEMO_MODEL) -> Execute:
    """A plan with its cache in files."""
    return make_command(model, rows, passes=(PassId.DISK_CACHE,), kv=KVCacheStrategy.PAGED, cache_dir=cache_dir)


@pytest.mark.parametrize("end", ["socket", "sigterm"])
def test_the_runner_leaves_cleanly(llama: Path, tmp_path: Path, end: str) -> None:
    """When its supervisor closes the socket, or asks it to end, the runner ends in mid-work and leaves no file."""
    with Runner("workers.runner") as runner:
        runner.channel.send(paged([work_row(0, "hello", max_new_tokens=900)], tmp_path, model=llama))
        runner.until(BatchStarted)
        wait_for(lambda: list(tmp_path.rglob("*.pages")), timeout=PATIENCE, what="pages on disk")
        if end == "socket":
            runner.connection.close()
        else:
            runner.process.send_signal(signal.SIGTERM)
        assert runner.process.wait(timeout=PATIENCE) == (0 if end == "socket" else 128 + signal.SIGTERM)
        assert not list(tmp_path.iterdir())


def test_a_killed_runner_leaves_an_orphan_for_the_next(runner: Runner, llama: Path, tmp_path: Path) -> None:
    """Files of a runner that was killed are deleted by the next one that uses the cache folder."""
    with Runner("workers.runner") as victim:
        victim.channel.send(paged([work_row(0, "hello", max_new_tokens=900)], tmp_path, model=llama))
        victim.until(BatchStarted)
        victim.process.kill()
        victim.process.wait(timeout=PATIENCE)
    assert list(tmp_path.iterdir())
    runner.channel.send(paged([work_row(0, "1+1=", max_new_tokens=4)], tmp_path))
    assert isinstance(runner.until_last()[-1], Finished)
    assert not list(tmp_path.iterdir())


def test_a_crash_names_its_rows() -> None:
    """A runner that dies in the middle of a micro-batch has announced exactly the rows that were in flight."""
    with Runner("tests.runner.faulty_runner") as runner:
        rows = [work_row(0, "10+20="), work_row(1, "1+2= [crash]"), work_row(2, "10+20= and more text")]
        runner.channel.send(make_command(DEMO_MODEL, rows, micro_batch=1))
        messages = runner.until_last()
        assert runner.process.wait(timeout=PATIENCE) == -signal.SIGSEGV
    # The shortest prompt may have the longest answer, so it comes first.
    assert of_kind(messages, BatchStarted)[-1].rows == (1,)
    assert set(results_of(messages)) == {0}
