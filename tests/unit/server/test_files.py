"""Folders, pictures and captions; what uploads may bring and what they may not."""

import io
import os
import shutil
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from simpletuner.server import uploads
from simpletuner.server.app import create_app
from simpletuner.server.pictures import KEPT_BYTES, ImageVersion, Thumbnails
from simpletuner.server.roots import Roots

ORIGIN = "http://localhost:8001"
RAW = {"Content-Type": "application/octet-stream"}


def png(width: int = 32, height: int = 16) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def folder(workspace: Path, pictures: Path) -> Path:
    """The six pictures and captions of every test, to be changed."""
    return Path(shutil.copytree(pictures, workspace / "datasets" / "mine"))


@pytest.fixture
def into(workspace: Path) -> Path:
    """An empty folder for uploads."""
    made = workspace / "uploads"
    made.mkdir()
    return made


def send(client: TestClient, name: str, data: bytes | Iterable[bytes], folder: str = "uploads") -> Any:
    answer = client.put("/api/upload", params={"folder": folder, "name": name}, content=data, headers=RAW)
    assert answer.status_code == 200, answer.text
    return answer.json()


def zipped(entries: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return made.getvalue()


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_shown_with_what_lies_in_it(client: TestClient, folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / ".hidden").mkdir()
    top = client.get("/api/folders").json()
    assert (top["path"], top["parent"], top["folders"]) == (".", None, [{"name": "datasets", "path": "datasets"}])
    view = client.get("/api/folders", params={"path": "datasets/mine"}).json()
    assert view["parent"] == "datasets"
    assert view["folders"] == [{"name": "inner", "path": "datasets/mine/inner"}]
    assert (view["pictures"], view["captions"]) == (6, 6)
    assert view["names"][0] == "datasets/mine/picture-0.png"
    assert client.get("/api/folders", params={"path": "datasets/none"}).status_code == 404


def test_links_and_names_that_cannot_be_sent_are_left_out(client: TestClient, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (workspace / "out").symlink_to(tmp_path / "outside")
    (workspace / "in").mkdir()
    (workspace / "also-in").symlink_to(workspace / "in")
    os.mkdir(os.fsencode(workspace) + b"/\xff")
    assert [inner["name"] for inner in client.get("/api/folders").json()["folders"]] == ["also-in", "in"]


def test_another_root_is_shown_by_its_whole_path(workspace: Path, tmp_path: Path) -> None:
    other = (tmp_path / "other").resolve()
    (other / "inner").mkdir(parents=True)
    with TestClient(create_app(Roots(workspace, (other,))), base_url=ORIGIN) as client:
        view = client.get("/api/folders", params={"path": str(other / "inner")}).json()
        assert (view["path"], view["parent"]) == (str(other / "inner"), str(other))
        assert client.get("/api/folders", params={"path": str(other)}).json()["parent"] is None
        assert client.get("/api/folders", params={"path": str(tmp_path)}).status_code == 403


def test_a_folder_is_made_once(client: TestClient, workspace: Path) -> None:
    made = client.post("/api/folder", json={"path": ".", "name": "my pictures"})
    assert (made.status_code, made.json()["path"]) == (201, "my pictures")
    assert client.post("/api/folder", json={"path": ".", "name": "my pictures"}).status_code == 409
    assert client.post("/api/folder", json={"path": ".", "name": "a/b"}).status_code == 422
    assert [path.name for path in workspace.iterdir()] == ["my pictures"]


def test_a_picture_comes_as_it_is_or_small(client: TestClient, folder: Path) -> None:
    path = "datasets/mine/picture-1.png"
    whole = client.get("/api/picture", params={"path": path})
    assert whole.content == (folder / "picture-1.png").read_bytes()
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["cache-control"] == "private, no-cache"
    small = client.get("/api/picture", params={"path": path, "width": 40})
    assert small.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(small.content)) as image:
        assert image.size == (40, 24)
    again = client.get(
        "/api/picture", params={"path": path, "width": 40}, headers={"If-None-Match": small.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    (folder / "picture-1.png").write_bytes(png(64, 64))
    changed = client.get(
        "/api/picture", params={"path": path, "width": 40}, headers={"If-None-Match": small.headers["etag"]}
    )
    assert changed.status_code == 200


def test_a_small_mask_is_black_where_it_is_transparent(client: TestClient, into: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(into / "mask.png")
    for params, level in (({}, 255), ({"mask": "true"}, 0), ({}, 255)):
        answer = client.get("/api/picture", params={"path": "uploads/mask.png", "width": "16", **params})
        with Image.open(io.BytesIO(answer.content)) as shown:
            assert shown.getpixel((8, 8)) == (level, level, level)


def test_a_type_is_told_from_the_content(client: TestClient, into: Path) -> None:
    (into / "really-a-png.jpg").write_bytes(png())
    answer = client.get("/api/picture", params={"path": "uploads/really-a-png.jpg"})
    assert answer.headers["content-type"] == "image/png"
    for content in (b"<html><script>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b""):
        (into / "not.png").write_bytes(content)
        for params in ({"path": "uploads/not.png"}, {"path": "uploads/not.png", "width": "64"}):
            assert client.get("/api/picture", params=params).status_code == 422
    (into / "note.txt").write_text("a secret")
    assert client.get("/api/picture", params={"path": "uploads/note.txt"}).status_code == 422
    assert client.get("/api/picture", params={"path": "uploads/none.png"}).status_code == 404


def test_small_pictures_are_kept_within_bounds(into: Path) -> None:
    (into / "one.png").write_bytes(png())
    kept = Thumbnails()
    version = ImageVersion.of(into / "one.png")
    assert kept.of(version, 32) is kept.of(version, 32)
    kept._bytes = KEPT_BYTES  # as if others were there
    kept.of(version, 16)
    assert kept._bytes <= KEPT_BYTES


def test_a_caption_is_read_and_written_beside_its_picture(client: TestClient, folder: Path) -> None:
    params = {"path": "datasets/mine/picture-0.png"}
    before = client.get("/api/caption", params=params).json()
    assert before["text"] == "a soft gradient, number 0\n"
    written = client.put("/api/caption", params=params, json={"text": "green\n", "revision": before["revision"]})
    assert written.json()["text"] == (folder / "picture-0.txt").read_text() == "green\n"
    late = client.put("/api/caption", params=params, json={"text": "red\n", "revision": before["revision"]})
    assert late.status_code == 409
    (folder / "picture-1.txt").unlink()
    params = {"path": "datasets/mine/picture-1.png"}
    assert client.get("/api/caption", params=params).json() == {"text": None, "revision": ""}
    assert client.put("/api/caption", params=params, json={"text": "new", "revision": ""}).status_code == 200
    assert (folder / "picture-1.txt").read_text() == "new"


@pytest.mark.usefixtures("folder")
def test_a_caption_needs_a_picture(client: TestClient) -> None:
    for path in ("datasets/mine/none.png", "datasets/mine/picture-0.txt", "datasets/mine"):
        answer = client.put("/api/caption", params={"path": path}, json={"text": "x", "revision": ""})
        assert answer.status_code in (404, 422)


def test_a_captions_link_does_not_lead_out(client: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    (folder / "picture-0.txt").unlink()
    (folder / "picture-0.txt").symlink_to(outside)
    params = {"path": "datasets/mine/picture-0.png"}
    assert client.get("/api/caption", params=params).status_code == 403
    assert client.put("/api/caption", params=params, json={"text": "x", "revision": ""}).status_code == 403
    assert outside.read_text() == "theirs"


def test_pictures_and_texts_are_taken(client: TestClient, into: Path) -> None:
    assert send(client, "one.png", png()) == {"saved": ["uploads/one.png"], "refused": []}
    assert send(client, "Einé.txt", b"ein Tor\n")["saved"] == ["uploads/Einé.txt"]
    assert (into / "one.png").read_bytes() == png()
    assert listed(into) == ["Einé.txt", "one.png"]
    assert stat.S_IMODE((into / "one.png").stat().st_mode) & 0o111 == 0


def test_nothing_is_overwritten(client: TestClient, into: Path) -> None:
    (into / "one.png").write_bytes(b"theirs")
    (told,) = send(client, "one.png", png())["refused"]
    assert told == {"name": "one.png", "reason": "a file with this name exists"}
    assert (into / "one.png").read_bytes() == b"theirs"
    assert listed(into) == ["one.png"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("shell.png", b"<?php system($_GET['c']); ?>"),
        ("page.jpg", b"<html><script>alert(1)</script>"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("begun.png", b"\x89PNG\r\n\x1a\n<?php ?>"),
        ("cut.png", png()[:-30]),
        ("empty.png", b""),
        ("script.txt", b"\xff\xfe\x00"),
        ("zero.txt", b"a\0b"),
        ("page.html", b"<html>"),
        ("drawing.svg", b"<svg/>"),
        ("weights.safetensors", b"x"),
        ("no-suffix", png()),
        ("", png()),
        ("../up.png", png()),
        ("a/b.png", png()),
        ("a\\b.png", png()),
        (".hidden.png", png()),
        ("..", png()),
        ("zero\0.png", png()),
        ("line\r\nSet-Cookie: x.png", png()),
        ("turned\u202egnp.png", png()),
        ("con.png", png()),
        ("dot.png.", png()),
        ("x" * 300 + ".png", png()),
    ],
)
@pytest.mark.usefixtures("into")
def test_what_is_not_meant_is_refused(client: TestClient, workspace: Path, name: str, data: bytes) -> None:
    told = send(client, name, data)
    assert told["saved"] == []
    assert told["refused"][0]["reason"]
    assert listed(workspace) == []


@pytest.mark.usefixtures("into")
def test_a_bomb_of_a_picture_is_refused(client: TestClient) -> None:
    made = io.BytesIO()
    Image.new("1", (13000, 13000)).save(made, "PNG")  # between our limit and where Pillow raises
    assert send(client, "bomb.png", made.getvalue())["refused"][0]["reason"] == "more than 150,000,000 pixels"


def test_a_file_over_the_limit_is_refused_while_it_comes(
    client: TestClient, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.server.api.files.LARGEST_FILE", 100)
    assert "more than 100 bytes" in send(client, "one.png", iter([b"x" * 60, b"x" * 60]))["refused"][0]["reason"]
    assert listed(into) == []


def test_a_full_disk_is_said(workspace: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(Path, "open", full)
    with TestClient(create_app(Roots(workspace)), base_url=ORIGIN) as client:
        answer = client.put("/api/upload", params={"folder": "uploads", "name": "a.png"}, content=png(), headers=RAW)
    assert answer.status_code == 507
    assert "Free some space" in answer.json()["problems"][0]["remedy"]
    assert listed(into) == []


def test_a_zip_brings_pictures_texts_and_their_folders(client: TestClient, into: Path) -> None:
    entries = {"set/one.png": png(), "set/one.txt": b"green", "two.png": png(), "set/notes.pdf": b"%PDF"}
    told = send(client, "set.zip", zipped(entries))
    assert told["saved"] == ["uploads/set/one.png", "uploads/set/one.txt", "uploads/two.png"]
    assert told["refused"] == [
        {"name": "set/notes.pdf", "reason": "neither an image nor a caption file (.txt, .caption)"}
    ]
    assert listed(into) == ["set/one.png", "set/one.txt", "two.png"]


@pytest.mark.parametrize(
    "name",
    [
        "../up.png",
        "/etc/up.png",
        "a/../../up.png",
        "..\\up.png",
        ".hidden/up.png",
        "inner.zip",
        "C:/up.png/",
        "./x.png",
    ],
)
@pytest.mark.usefixtures("into")
def test_a_zips_entry_cannot_leave_its_folder(client: TestClient, workspace: Path, name: str) -> None:
    told = send(client, "set.zip", zipped({name: png(), "good.png": png()}))
    assert told["saved"] == ["uploads/good.png"]
    assert listed(workspace) == ["uploads/good.png"]


def test_a_zips_links_are_refused(client: TestClient, into: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    reason = send(client, "set.zip", made.getvalue())["refused"][0]["reason"]
    assert reason == "it is a link or device, not a regular file"
    assert listed(into) == []


def test_a_zip_does_not_follow_a_link_out(client: TestClient, into: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (into / "set").symlink_to(tmp_path / "outside")
    told = send(client, "set.zip", zipped({"set/one.png": png(), "set/new/two.png": png()}))
    assert told["saved"] == []
    assert listed(tmp_path / "outside") == []


def test_zip_bombs_are_refused_before_they_are_unpacked(
    client: TestClient, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = zipped({"one.txt": b" " * 20_000_000})
    assert "100 times" in send(client, "set.zip", bomb)["refused"][0]["reason"]
    monkeypatch.setattr(uploads, "MOST_ENTRIES", 2)
    many = zipped({f"{number}.txt": b"x" for number in range(3)})
    assert "more than 2" in send(client, "set.zip", many)["refused"][0]["reason"]
    monkeypatch.setattr(uploads, "LARGEST_ZIP", 10)
    assert "more than 10" in send(client, "set.zip", zipped({"a.txt": b"x" * 11}))["refused"][0]["reason"]
    assert listed(into) == []


def test_a_zip_that_is_damaged_leaves_nothing(client: TestClient, into: Path) -> None:
    whole = bytearray(zipped({"set/one.png": png(), "set/two.png": png(200, 200)}))
    second = whole.index(b"two.png") + 7
    whole[second + 20 : second + 30] = bytes(10)
    for data in (bytes(whole), b"PK\x03\x04 no zip", b""):
        told = send(client, "set.zip", data)
        assert told["saved"] == []
        assert told["refused"]
    assert list(into.iterdir()) == []


@pytest.mark.usefixtures("into")
def test_an_encrypted_entry_is_refused(client: TestClient) -> None:
    data = bytearray(zipped({"one.png": png()}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    assert send(client, "set.zip", bytes(data))["refused"][0]["reason"] == "it is encrypted"


def test_no_folder_to_upload_into(client: TestClient) -> None:
    answer = client.put("/api/upload", params={"folder": "none", "name": "a.png"}, content=png(), headers=RAW)
    assert answer.status_code == 404


@pytest.mark.usefixtures("into")
@pytest.mark.parametrize("kind", ["bmp", "gif", "tif", "webp", "avif", "jpg"])
def test_every_picture_that_is_taken_can_be_shown_small(client: TestClient, kind: str) -> None:
    made = io.BytesIO()
    names = {"tif": "TIFF", "jpg": "JPEG"}
    Image.new("RGB", (64, 32), (200, 10, 10)).save(made, names.get(kind, kind.upper()))
    assert send(client, f"one.{kind}", made.getvalue())["saved"] == [f"uploads/one.{kind}"]
    small = client.get("/api/picture", params={"path": f"uploads/one.{kind}", "width": 32})
    with Image.open(io.BytesIO(small.content)) as image:
        assert (image.format, image.size) == ("JPEG", (32, 16))
