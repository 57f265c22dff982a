"""Does the supervisor start, feed and bury real processes?"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from ollm_service.core.wire import BatchDone, BatchStarted, Finished, Hello, Loaded, Message, Progress, Stop, Stopped
from tests.waiting import wait_for
from tests.worker.samples import order_of
from workers.supervisor import Died, RunnerProcess, Spawner

SCRIPTED = (sys.executable, "-m", "tests.doubles.scripted_runner")
SECONDS = 20.0


@pytest.fixture(scope="module")
def spawner() -> Spawner:
    """The permanent thread that starts runners."""
    return Spawner()


@pytest.fixture
def runner(spawner: Spawner) -> Iterator[RunnerProcess]:
    """A scripted runner, not yet started."""
    process = RunnerProcess(spawner, SCRIPTED)
    yield process
    process.close()


def until(runner: RunnerProcess, *kinds: type) -> list[Message | Died]:
    """Every message up to the first of these kinds or a death."""
    seen: list[Message | Died] = []
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        message = runner.receive(timeout=0.2)
        if message is None:
            continue
        seen.append(message)
        if isinstance(message, (*kinds, Died)):
            return seen
    raise AssertionError(f"none of {kinds} in {SECONDS} s; saw {[type(message).__name__ for message in seen]}")


def death(runner: RunnerProcess) -> Died:
    """How it died."""
    last = until(runner, Died)[-1]
    assert isinstance(last, Died)
    return last


def test_a_runner_answers_and_stays_warm(runner: RunnerProcess) -> None:
    """Two plans in a row are answered by one process, and the second finds the model warm."""
    assert runner.start() is True
    runner.send(order_of("one two", "three"))
    messages = until(runner, Finished)
    assert [type(message) for message in messages] == [Hello, Loaded, BatchStarted, BatchDone, Finished]
    done = messages[3]
    assert isinstance(done, BatchDone)
    assert [result.text for result in done.results] == ["ONE TWO", "THREE"]
    pid = runner.pid
    assert runner.start() is False
    runner.send(order_of("four"))
    loaded = until(runner, Finished)[0]
    assert isinstance(loaded, Loaded)
    assert loaded.was_warm
    assert runner.pid == pid


@pytest.mark.parametrize(
    ("word", "cause"),
    [("[crash]", "killed by SIGSEGV"), ("[exit]", "exit code 3"), ("[oom]", "out of memory (exit code 1)")],
)
def test_a_death_is_reported_with_its_cause(runner: RunnerProcess, word: str, cause: str) -> None:
    """A signal, an exit code and an end for want of memory are told apart, and the next runner is another process."""
    runner.start()
    runner.send(order_of(word))
    died = death(runner)
    assert died.cause == cause
    assert died.is_out_of_memory == (word == "[oom]")
    assert runner.pid is None
    assert runner.start() is True
    runner.send(order_of("well"))
    assert isinstance(until(runner, Finished)[-1], Finished)


def test_garbage_is_a_death(runner: RunnerProcess) -> None:
    """A runner that sends what is no message is killed: nothing after it could be trusted."""
    runner.start()
    runner.send(order_of("[garbage] [hang]"))
    assert "no message" in death(runner).cause
    assert runner.pid is None


def test_stop_ends_the_plan_and_keeps_the_runner(runner: RunnerProcess) -> None:
    """A runner that is asked to stop says so and takes the next plan."""
    runner.start()
    runner.send(order_of("[slow=60]"))
    until(runner, BatchStarted)
    runner.send(Stop())
    assert isinstance(until(runner, Stopped)[-1], Stopped)
    runner.send(order_of("again"))
    assert isinstance(until(runner, Finished)[-1], Finished)


def test_a_runner_that_heeds_nothing_is_killed(runner: RunnerProcess) -> None:
    """SIGKILL ends it though it ignores Stop, and the cause says who sent the signal."""
    runner.start()
    runner.send(order_of("[stubborn]"))
    until(runner, Progress)
    runner.send(Stop())
    runner.kill()
    assert death(runner).cause == "killed by SIGKILL, sent by its worker"


def test_the_kill_takes_the_runners_own_children(spawner: Spawner, tmp_path: Path) -> None:
    """What a runner started does not survive it."""
    marker = tmp_path / "child"
    script = f"sleep 600 & echo $! > {marker}.new; mv {marker}.new {marker}; wait"
    runner = RunnerProcess(spawner, ("/bin/sh", "-c", script))
    runner.start()
    wait_for(marker.exists, timeout=SECONDS, what="the child of the runner")
    child = int(marker.read_text())
    runner.kill()
    death(runner)
    wait_for(lambda: is_gone(child), timeout=SECONDS, what="the end of the runner's child")
    runner.close()


def test_sending_to_the_dead_tells_so(runner: RunnerProcess) -> None:
    """A message that cannot be delivered is no exception: its death is what `receive` tells."""
    runner.start()
    runner.send(order_of("[exit]"))
    death(runner)
    assert wait_for(lambda: not runner.send(Stop()), timeout=SECONDS, what="a send to fail")


def test_a_command_that_does_not_exist_is_a_death(spawner: Spawner) -> None:
    """A wrong runner command shows as a runner that dies at once, with what it said."""
    runner = RunnerProcess(spawner, ("/nonexistent/runner",))
    runner.start()
    died = death(runner)
    assert died.cause == "exit code 1"
    assert any("No such file" in line for line in died.tail)
    runner.close()


def test_a_chatty_runner_is_not_blocked_and_its_tail_is_bounded(spawner: Spawner) -> None:
    """What it prints is read all the time, and only the end is kept."""
    script = "import sys\nfor n in range(50_000): print(n, 'x' * 100)\nsys.exit(7)"
    runner = RunnerProcess(spawner, (sys.executable, "-c", script))
    runner.start()
    died = death(runner)
    assert died.cause == "exit code 7"
    assert len(died.tail) == 40
    assert died.tail[-1].startswith("49999")
    runner.close()


def test_the_kernel_prefers_a_runner_when_memory_runs_out(runner: RunnerProcess) -> None:
    """A runner's oom score is raised."""
    runner.start()
    until(runner, Hello)
    assert Path(f"/proc/{runner.pid}/oom_score_adj").read_text().strip() == "800"


