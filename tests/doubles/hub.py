"""A model hub on loopback that speaks the protocol of the real one: revisions, files with ranges, gates, and broken connections.

GET  /api/models/REPO[/revision/REV]   its commit and its files with their sizes; 401 or 404 with the hub's `X-Error-Code`
GET  /REPO/resolve/REV/FILE            a file, `Range` honoured
"""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.servers import LOOPBACK

BLOCK_BYTES = 64 * 1024
LFS_BYTES = 10_000  # larger files are listed with their sha256, as the hub keeps them elsewhere


@dataclass
class Repo:
    """A repository: the files of a folder. `token` is needed where it is gated; `sizes` are listed in place of the true ones."""

    folder: Path
    token: str | None = None
    revisions: tuple[str, ...] = ("main",)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(sorted(self.files())).encode(), usedforsecurity=False).hexdigest()

    def files(self) -> list[str]:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)


class Hub:
    """The server. `served` counts the bytes of each file that went out, `asked` the requests for it, `ranges` those of a part.

    `cuts` are the numbers of bytes after which the next answers with a large file end, in the middle; `held` files stop after
    half of theirs until `go_on` is set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.served: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.ranges: list[tuple[str, int]] = []
        self.tokens: set[str] = set()
        self.cuts: list[int] = []
        self.held: set[str] = set()
        self.is_held = threading.Event()
        self.go_on = threading.Event()
        self._server = ThreadingHTTPServer((LOOPBACK, 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def add(self, name: str, folder: Path, **about: Any) -> Repo:
        """Offer a folder as a repository."""
        self.repos[name] = Repo(folder=folder, **about)
        return self.repos[name]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            with contextlib.suppress(ConnectionError):
                self._route()

        do_GET = do_HEAD = _answer  # noqa: N815 - the names that http.server looks for

        def _route(self) -> None:
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            if token:
                hub.tokens.add(token)
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                self._list("/".join(parts[2:4]), "/".join(parts[5:]) or "main", token)
            elif len(parts) > 4 and parts[2] == "resolve":
                self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
            else:
                self._refuse(404, "RepoNotFound")

        def _repo(self, name: str, revision: str, token: str) -> Repo | None:
            repo = hub.repos.get(name)
            if repo is None:
                self._refuse(401, "RepoNotFound")  # the hub does not say whether it is private
            elif repo.token is not None and token != repo.token:
                self._refuse(401, "GatedRepo")
            elif revision not in (*repo.revisions, repo.commit):
                self._refuse(404, "RevisionNotFound")
            else:
                return repo
            return None

        def _list(self, name: str, revision: str, token: str) -> None:
            repo = self._repo(name, revision, token)
            if repo is None:
                return
            siblings: list[dict[str, Any]] = []
            for file in repo.files():
                content = (repo.folder / file).read_bytes()
                size = repo.sizes.get(file, len(content))
                sibling = {"rfilename": file, "size": size, "blobId": "b"}
                if len(content) > LFS_BYTES:
                    sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 1}
                siblings.append(sibling)
            self._send(200, json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode())

        def _send_file(self, name: str, revision: str, file: str, token: str) -> None:
            repo = self._repo(name, revision, token)
            if repo is None:
                return
            if file not in repo.files():
                self._refuse(404, "EntryNotFound")
                return
            content = (repo.folder / file).read_bytes()
            start = 0
            asked = self.headers.get("range")
            if asked:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                hub.ranges.append((file, start))
            hub.asked[file] += 1
            body = content[start:]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("x-repo-commit", repo.commit)
            self.end_headers()
            if self.command == "HEAD":
                return
            is_large = len(content) > LFS_BYTES
            self._send_body(file, body, most=hub.cuts.pop(0) if is_large and hub.cuts else len(body), start=start)

        def _send_body(self, file: str, body: bytes, *, most: int, start: int) -> None:
            half = len(body) // 2 if file in hub.held else None
            for at in range(0, min(most, len(body)), BLOCK_BYTES):
                if half is not None and at >= half and not hub.go_on.is_set():
                    hub.is_held.set()
                    hub.go_on.wait(60)
                block = body[at : min(at + BLOCK_BYTES, most)]
                self.wfile.write(block)
                hub.served[file] += len(block)
            if most < len(body):
                self.close_connection = True
                self.connection.close()

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, json.dumps({"error": code}).encode(), {"x-error-code": code})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"content-type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    return Handler
