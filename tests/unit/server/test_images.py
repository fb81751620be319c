"""The images of a folder: listed, searched, captioned together, deleted and brought back."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

FOLDER = "datasets/mine"


@pytest.fixture
def folder(workspace: Path, pictures: Path) -> Path:
    """The six pictures and captions of every test, to be changed."""
    return Path(shutil.copytree(pictures, workspace / "datasets" / "mine"))


def listed(client: TestClient, **params: Any) -> Any:
    answer = client.get("/api/images", params={"folder": FOLDER, **params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_images_are_listed_with_their_subfolders(client: TestClient, folder: Path) -> None:
    (folder / "inner").mkdir()
    shutil.copy(folder / "picture-0.png", folder / "inner" / "x.PNG")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "picture-0.png", folder / ".hidden" / "x.png")
    found = listed(client)
    assert found["names"] == ["inner/x.PNG", *(f"picture-{number}.png" for number in range(6))]
    assert (found["path"], found["total"], found["without_caption"]) == (FOLDER, 7, 1)
    assert (found["missing"], found["trashed"], found["can_undo"]) == (["inner/x.PNG"], 0, False)
    for path, status in (("datasets/none", 404), ("/etc", 403), ("datasets/mine/picture-0.png", 404)):
        assert client.get("/api/images", params={"folder": path}).status_code == status


def test_images_are_found_by_caption_by_name_and_without_caption(client: TestClient, folder: Path) -> None:
    (folder / "picture-4.txt").unlink()
    (folder / "picture-5.txt").write_text("\N{ZERO WIDTH SPACE}\n")
    (folder / "picture-0.txt").write_text("A Red Cat", encoding="utf-16")
    assert listed(client, missing=True)["names"] == ["picture-4.png", "picture-5.png"]
    assert listed(client, text="red c")["names"] == ["picture-0.png"]
    assert listed(client, text="TURE-3")["names"] == ["picture-3.png"]
    (folder / "picture-0.txt").write_text("a blue dog")
    assert listed(client, text="red c")["names"] == []
    assert listed(client, text="blue", missing=True)["names"] == []


def test_what_a_link_leads_to_outside_is_not_listed(client: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folder / "picture-0.png", outside / "x.png")
    (outside / "x.txt").write_text("a secret")
    (folder / "out").symlink_to(outside)
    (folder / "link.png").symlink_to(outside / "x.png")
    (folder / "picture-1.txt").unlink()
    (folder / "picture-1.txt").symlink_to(outside / "x.txt")
    (folder / "again.png").symlink_to(folder / "picture-0.png")
    found = listed(client)
    assert (found["total"], found["missing"]) == (6, ["picture-1.png"])
    assert listed(client, text="secret")["names"] == []


def test_references_and_masks_are_found_by_the_names_of_their_images(
    client: TestClient, folder: Path, tmp_path: Path
) -> None:
    beside = folder.with_name("beside")
    (beside / "inner").mkdir(parents=True)
    outside = tmp_path / "outside.png"
    shutil.copy(folder / "picture-0.png", outside)
    for name in ("picture-0.jpg", "picture-1.10.png", "picture-1.9.png", "other.png", "inner/picture-3.png"):
        shutil.copy(folder / "picture-0.png", beside / name)
    (beside / "picture-2.png").symlink_to(outside)

    def found(**params: Any) -> Any:
        return client.get("/api/images/partners", params={"folder": FOLDER, "beside": "datasets/beside", **params})

    assert found().json() == {"path": "datasets/beside", "names": {"picture-0.png": ["picture-0.jpg"]}}
    assert found(numbered=True).json()["names"] == {
        "picture-0.png": ["picture-0.jpg"],
        "picture-1.png": ["picture-1.9.png", "picture-1.10.png"],
    }
    assert found(beside="datasets/none").status_code == 404
    assert found(beside="/etc").status_code == 403


def test_captions_change_together_and_go_back(client: TestClient, folder: Path) -> None:
    edit = {"folder": FOLDER, "names": ["picture-0.png", "picture-1.png"], "find": " soft", "replace": " -hard"}
    dry = client.post("/api/images/captions", json=edit | {"dry_run": True}).json()
    assert (dry["images"], dry["changed"], dry["changes"][0]["images"]) == (2, 2, ["picture-0.png"])
    done = client.post("/api/images/captions", json=edit | {"revision": dry["revision"]})
    assert (done.status_code, done.json()["changed"]) == (200, 2)
    assert (folder / "picture-1.txt").read_text() == "a -hard gradient, number 1\n"
    again = client.post("/api/images/captions", json=edit | {"revision": dry["revision"]})
    assert again.status_code == 409
    assert "captions changed since the preview" in again.json()["problems"][0]["text"]
    assert listed(client)["can_undo"]
    undone = client.post("/api/images/undo", json={"folder": FOLDER, "what": "captions"}).json()
    assert undone == {"undone": 2, "remaining": 0, "left_out": []}
    assert not listed(client)["can_undo"]
    wrong = client.post("/api/images/captions", json={"folder": FOLDER, "find": "(", "regex": True, "dry_run": True})
    assert "not a regular expression" in wrong.json()["problems"][0]["text"]


@pytest.mark.slow
def test_an_expression_that_never_ends_is_ended(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.server.api.images.EDIT_TIMEOUT_S", 1.0)
    (folder / "picture-0.txt").write_text("a" * 60)
    began = time.monotonic()
    answer = client.post("/api/images/captions", json={"folder": FOLDER, "find": r"(a+)+b", "regex": True})
    assert (answer.status_code, time.monotonic() - began < 30) == (422, True)
    assert "takes longer" in answer.json()["problems"][0]["text"]


@pytest.mark.usefixtures("folder")
def test_images_are_deleted_and_come_back(client: TestClient) -> None:
    deleted = client.post("/api/images/delete", json={"folder": FOLDER, "names": ["picture-2.png"]}).json()
    assert deleted == {
        "images": 1, "captions": 1, "partners": 0, "trash": f"{FOLDER}/.simpletuner/trash/1", "left_out": []
    }  # fmt: skip
    assert (listed(client)["total"], listed(client)["trashed"]) == (5, 2)
    client.post("/api/images/delete", json={"folder": FOLDER, "names": ["picture-3.png", "picture-4.png"]})
    undo = {"folder": FOLDER, "what": "delete"}
    assert client.post("/api/images/undo", json=undo).json() == {"undone": 4, "remaining": 2, "left_out": []}
    assert client.post("/api/images/undo", json=undo).json() == {"undone": 2, "remaining": 0, "left_out": []}
    assert listed(client)["total"] == 6
    client.post("/api/images/delete", json={"folder": FOLDER, "names": ["picture-2.png"]})
    assert client.post("/api/images/empty-trash", json={"folder": FOLDER}).json() == {"deleted": 2}
    assert (listed(client)["total"], listed(client)["trashed"]) == (5, 0)


def test_references_and_masks_are_deleted_with_their_images(client: TestClient, folder: Path) -> None:
    for name in ("before", "masks"):
        (folder.parent / name).mkdir()
    for name in ("before/picture-0.1.png", "before/picture-0.2.png", "before/picture-1.png", "masks/picture-0.png"):
        shutil.copy(folder / "picture-0.png", folder.parent / name)
    deletion = {"folder": FOLDER, "names": ["picture-0.png"]}
    for partners, status in (
        (["/etc"], 403),
        (["datasets/none"], 404),
        ([FOLDER], 422),
        (["datasets/before"] * 12, 422),
    ):
        assert client.post("/api/images/delete", json=deletion | {"partners": partners}).status_code == status
    assert listed(client)["total"] == 6
    beside = ["datasets/before", "datasets/masks"]
    deleted = client.post("/api/images/delete", json=deletion | {"partners": beside}).json()
    assert (deleted["images"], deleted["captions"], deleted["partners"]) == (1, 1, 3)
    assert [path.name for path in folder.parent.glob("*/*-[01]*.png")] == ["picture-1.png"] * 2
    undo = {"folder": "datasets/before", "what": "delete"}
    assert client.post("/api/images/undo", json=undo).json()["undone"] == 2


def test_nothing_outside_of_the_folder_is_deleted(client: TestClient, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    (folder / ".hidden.png").write_text("mine")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link/../../secret.png", ".hidden.png", "a\nb.png"):
        answer = client.post("/api/images/delete", json={"folder": FOLDER, "names": ["picture-0.png", name]})
        assert answer.status_code == 422, name
    answer = client.post("/api/images/delete", json={"folder": FOLDER, "names": ["link/secret.png"]})
    assert answer.json()["images"] == 0
    for path in ("/etc", "..", f"{FOLDER}/link"):
        assert client.post("/api/images/delete", json={"folder": path, "names": ["a.png"]}).status_code == 403
    assert (tmp_path / "secret.png").read_text() == "mine"
    assert (folder / "picture-0.png").exists()


@pytest.mark.slow
def test_duplicates_are_found_by_a_job(client: TestClient, folder: Path) -> None:
    shutil.copy(folder / "picture-1.png", folder / "twin.png")
    job = client.post("/api/jobs/duplicates", json={"folder": FOLDER}).json()
    while job["state"] == "running":
        time.sleep(0.05)
        job = client.get(f"/api/jobs/{job['id']}").json()
    assert job["result"]["groups"] == [{"kind": "exact", "names": ["picture-1.png", "twin.png"]}]


def test_thousands_of_images_are_searched_at_once(client: TestClient, workspace: Path) -> None:
    folder = workspace / "datasets" / "mine"
    folder.mkdir(parents=True)
    for number in range(1_000):
        (folder / f"{number}.png").touch()
        (folder / f"{number}.txt").write_text(f"number {number}")
    listed(client)
    began = time.process_time()
    assert len(listed(client, text="number 7")["names"]) == 111
    assert time.process_time() - began < 1


def test_a_caption_beside_its_image_is_a_dot_caption_too(client: TestClient, folder: Path) -> None:
    (folder / "picture-0.txt").rename(folder / "picture-0.caption")
    params = {"path": f"{FOLDER}/picture-0.png"}
    read = client.get("/api/caption", params=params).json()
    assert read["text"] == "a soft gradient, number 0\n"
    client.put("/api/caption", params=params, json={"text": "new", "revision": read["revision"]})
    assert (folder / "picture-0.caption").read_text() == "new"
    raw = {"Content-Type": "application/octet-stream"}
    told = client.put("/api/upload", params={"folder": FOLDER, "name": "a.caption"}, content=b"a", headers=raw)
    assert told.json()["saved"] == [f"{FOLDER}/a.caption"]
    rules = client.get("/api/upload").json()
    assert {".png", ".txt", ".caption", ".zip"} <= set(rules["suffixes"])
    assert rules["largest"][".txt"] < rules["largest"][""] < rules["largest"][".zip"]
