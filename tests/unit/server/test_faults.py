"""An error of the operating system becomes an error response, not a bug of the server."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """A limit of this process, for a while."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


READS = [
    ("/api/environments", {}),
    ("/api/environment", {"name": "mine"}),
    ("/api/folders", {}),
    ("/api/picture", {"path": "pictures/picture-0.png"}),
    ("/api/picture", {"path": "pictures/picture-0.png", "width": 64}),
    ("/api/caption", {"path": "pictures/picture-0.png"}),
    ("/api/runs", {}),
    ("/api/run", {"run": "output/mine"}),
    ("/api/run/log", {"run": "output/mine"}),
    ("/api/queue", {}),
]


@pytest.fixture
def run(workspace: Path) -> Path:
    folder = workspace / "output" / "mine"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("")
    (folder / "run.log").write_text("a line\n")
    return folder


@pytest.mark.usefixtures("environment", "run")
def test_without_a_free_file_handle_no_answer_is_a_bug(client: TestClient) -> None:
    for path, params in READS:
        assert client.get(path, params=params).status_code in (200, 404)  # imports what it needs at its first use
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        with limited(resource.RLIMIT_NOFILE, free):
            assert client.get(path, params=params).status_code != 500, path  # a bug would be raised here
        assert client.get(path, params=params).status_code in (200, 404)


def test_without_a_free_file_handle_no_command_is_a_bug(client: TestClient, environment: str) -> None:
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    body = {"name": environment, "config": "{}"}
    with limited(resource.RLIMIT_NOFILE, free):
        answer = client.post("/api/check", json=body)
        started = client.post("/api/run/start", json={"environment": environment})
    assert {answer.status_code, started.status_code} <= {403, 422, 503, 507}, (answer.text, started.text)


def test_on_a_full_disk_every_write_is_told(client: TestClient, workspace: Path, environment: str) -> None:
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    shown = client.get("/api/environment", params={"name": environment}).json()["documents"]["config"]
    change = {"text": json.dumps({"seed": 1}), "revision": shown["revision"]}
    where = {"name": environment, "document": "config"}
    with limited(resource.RLIMIT_FSIZE, 0):  # refused as by a full disk: no byte fits
        answers = [
            client.put("/api/environment/document", params=where, json=change),
            client.put(
                "/api/caption", params={"path": "pictures/picture-0.png"}, json={"text": "x", "revision": "0" * 64}
            ),
            client.post("/api/environments", json={"name": "other", "kind": "empty"}),
            client.put(
                "/api/upload",
                params={"folder": ".", "name": "a.txt"},
                content=b"x",
                headers={"Content-Type": "application/octet-stream"},
            ),
            client.post("/api/check", json={"name": environment, "config": "{}"}),
        ]
    assert [answer.status_code for answer in answers] == [507, 409, 507, 507, 507]
    assert all(answer.json()["problems"] for answer in answers)
    assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == before
