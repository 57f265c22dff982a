"""What answers a client in tests? The real app on a real port, a proxy that cuts connections, a server that plays a script."""

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import uvicorn

from ollm_service.api.app import create_app
from ollm_service.coordinator.service import Service
from tests.servers import LOOPBACK
from tests.waiting import wait_for


class LiveService:
    """A service's app, served by uvicorn from a thread of this process."""

    def __init__(self, service: Service, port: int = 0) -> None:
        self.service = service
        self._socket = socket.create_server((LOOPBACK, port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{LOOPBACK}:{self.port}"
        config = uvicorn.Config(create_app(service), log_config=None, lifespan="off", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_for(lambda: self._server.started, timeout=10, what="the app to answer")
        return self

    def __exit__(self, *_: object) -> None:
        self.service.stopping.set()
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()


class CuttingProxy:
    """Passes connections on to a port. `cut` says after how many bytes of answer each connection is cut; later ones live."""

    def __init__(self, port: int, cut: Sequence[int]) -> None:
        self._upstream = port
        self._cuts = list(cut)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            most = self._cuts.pop(0) if self._cuts else None
            far = socket.create_connection((LOOPBACK, self._upstream))
            for source, target, limit in ((near, far, None), (far, near, most)):
                threading.Thread(target=self._pump, args=(source, target, limit), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, most: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(4096):
                if most is not None and passed + len(chunk) >= most:
                    target.sendall(chunk[: most - passed])
                    break
                target.sendall(chunk)
                passed += len(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


Answer = tuple[int, bytes]


class ScriptedServer:
    """Gives the answers of a script in order, and the last one again and again; `requests` are the bodies that came."""

    def __init__(self, *answers: Answer) -> None:
        self.requests: list[bytes] = []
        self._answers = list(answers)
        self._server = ThreadingHTTPServer((LOOPBACK, 0), self._handler())
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def _next(self, body: bytes) -> Answer:
        self.requests.append(body)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take: Callable[[bytes], Answer] = self._next

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                status, body = take(self.rfile.read(int(self.headers.get("content-length", 0))))
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _reply  # noqa: N815 - the names that http.server looks for

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        return Handler
