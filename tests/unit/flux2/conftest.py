"""A Hub on this machine, and the embedded model as a `Source`."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.source import Source, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub(ThreadingHTTPServer):
    """Serves `folder` as the model repository acme/flux2, the way the Hub does. Its moods are set by the tests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str]] = []
        """Method and file name of every request for a file."""
        self.tokens: list[str | None] = []
        self.refusal: tuple[int, str] | None = None
        """Status and error code for every file."""
        self.absence: tuple[int, str] | None = None
        """Status and error code for the repository itself."""
        self.broken: dict[str, int] = {}
        """How many more times a download of this file breaks off half-way."""
        self.failing: set[str] = set()
        self.size_shown: int | None = None

    def downloads(self) -> list[str]:
        return [name for method, name in self.asked if method == "GET"]


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
        if re.fullmatch(r"/api/models/acme/flux2(/revision/\w+)?", path):
            if hub.absence is not None:
                self.refuse(*hub.absence)
            elif path.endswith("/revision/nowhere"):
                self.refuse(404, "RevisionNotFound")
            else:
                self.listing()
        elif match := re.fullmatch(r"/acme/flux2/resolve/(\w+)/(.+)", path):
            hub.asked.append((self.command, match[2]))
            if hub.refusal is not None:
                self.refuse(*hub.refusal)
            elif self.command == "GET" and match[2] in hub.failing:
                self.refuse(500, "")
            else:
                self.file(match[2])
        else:
            self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self) -> None:
        files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
        siblings = [
            {
                "rfilename": path.relative_to(self.server.folder).as_posix(),
                "size": self.server.size_shown or path.stat().st_size,
            }
            for path in files
        ]
        body = json.dumps({"id": "acme/flux2", "modelId": "acme/flux2", "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name: str) -> None:
        body = (self.server.folder / name).read_bytes()
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else 0
        self.send_response(206 if ranged else 200)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body) - start))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.broken.get(name, 0) > 0:
            self.server.broken[name] -= 1
            self.wfile.write(body[start : (start + len(body)) // 2])
            self.close_connection = True
            return
        self.wfile.write(body[start:])


@pytest.fixture
def repository(tiny_folder: Path, tmp_path: Path) -> Path:
    """The embedded model's folder, to be changed at will: the files are hard links until they are replaced."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_folder, folder, copy_function=lambda source, target: Path(target).hardlink_to(source))
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[LoopbackHub]:
    server = LoopbackHub(repository)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def tiny_source(tiny_folder: Path) -> Source:
    """The embedded model, as every loader wants it."""
    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder))
    return locate(options, report=print)
