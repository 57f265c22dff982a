"""Is there a live runner for this slot, and if not, how did it die?

A RunnerProcess owns at most one child at a time. The child is exec'd (never forked with our state), leads a session of its own so
that it can be killed with everything it started, and speaks framed messages over one socket pair; a thread of ours reads them.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ollm_service.core.wire import LENGTH_BYTES, LONGEST_FRAME, Message, Speed, decode_message, encode_message

DEFAULT_COMMAND = (sys.executable, "-m", "workers.runner")
TAIL_LINES = 40
TAIL_LINE_CHARACTERS = 500
EXIT_SECONDS = 5.0  # between the end of a runner's socket and the end of its process
_TETHER = Path(__file__).with_name("tether.py")
_VMSTAT = Path("/proc/vmstat")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The runner is gone. `cause` is one line for people: a signal, out of memory, an exit code or a broken message."""

    cause: str
    is_out_of_memory: bool = False
    tail: tuple[str, ...] = ()


class Spawner:
    """One thread that lives as long as this process and starts every runner.

    The kernel ends a tied child when the *thread* that started it ends, so no thread of a pool may do that.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="spawner", daemon=True).start()

    def call(self, start: Callable[[], T]) -> T:
        """Run `start` in the permanent thread; returns or raises what it does."""
        future: Future[T] = Future()

        def serve() -> None:
            try:
                future.set_result(start())
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                future.set_exception(error)

        self._requests.put(serve)
        return future.result()

    def _run(self) -> None:
        while True:
            self._requests.get()()


class RunnerProcess:
    """The runner of one slot: started when first needed, kept warm, started again after it died.

    One thread drives it (start, send, receive); `kill` and `terminate` may come from any.
    """

    def __init__(
        self,
        spawner: Spawner,
        command: Sequence[str] = DEFAULT_COMMAND,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._spawner = spawner
        self._command = tuple(command)
        self._environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._inbox: queue.SimpleQueue[Message | Died] = queue.SimpleQueue()
        self.speed: Speed | None = None  # as the latest runner that told it has measured it
        self._sending = threading.Lock()
        self._we_killed_it = False

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def is_usable(self) -> bool:
        """Whether it runs and nobody has told it to end."""
        return self.pid is not None and not self._we_killed_it

    def start(self) -> bool:
        """Make sure that a runner runs; True if a new one was started. Raises OSError where the command cannot be executed."""
        if self.is_usable:
            return False
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            ours.settimeout(None)  # a closing Celery worker sets a process-wide default
            try:
                process = self._spawner.call(lambda: self._spawn(theirs))
            except BaseException:
                ours.close()
                raise
        # A new inbox: nothing of the dead runner may be taken for a message of this one.
        self._process, self._socket, self._inbox, self._we_killed_it = process, ours, queue.SimpleQueue(), False
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        listener = threading.Thread(target=_keep_tail, args=(process, tail), name=f"runner-{process.pid}-stderr", daemon=True)
        listener.start()
        reader = threading.Thread(
            target=self._read,
            args=(process, ours, self._inbox, listener, tail, _kernel_kills()),
            name=f"runner-{process.pid}",
            daemon=True,
        )
        reader.start()
        _log.info("runner-started", extra={"pid": process.pid})
        return True

    def send(self, message: Message) -> bool:
        """Send a message; False if the runner is gone, which `receive` will tell about."""
        connection = self._socket
        if connection is None:
            return False
        try:
            with self._sending:
                connection.sendall(encode_message(message))
        except OSError:
            return False
        return True

    def receive(self, timeout: float) -> Message | Died | None:
        """The next message, or how it died, or None after `timeout` seconds."""
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def terminate(self) -> None:
        """Ask the whole process group to end (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole process group at once (SIGKILL)."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill it and forget it. Returns when the process is gone."""
        process, connection, self._process, self._socket = self._process, self._socket, None, None
        if process is not None:
            self._we_killed_it = True
            if process.poll() is None:
                _kill_group(process.pid)
            process.wait()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        self._we_killed_it = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        descriptor = theirs.fileno()
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
        return subprocess.Popen(
            [*tether, *self._command, "--fd", str(descriptor)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,),
            start_new_session=True,
            env=self._environment,
        )

    def _read(
        self,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        inbox: "queue.SimpleQueue[Message | Died]",
        listener: threading.Thread,
        tail: deque[str],
        kills_before: int,
    ) -> None:
        """Hand on messages until the socket ends, then say how the process did."""
        broken = None
        try:
            while (message := _read_message(connection)) is not None:
                if isinstance(message, Speed):
                    self.speed = message
                else:
                    inbox.put(message)
        except (OSError, ValueError, RecursionError) as error:
            broken = f"it sent something that is no message ({type(error).__name__})"
        try:
            process.wait(timeout=0 if broken else EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            broken = broken or "it closed its socket but went on"
            _kill_group(process.pid)
            process.wait()
        _kill_group(process.pid)  # it may have had children of its own
        listener.join(timeout=1)
        died = _post_mortem(
            process.returncode, broken, tuple(tail), was_ours=self._we_killed_it, kills=_kernel_kills() - kills_before
        )
        if not self._we_killed_it:
            # What libraries print to a terminal; our runner itself prints neither prompts nor answers.
            _log.warning("runner-died", extra={"pid": process.pid, "cause": died.cause, "tail": " | ".join(died.tail[-5:])})
        inbox.put(died)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _read_message(connection: socket.socket) -> Message | None:
    """The next message; None at the end. Raises ValueError for a broken frame, OSError where the socket fails in the middle."""
    header = _read_exactly(connection, LENGTH_BYTES)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > LONGEST_FRAME:
        raise ValueError(f"a frame of {length:,} bytes")
    body = _read_exactly(connection, length)
    return None if body is None else decode_message(body)


def _read_exactly(connection: socket.socket, count: int) -> bytes | None:
    """That many bytes, or None where the peer is gone before."""
    buffer = bytearray(count)
    view, have = memoryview(buffer), 0
    while have < count:
        try:
            got = connection.recv_into(view[have:])
        except ConnectionResetError:
            return None
        if not got:
            return None
        have += got
    return bytes(buffer)


def _keep_tail(process: subprocess.Popen[bytes], tail: deque[str]) -> None:
    """Keep the last lines of what the runner prints; read on, so that it never blocks on a full pipe."""
    stream = process.stdout
    if stream is None:
        return
    with stream:
        while line := stream.readline(8192):
            text = line.decode(errors="replace").strip()
            if text:
                tail.append(text[:TAIL_LINE_CHARACTERS])


def _kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory since this machine (or container) started."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _post_mortem(code: int, broken: str | None, tail: tuple[str, ...], *, was_ours: bool, kills: int) -> Died:
    last_words = tail[-1] if tail else ""
    if code == -signal.SIGKILL and not was_ours and kills > 0:
        return Died(cause="killed by the kernel: out of memory", is_out_of_memory=True, tail=tail)
    if last_words.startswith(
        ("MemoryError", "torch.OutOfMemoryError", "terminate called after throwing an instance of 'std::bad_alloc'")
    ):
        return Died(cause=f"out of memory (exit code {code})", is_out_of_memory=True, tail=tail)
    if broken is not None and code in (0, -signal.SIGKILL):
        return Died(cause=broken, tail=tail)
    if code < 0:
        return Died(cause=f"killed by {_signal_name(-code)}" + (", sent by its worker" if was_ours else ""), tail=tail)
    return Died(cause=f"exit code {code}", tail=tail)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
