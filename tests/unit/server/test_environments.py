"""Environments as the page keeps them: plain files, never overwritten in silence."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simpletuner.config.load import load

CONFIG = {"model_flavour": "tiny", "output_dir": "output/mine"}


def put(client: TestClient, text: str, revision: str, *, name: str = "mine", document: str = "config") -> Any:
    return client.put(
        "/api/environment/document",
        params={"name": name, "document": document},
        json={"text": text, "revision": revision},
    )


def documents(client: TestClient, name: str = "mine") -> Any:
    return client.get("/api/environment", params={"name": name}).raise_for_status().json()["documents"]


def test_an_empty_workspace_stays_empty(client: TestClient, workspace: Path) -> None:
    assert client.get("/api/environments").json() == []
    assert client.get("/api/environment", params={"name": ""}).status_code == 404
    assert list(workspace.iterdir()) == []


def test_the_list_names_every_environment(client: TestClient, workspace: Path, environment: str) -> None:
    (workspace / "config" / "config.toml").write_text('output_dir = "output/plain"\n')
    (workspace / "config" / "not a name").mkdir()
    (workspace / "config" / "not a name" / "config.json").write_text("{}")
    plain, mine = client.get("/api/environments").json()
    assert plain | {"modified": ""} == {
        "name": "",
        "path": "config/config.toml",
        "modified": "",
        "output_dir": "output/plain",
        "has_datasets": False,
    }
    assert (mine["name"], mine["output_dir"], mine["has_datasets"]) == (environment, "output/mine", True)


def test_what_the_shell_reads_unasked_is_the_one_without_a_name(client: TestClient, workspace: Path) -> None:
    (workspace / "config").mkdir()
    (workspace / "config" / "config.json").write_text("{}")
    (workspace / "config.json").write_text("{}")  # where the shell looks first
    assert documents(client, "")["config"]["path"] == "config.json"


def test_an_edit_needs_the_revision_that_it_began_with(client: TestClient, workspace: Path, environment: str) -> None:
    before = documents(client)["config"]
    first = put(client, "{}\n", before["revision"])
    assert first.status_code == 200
    path = workspace / "config" / environment / "config.json"
    assert path.read_text() == "{}\n"
    late = put(client, "[]", before["revision"])
    assert late.status_code == 409
    assert "changed" in late.json()["problems"][0]["found"]
    path.write_text('{"seed": 1}')  # in an editor
    assert put(client, "[]", first.json()["revision"]).status_code == 409
    assert path.read_text() == '{"seed": 1}'


def test_a_new_document_has_no_revision(client: TestClient, workspace: Path, environment: str) -> None:
    assert documents(client)["prompts"] == {
        "path": "config/mine/user_prompt_library.json",
        "text": None,
        "revision": "",
    }
    made = put(client, '{"one": "a barn"}', "", document="prompts")
    assert made.json()["revision"]
    assert json.loads((workspace / "config" / environment / "user_prompt_library.json").read_text()) == {
        "one": "a barn"
    }


def test_a_config_in_toml_stays_toml(client: TestClient, workspace: Path) -> None:
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("seed = 1\n")
    shown = documents(client)["config"]
    assert put(client, "seed = 2 # mine\n", shown["revision"]).json()["path"] == "config/mine/config.toml"
    assert (folder / "config.toml").read_text() == "seed = 2 # mine\n"
    assert not (folder / "config.json").exists()


def test_documents_lie_where_the_config_says(client: TestClient, workspace: Path, environment: str) -> None:
    folder = workspace / "config" / environment
    (folder / "config.json").write_text(json.dumps({"--data_backend_config": "config/sets.json"}))
    (workspace / "config" / "sets.json").write_text("[]")
    assert documents(client)["datasets"]["path"] == "config/sets.json"
    (folder / "config.json").write_text(json.dumps({"data_backend_config": "/etc/hostname"}))
    assert documents(client)["datasets"] == {"path": "/etc/hostname", "text": None, "revision": ""}
    assert put(client, "[]", "", document="datasets").status_code == 403


def test_a_document_too_large_or_not_text_is_refused(client: TestClient, workspace: Path, environment: str) -> None:
    assert put(client, "x" * 1_000_001, "").status_code == 413
    (workspace / "config" / environment / "user_prompt_library.json").write_bytes(b"\xff\xfe")
    answer = client.get("/api/environment", params={"name": environment})
    assert answer.status_code == 422
    assert "UTF-8" in answer.text


def test_a_folder_that_a_link_leads_out_of_the_workspace_is_not_touched(
    client: TestClient, workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (workspace / "config").mkdir()
    (workspace / "config" / "mine").symlink_to(outside)
    assert client.get("/api/environments").json() == []
    assert client.get("/api/environment", params={"name": "mine"}).status_code == 403
    assert put(client, "[]", "").status_code == 403
    assert client.delete("/api/environment", params={"name": "mine", "confirm": "mine"}).status_code == 403
    assert (outside / "config.json").read_text() == "{}"


def test_new_ones_are_right_for_the_shell(client: TestClient, workspace: Path) -> None:
    for new in (
        {"name": "first", "kind": "example", "source": "tiny-lora"},
        {"name": "second", "kind": "copy", "source": "first"},
    ):
        made = client.post("/api/environments", json=new)
        assert made.status_code == 201
        loaded = load([f"--env={new['name']}"], folder=workspace, environ={})
        assert loaded.config.output_dir == str(workspace / "output" / new["name"])
        assert loaded.prompts
    assert len(list((workspace / "datasets" / "tiny-lora" / "train").glob("*.png"))) == 20
    assert client.post("/api/environments", json={"name": "first", "kind": "empty"}).status_code == 409
    assert client.post("/api/environments", json={"name": "", "kind": "empty"}).status_code == 201
    assert json.loads((workspace / "config" / "config.json").read_text())["output_dir"] == "output/config"


def test_a_copy_shares_no_document(client: TestClient, workspace: Path, environment: str) -> None:
    folder = workspace / "config" / environment
    (workspace / "config" / "sets.json").write_text('[{"id": "theirs"}]')
    (folder / "config.json").write_text(json.dumps(CONFIG | {"data_backend_config": "config/sets.json"}))
    made = client.post("/api/environments", json={"name": "copy", "kind": "copy", "source": environment}).json()
    assert made["documents"]["datasets"]["path"] == "config/copy/multidatabackend.json"
    assert "theirs" in made["documents"]["datasets"]["text"]


def test_renaming_moves_the_folder(client: TestClient, workspace: Path, environment: str) -> None:
    (workspace / "config" / environment / "note.txt").write_text("mine")
    client.post("/api/environments", json={"name": "taken", "kind": "empty"}).raise_for_status()
    taken = client.post("/api/environment/rename", json={"name": environment, "new_name": "taken"})
    assert taken.status_code == 409
    moved = client.post("/api/environment/rename", json={"name": environment, "new_name": "other"})
    assert moved.json()["name"] == "other"
    assert (workspace / "config" / "other" / "note.txt").read_text() == "mine"
    assert not (workspace / "config" / environment).exists()


def test_deleting_takes_only_what_is_known(client: TestClient, workspace: Path, environment: str) -> None:
    folder = workspace / "config" / environment
    (folder / "note.txt").write_text("mine")
    assert client.delete("/api/environment", params={"name": environment, "confirm": ""}).status_code == 422
    gone = client.delete("/api/environment", params={"name": environment, "confirm": environment}).json()
    assert gone["left"] == ["config/mine/note.txt"]
    assert [path.name for path in folder.iterdir()] == ["note.txt"]


def test_export_and_import_are_inverse(client: TestClient, workspace: Path, environment: str) -> None:
    sent = client.get("/api/environment/export", params={"name": environment})
    assert sent.headers["content-disposition"] == 'attachment; filename="mine.zip"'
    back = client.post(
        "/api/environment/import",
        params={"name": "back"},
        content=sent.content,
        headers={"Content-Type": "application/zip"},
    )
    assert back.status_code == 201
    for name in ("config.json", "multidatabackend.json"):
        folders = (workspace / "config" / environment, workspace / "config" / "back")
        one, other = ((folder / name).read_bytes() for folder in folders)
        assert one == other
    alone = client.post("/api/environment/import", params={"name": "alone"}, json={"seed": 3})
    assert alone.json()["documents"]["config"]["text"] == '{"seed":3}'


@pytest.mark.parametrize("sent", [b"", b"[]", b"PK no zip", b"\xff\xd8\xff", b'{"a": ' * 100_000])
def test_what_is_no_environment_is_not_imported(client: TestClient, workspace: Path, sent: bytes) -> None:
    answer = client.post(
        "/api/environment/import", params={"name": "x"}, content=sent, headers={"Content-Type": "application/zip"}
    )
    assert answer.status_code == 422
    assert not (workspace / "config").exists()


def test_a_zip_bomb_is_not_imported(client: TestClient, workspace: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 50_000_000)
    answer = client.post(
        "/api/environment/import",
        params={"name": "x"},
        content=made.getvalue(),
        headers={"Content-Type": "application/zip"},
    )
    assert answer.status_code == 413
    assert not (workspace / "config").exists()


def test_a_right_draft_has_no_problem(client: TestClient, environment: str, workspace: Path) -> None:
    found = client.post("/api/check", json={"name": environment, "config": json.dumps(CONFIG)}).json()
    assert found["problems"] == []
    assert found["values"]["model_flavour"] == "tiny"
    assert (found["origins"]["model_flavour"], found["origins"]["seed"]) == ("file", "default")
    assert not (workspace / "output").exists()


def test_problems_say_where_they_belong(client: TestClient, environment: str) -> None:
    draft = {"name": environment, "config": json.dumps(CONFIG | {"lora_rank": 0, "sede": 1}), "datasets": "[{}]"}
    answer = client.post("/api/check", json=draft)
    told = {(problem["key"], problem["document"]) for problem in answer.json()["problems"]}
    assert {("lora_rank", "config"), ("sede", "config"), ("", "datasets")} <= told
    assert "config/mine/multidatabackend.json" in answer.text
    assert "simpletuner-draft" not in answer.text


def test_a_draft_of_datasets_elsewhere_is_checked_in_its_place(
    client: TestClient, environment: str, workspace: Path
) -> None:
    (workspace / "sets.json").write_text("no JSON")
    config = json.dumps(CONFIG | {"data_backend_config": "sets.json"})
    as_it_is = client.post("/api/check", json={"name": environment, "config": config}).json()
    assert [problem["document"] for problem in as_it_is["problems"]] == ["datasets"]
    sets = json.dumps([{"id": "set", "instance_data_dir": "pictures", "resolution": 128}])
    found = client.post("/api/check", json={"name": environment, "config": config, "datasets": sets}).json()
    assert found["problems"] == []
    assert found["values"]["data_backend_config"] == "sets.json"
    assert found["origins"]["data_backend_config"] == "file"


@pytest.mark.slow
def test_a_plan_is_the_shells(client: TestClient, environment: str) -> None:
    draft = {"name": environment, "config": json.dumps(CONFIG)}
    small = client.post("/api/plan", json=draft | {"vram_gib": 8, "ram_gib": 1})
    assert small.status_code == 200
    assert {phase["phase"] for phase in small.json()["plan"]["phases"]} >= {"train"}
    wrong = client.post("/api/plan", json={"name": environment, "config": '{"lora_rank": 0, "sede": 1}'})
    assert wrong.status_code == 422
    assert len(wrong.json()["problems"]) >= 2
    assert "simpletuner-draft" not in wrong.text


def test_no_variable_is_made_for_a_command() -> None:
    """What the shell reads as options stays what the server was started with."""
    assert not [name for name in os.environ if name.startswith("SIMPLETUNER_")]
