"""A Hub on this machine: real sockets, real HTTP, and each way in which the real one fails."""

import contextlib
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", "tokenizer.json")
"""Endings of the files that the Hub names by their sha256 and may redirect to its CDN."""

SLOW_BYTES = 2**18


@dataclass(frozen=True)
class HubRequest:
    """A request for one file of a repository."""

    method: str
    repo: str
    name: str
    first_byte: int
    """Of a Range; 0 without one."""


class LoopbackHub(ThreadingHTTPServer):
    """Serves each folder of `repositories` as the model repository of that id, at one commit. Tests set its moods."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, repositories: Mapping[str, Path], host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.repositories = dict(repositories)
        self.url = f"http://{host}:{self.server_port}"
        self.commit = COMMIT
        self.listings: Counter[str] = Counter()
        """How often each repository was listed."""
        self.requests: list[HubRequest] = []
        self.bytes_sent: Counter[str] = Counter()
        """Bytes of each file's content."""
        self.tokens: list[str | None] = []
        self.refusal: tuple[int, str] | None = None
        """Status and error code for every file."""
        self.absence: tuple[int, str] | None = None
        """Status and error code for the repository itself."""
        self.broken: dict[str, int] = {}
        """How many more times a download of this file ends half-way, as if it were whole."""
        self.reset: set[str] = set()
        """Files whose connection is reset half-way, once."""
        self.damaged: set[str] = set()
        """Files that are sent with one byte changed."""
        self.longer: set[str] = set()
        """Files of which one more byte comes than was announced before."""
        self.failing: set[str] = set()
        """Files whose download is answered with a 500."""
        self.slow: set[str] = set()
        """Files of which the last `SLOW_BYTES` come 1 KiB at a time."""
        self.size_shown: int | None = None
        self.is_silent = False
        """Takes requests and never answers."""
        self.is_login_page = False
        """Answers everything with a page of HTML, as a hotel does."""
        self.cdn: LoopbackHub | None = None
        """Another host that large files are redirected to."""
        self.offers_xet = False
        """Says of large files that they can also be had over Xet, which is not served here."""
        self.ended = threading.Event()
        self.connections: set[socket.socket] = set()
        """Open ones, which a client may keep for its next request."""

    def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self.connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self.connections.discard(request)

    def server_close(self) -> None:
        """Stop listening, and end the connections that clients keep: a closed hub answers nobody."""
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def downloads(self) -> list[str]:
        """The name of each file that was asked for, as often as it was."""
        return [request.name for request in self.requests if request.method == "GET"]

    def forget(self) -> None:
        """Count from here."""
        self.listings.clear()
        self.requests.clear()
        self.bytes_sent.clear()


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        hub.tokens.append(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if hub.is_silent:
            hub.ended.wait()
            self.close_connection = True
        elif hub.is_login_page:
            self.answer(200, b"<html>Welcome to the hotel</html>")
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(/revision/\w+)?", path):
            hub.listings[match[1]] += 1
            if hub.absence is not None:
                self.answer(hub.absence[0], b"", {"X-Error-Code": hub.absence[1]})
            elif match[1] not in hub.repositories:
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})  # to strangers it may be a private one
            elif match[2] == "/revision/nowhere":
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                self.listing(match[1])
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            self.file(HubRequest(self.command, match[1], match[3], int(ranged[1]) if ranged else 0))
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def listing(self, repo: str) -> None:
        siblings = []
        folder = self.server.repositories[repo]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = self.server.size_shown or path.stat().st_size
            sibling = {"rfilename": path.relative_to(folder).as_posix(), "size": size, "blobId": git_hash(path)}
            if path.name.endswith(LARGE):
                sibling["lfs"] = {"size": size, "sha256": sha256(path), "pointerSize": 134}
            siblings.append(sibling)
        self.answer(200, json.dumps({"id": repo, "sha": self.server.commit, "siblings": siblings}).encode())

    def file(self, request: HubRequest) -> None:
        hub = self.server
        hub.requests.append(request)
        path = hub.repositories[request.repo] / request.name
        if hub.refusal is not None:
            self.answer(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
            return
        if request.method == "GET" and request.name in hub.failing:
            self.answer(500, b"")
            return
        is_large = path.name.endswith(LARGE)
        etag = sha256(path) if is_large else git_hash(path)
        body = path.read_bytes()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit}
        if is_large and hub.offers_xet:
            headers |= {"X-Xet-Hash": etag, "X-Xet-Refresh-Route": "/xet"}
        if is_large and hub.cdn is not None:
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(body))}
            self.answer(302, b"", {**headers, **linked, "Location": hub.cdn.url + self.path})
            return
        if request.name in hub.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if request.name in hub.longer and request.method == "GET":
            body += b" "
        rest = body[request.first_byte :]
        if request.first_byte:
            headers["Content-Range"] = f"bytes {request.first_byte}-{len(body) - 1}/{len(body)}"
        if request.method == "HEAD":
            self.answer(200, body, headers)
            return
        self.answer(206 if request.first_byte else 200, b"", {**headers, "Content-Length": str(len(rest))})
        half = len(rest) // 2
        if hub.broken.get(request.name, 0) > 0:
            hub.broken[request.name] -= 1
            self.send(request.name, rest[:half])
            self.close_connection = True
        elif request.name in hub.reset:
            hub.reset.discard(request.name)
            self.send(request.name, rest[:half])
            time.sleep(0.1)  # a reset discards what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif request.name in hub.slow:
            fast = max(0, len(rest) - SLOW_BYTES)
            self.send(request.name, rest[:fast])
            for start in range(fast, len(rest), 1024):
                if hub.ended.wait(0.05):
                    break
                self.send(request.name, rest[start : start + 1024])
        else:
            self.send(request.name, rest)

    def send(self, name: str, part: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone
            self.wfile.write(part)
            self.wfile.flush()
            self.server.bytes_sent[name] += len(part)


def sha256(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns, path.stat().st_size, is_git=False)


def git_hash(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns, path.stat().st_size, is_git=True)


@functools.cache
def _digest(path: Path, changed: int, size: int, is_git: bool) -> str:  # noqa: ARG001  `changed` is for the cache
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest() if is_git else hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def loopback_hub(repositories: Mapping[str, Path], host: str = "127.0.0.1") -> Iterator[LoopbackHub]:
    """A `LoopbackHub` that serves until the block ends, or until `shutdown` and `server_close` are called."""
    server = LoopbackHub(repositories, host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def linked_copy(folder: Path, target: Path) -> Path:
    """`folder` copied to `target`, to be changed at will: the files are hard links until they are replaced."""
    for file in folder.rglob("*"):
        if file.is_file():
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.hardlink_to(file)
    return target