def test_a_short_lived_thread_may_start_a_runner(runner: RunnerProcess) -> None:
    """The kernel's tie is to the thread that forked: it must not be the one that asked."""
    thread = threading.Thread(target=runner.start)
    thread.start()
    thread.join()
    until(runner, Hello)
    runner.send(order_of("alive"))
    assert isinstance(until(runner, Finished)[-1], Finished)


WORKER = """
import sys
from tests.worker.samples import order_of
from workers.supervisor import RunnerProcess, Spawner
runner = RunnerProcess(Spawner(), (sys.executable, "-m", "tests.doubles.scripted_runner"))
runner.start()
runner.send(order_of(sys.argv[1]))
while not type(runner.receive(1)).__name__ == "BatchStarted":
    pass
print(runner.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("word", ["[hang]", "[slow=600]", "[stubborn]"])
def test_a_runner_dies_with_its_worker(word: str) -> None:
    """When the worker is killed with -9, no runner is left, whatever it was doing."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER, word], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    assert not is_gone(pid)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: is_gone(pid), timeout=SECONDS, what="the runner to follow its worker")
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            stream.close()


def is_gone(pid: int) -> bool:
    """Whether no such process runs; one that only waits to be reaped is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_processes_are_led_by_their_runner(runner: RunnerProcess) -> None:
    """A runner leads a session of its own, so that a signal to the worker's group does not reach it."""
    runner.start()
    until(runner, Hello)
    pid = runner.pid
    assert pid is not None
    assert os.getsid(pid) == pid != os.getsid(0)


def test_close_is_final_and_repeatable(runner: RunnerProcess) -> None:
    """close() leaves no process behind and may be called again."""
    runner.start()
    pid = runner.pid
    assert pid is not None
    runner.close()
    runner.close()
    wait_for(partial(is_gone, pid), timeout=SECONDS, what="the process to be gone")
