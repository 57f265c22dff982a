"""How does the runner live? Started by a supervisor with `--fd N`, it says Hello, carries out plans, and ends with its socket."""

import argparse
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from threading import Event
from types import FrameType
from typing import NoReturn, Protocol

from ollm_service.core.wire import AttemptFailed, Execute, Hello, Progress, Speed
from workers.runner.channel import Channel, Inbox
from workers.runner.memory import give_back_what_is_freed
from workers.runner.progress import Report

DEVICE_LOST = 4  # the exit code of a runner whose device went out of its reach
_LOG = logging.getLogger("workers.runner")


class Executes(Protocol):
    """What carries out plans: the engine, or one that a test has wrapped."""

    def execute(self, command: Execute, report: Report, stop: Event) -> None:
        """Carry out one plan, reporting on the way."""

    def abandon(self) -> None:
        """Delete the current plan's files; called from another thread when the supervisor is gone."""

    def has_lost(self, device_id: str) -> bool:
        """Whether this process can use the device no more."""


def load_engine() -> Executes:
    """The real engine. Importing it imports torch and transformers, which takes seconds: only after the Hello."""
    engine: Executes = importlib.import_module("workers.runner.engine").Engine()
    return engine


def measure_speed() -> Speed:
    """How fast the devices are; imports torch, too."""
    speed: Speed = importlib.import_module("workers.runner.speed").measure_speed()
    return speed


def main(arguments: Sequence[str], make_engine: Callable[[], Executes] = load_engine) -> NoReturn:
    """Run until the socket ends, or until a plan's device cannot be used any more: only another process can use it then."""
    parser = argparse.ArgumentParser(prog="python -m workers.runner", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="number of the inherited stream socket to the supervisor")
    channel = Channel(socket.socket(fileno=parser.parse_args(arguments).fd))
    signal.signal(signal.SIGTERM, _leave)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    channel.send(Hello(pid=os.getpid(), versions={name: version(name) for name in ("torch", "transformers")}))
    channel.send(Progress(stage="importing"))
    give_back_what_is_freed()
    engine = make_engine()
    channel.send(measure_speed())

    def end() -> None:
        engine.abandon()
        os._exit(0)

    inbox = Inbox(channel, on_end=end)
    while True:
        command = inbox.next()
        try:
            engine.execute(command.execute, channel.send, command.stop)
        except Exception as error:  # noqa: BLE001 - whatever a model or a library raises must end this plan, not the runner
            _LOG.warning(
                "attempt_failed plan_id=%s attempt=%d error_type=%s",
                command.execute.plan_id,
                command.execute.attempt,
                type(error).__name__,
            )
            channel.send(
                AttemptFailed(
                    stage="generating",
                    code="runner_error",
                    message=f"The runner failed: {type(error).__name__}.",
                    error_type=type(error).__name__,
                )
            )
        if engine.has_lost(command.execute.placement.device_id):
            _LOG.warning("device_lost plan_id=%s device_id=%s", command.execute.plan_id, command.execute.placement.device_id)
            os._exit(DEVICE_LOST)  # what is left to tidy up would need the device


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM unwinds the main thread, so that the current plan's files are deleted."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
