"""What does a lost connection look like? A TCP proxy before PostgreSQL that cuts it exactly at a COMMIT, on either side of it."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Literal, Self

from tests.servers import LOOPBACK

Cut = Literal["before", "after", "partition"]
COMMIT = b"COMMIT\0"
_CHUNK = 65_536


class CutProxy:
    """Forwards every byte, until told to cut the next connection that says COMMIT.

    `before`: the server sees a closed connection, so nothing has happened. `partition`: the same, but the server is not told
    either and keeps the transaction open. `after`: the server has committed, but its answer is lost.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._plan: list[Cut] = []
        self._lock = threading.Lock()
        self._left_open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *when: Cut) -> None:
        """Cut the next COMMITs, in this order."""
        with self._lock:
            self._plan = list(when)

    @property
    def is_done(self) -> bool:
        """Whether every cut was made."""
        with self._lock:
            return not self._plan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self._listener)
        for server in self._left_open:
            _close(server)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOOPBACK, self._target_port))
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        silenced = threading.Event()
        back = threading.Thread(target=self._back, args=(client, server, silenced), daemon=True)
        back.start()
        is_partition = False
        with contextlib.suppress(OSError):
            for data in _chunks(client):
                when = self._next_cut() if COMMIT in data else None
                is_partition = when == "partition"
                if when in ("before", "partition"):
                    break
                if when == "after":
                    silenced.set()
                    server.sendall(data)
                    back.join(timeout=10)
                    break
                server.sendall(data)
        _close(client)
        if is_partition:
            self._left_open.append(server)
        else:
            _close(server)

    def _next_cut(self) -> Cut | None:
        with self._lock:
            return self._plan.pop(0) if self._plan else None

    def _back(self, client: socket.socket, server: socket.socket, silenced: threading.Event) -> None:
        with contextlib.suppress(OSError):
            for data in _chunks(server):
                if silenced.is_set():
                    return  # this was the answer to COMMIT: the server has done it
                client.sendall(data)
        _close(client)


def _close(side: socket.socket) -> None:
    """Close for good, even while another thread reads from it."""
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
    side.close()


def _chunks(source: socket.socket) -> Iterator[bytes]:
    while data := source.recv(_CHUNK):
        yield data
