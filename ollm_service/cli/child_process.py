"""How is one part of the embedded service kept running? Started tied to us, watched, started again, ended in order."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

TETHER = Path(__file__).with_name("tether.py")
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 30.0  # having lived for so long, its next end is a new one
LARGEST_LOG_BYTES = 16 * 1024**2


class ChildProcess:
    """One process, whose output goes to a log file. The thread that starts it must be the one that ends last: the main one."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = tuple(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._log_offset = 0
        self._due: float | None = None
        self._pause = FIRST_PAUSE

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How it ended, as a shell would tell it; None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C at the terminal reaches us alone."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > LARGEST_LOG_BYTES:
                os.replace(self.log, self.log.with_suffix(".log.1"))
        with self.log.open("ab") as output:
            self._log_offset = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        self._started, self._due = time.monotonic(), None

    def revive(self) -> str | None:
        """Start it again where it has ended, after a pause that grows from one end to the next; what there is to say about it."""
        if self.is_running:
            return None
        now = time.monotonic()
        if self._due is None:
            if now - self._started > STEADY_SECONDS:
                self._pause = FIRST_PAUSE
            self._due, pause = now + self._pause, self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            return f"{self.name} {self.how_it_ended()}; it starts again in {pause:g} s (see {self.log})"
        if now >= self._due:
            self.start()
            return f"{self.name} starts again"
        return None

    def how_it_ended(self) -> str:
        """`was killed by SIGKILL`, `ended with exit code 1`."""
        status = self.exit_status
        if status is None:
            return "runs"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with exit code {status}"

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill_family(self) -> None:
        """SIGKILL to it and to everything that it started."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=5)
        self._process.wait()

    def said(self) -> str:
        """What it has printed since it was started last."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._log_offset)
            return log.read().decode(errors="replace").strip()
        return ""
