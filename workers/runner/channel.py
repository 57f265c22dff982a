"""How do messages travel between the runner and its supervisor?

A channel is one stream socket; frames are those of `ollm_service.core.wire`. Any thread may send; one thread reads.
"""

import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ollm_service.core.wire import LENGTH_BYTES, LONGEST_FRAME, Execute, Message, Stop, decode_message, encode_message


class Channel:
    """One end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        frame = encode_message(message)
        with self._sending:
            self._connection.sendall(frame)

    def receive(self) -> Message | None:
        """The next message, or None at the end of the socket. Raises ValueError for a malformed frame."""
        header = self._read(LENGTH_BYTES)
        if header is None:
            return None
        length = int.from_bytes(header, "big")
        if length > LONGEST_FRAME:
            raise ValueError(f"a frame of {length:,} bytes is too long")
        body = self._read(length)
        return None if body is None else decode_message(body)

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._connection.recv(min(count - len(parts), 1 << 20))
            except ConnectionError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A plan to execute, and the event that is set when the supervisor wants it stopped."""

    execute: Execute
    stop: threading.Event = field(default_factory=threading.Event)


class Inbox:
    """Commands in the order in which they came, read by a thread of its own so that a Stop acts between two steps.

    `on_end` is called in that thread when the supervisor is gone, or sends what cannot be understood.
    """

    def __init__(self, channel: Channel, on_end: Callable[[], None]) -> None:
        self._channel = channel
        self._on_end = on_end
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._newest: Command | None = None
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> Command:
        """Wait for the next plan."""
        return self._commands.get()

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except ValueError:
                message = None
            match message:
                case Execute():
                    self._newest = Command(execute=message)
                    self._commands.put(self._newest)
                case Stop():
                    # A Stop belongs to the newest plan; one that comes after that plan's end has no effect.
                    if self._newest is not None:
                        self._newest.stop.set()
                case _:
                    self._on_end()
                    return
