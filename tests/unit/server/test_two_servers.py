"""Two servers over one folder, and what a killed one leaves behind."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.base.errors import ConfigError
from simpletuner.base.parts import folder_locked, locked_part
from simpletuner.server.drafts import draft_folder

EDITS = 25
EDITOR = """
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from simpletuner.server.app import create_app
from simpletuner.server.roots import Roots

name, edits = sys.argv[1], int(sys.argv[2])
with TestClient(create_app(Roots(Path.cwd())), base_url="http://localhost:8001") as client:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(edits):
        while True:
            where = {"name": "mine"}
            shown = client.get("/api/environment", params=where).json()["documents"]["prompts"]
            change = {"text": f"{shown['text'] or ''}{name} {number}\\n", "revision": shown["revision"]}
            answer = client.put("/api/environment/document", params=where | {"document": "prompts"}, json=change)
            if answer.status_code == 200:
                break
            assert answer.status_code == 409, answer.text
"""


@pytest.mark.slow
def test_every_edit_that_two_servers_accept_survives(workspace: Path, environment: str) -> None:
    assert environment == "mine"
    servers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", EDITOR, name, str(EDITS)],
            cwd=workspace,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    try:
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
        for server in servers:
            assert server.stdin is not None
            server.stdin.write("go\n")
            server.stdin.flush()
        assert [server.wait(timeout=60) for server in servers] == [0, 0]
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    lines = (workspace / "config" / "mine" / "user_prompt_library.json").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {number}" for name in ("one", "other") for number in range(EDITS))
    assert {path.name for path in (workspace / "config" / "mine").iterdir()} == {
        "config.json",
        "multidatabackend.json",
        "user_prompt_library.json",
    }


def test_who_waits_too_long_for_another_is_told(tmp_path: Path) -> None:
    path = tmp_path / "not there yet" / "a.json"
    told = pytest.raises(ConfigError, match=r"a\.json is being changed by another process")
    with folder_locked(path), told, folder_locked(path, 0):
        pass
    began = time.monotonic()
    with folder_locked(path):
        assert time.monotonic() - began < 1


def test_a_folder_of_another_name_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with folder_locked(tmp_path / "a"), folder_locked(tmp_path / "inner" / "a", 0):
        pass


def test_what_a_killed_server_left_of_an_environment_is_swept(client: TestClient, workspace: Path) -> None:
    left = workspace / "config" / ".mine.123.part"
    left.mkdir(parents=True)
    (left / "multidatabackend.json").write_text("[]")
    assert client.get("/api/environments").json() == []
    assert client.post("/api/environments", json={"name": "mine", "kind": "empty"}).status_code == 201
    assert [path.name for path in (workspace / "config").iterdir()] == ["mine"]


def test_what_a_killed_server_left_of_an_edit_is_swept(client: TestClient, workspace: Path, environment: str) -> None:
    folder = workspace / "config" / environment
    (folder / ".config.json.123.part").write_text("{")
    before = client.get("/api/environment", params={"name": environment}).json()["documents"]["config"]
    put = client.put(
        "/api/environment/document",
        params={"name": environment, "document": "config"},
        json={"text": "{}", "revision": before["revision"]},
    )
    assert put.status_code == 200
    assert {path.name for path in folder.iterdir()} == {"config.json", "multidatabackend.json"}


def test_what_a_killed_server_left_of_a_check_is_swept_and_what_another_works_on_stays(
    client: TestClient, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = "simpletuner-draft-" + "0" * 16
    left = tmp_path / f".{name}.123.part"
    left.mkdir()
    (left / "config.json").write_text("{}")
    with locked_part(tmp_path / name, is_folder=True) as anothers:
        assert client.post("/api/check", json={"name": environment, "config": "{}"}).status_code == 200
        assert list(tmp_path.glob(".simpletuner-draft-*")) == [anothers]


def test_nobody_else_may_enter_a_drafts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with draft_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_of_an_upload_is_swept_where_the_folder_is_shown(
    client: TestClient, workspace: Path
) -> None:
    left = workspace / f".{'0' * 16}.123.part"
    left.write_bytes(b"half")
    mine = workspace / ".notes.123.part"
    mine.write_bytes(b"another program's")
    assert client.get("/api/folders").status_code == 200
    assert not left.exists()
    assert mine.exists()
