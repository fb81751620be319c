"""One behavior of every storage: a local folder, and fsspec over memory and over files."""

import os
import resource
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from simpletuner.base.errors import DiskError
from simpletuner.base.storage import FsspecStorage, LocalStorage, Storage, StoredFile, UnlistedFile, storage_of

ODD_NAMES = ("a b.png", "#1 of 100%.png", "what?.png", "[x]*.png", "a::b.png", "fête/祭り.png", "deep/er/c.png")


@pytest.fixture(params=["local", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty storage whose folder is there."""
    folder = tmp_path / "images of #1"
    folder.mkdir()
    if request.param == "local":
        return LocalStorage(folder)
    if request.param == "file":
        return FsspecStorage(f"file://{folder}")
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", ["", "/images"])
    return FsspecStorage("memory://images")


def names(storage: Storage, prefix: str = "") -> list[str]:
    return [file.name for file in storage.list(prefix)]


def test_text_names_a_storage(tmp_path: Path) -> None:
    assert storage_of(str(tmp_path)) == LocalStorage(tmp_path)
    assert storage_of("relative/path") == LocalStorage(Path("relative/path"))
    assert storage_of("memory://images") == FsspecStorage("memory://images")


def test_what_is_read_is_what_was_written(storage: Storage) -> None:
    for name in ODD_NAMES:
        storage.write(name, name.encode())
    assert {name: storage.read(name) for name in ODD_NAMES} == {name: name.encode() for name in ODD_NAMES}
    assert sorted(names(storage)) == sorted(ODD_NAMES)
    storage.write("a b.png", b"new", sync=False)
    assert storage.read("a b.png") == b"new"


def test_a_range_ends_with_the_file(storage: Storage) -> None:
    storage.write("a", b"0123456789")
    assert storage.read("a", 3, 4) == b"3456"
    assert storage.read("a", 0, 2) == b"01"
    assert storage.read("a", 7) == b"789"
    assert storage.read("a", 8, 100) == b"89"
    assert storage.read("a", 10, 1) == b""
    assert storage.read("a", 0, 0) == b""


def test_a_list_is_one_folder_after_another_without_hidden_files(storage: Storage) -> None:
    for name in ("b.png", "a.png", "sub/d.png", "sub/c.png", ".hidden.png", ".git/e.png", "sub/.f/g.png"):
        storage.write(name, b"")
    assert names(storage) == ["a.png", "b.png", "sub/c.png", "sub/d.png"]
    assert names(storage, "sub") == ["sub/c.png", "sub/d.png"]


def test_a_list_and_stat_agree(storage: Storage) -> None:
    storage.write("sub/a.png", b"12345")
    before = time.time()
    (listed,) = storage.list()
    assert isinstance(listed, StoredFile)
    assert listed == storage.stat("sub/a.png")
    assert (listed.name, listed.size, listed.stamp[0]) == ("sub/a.png", 5, 5)
    assert before - 60 < listed.changed_at < before + 60


def test_a_changed_file_has_another_stamp(storage: Storage) -> None:
    storage.write("a", b"one")
    before = storage.stat("a")
    time.sleep(0.02)  # more than a tick of the file system's clock
    storage.write("a", b"two")
    after = storage.stat("a")
    assert after.size == before.size
    assert after.stamp != before.stamp


def test_an_empty_storage_lists_nothing(storage: Storage) -> None:
    assert names(storage) == []


def test_what_is_no_folder_shows_before_anything_is_listed(storage: Storage) -> None:
    storage.write("a.png", b"")
    with pytest.raises(FileNotFoundError):
        storage.list("nowhere")
    with pytest.raises(NotADirectoryError):
        storage.list("a.png")


def test_a_missing_file_is_not_found(storage: Storage) -> None:
    for act in (storage.read, storage.stat):
        with pytest.raises(FileNotFoundError):
            act("sub/nothing.png")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing.png", 1, 2)
    storage.remove("nothing.png")


def test_a_removed_file_is_gone(storage: Storage) -> None:
    for name in ("[x]*.png", "x.png"):
        storage.write(name, b"")
    storage.remove("[x]*.png")
    assert names(storage) == ["x.png"]


def test_a_write_that_fails_leaves_the_old_content(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("sub/a", b"old")

    def fail(_file: MemoryFile) -> None:
        raise OSError("no space")

    monkeypatch.setattr(MemoryFile, "commit", fail)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((OSError, DiskError), match=r"no space|File too large"):
            storage.write("sub/a", b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.read("sub/a") == b"old"
    path = storage.local_path("sub")
    assert path is None or os.listdir(path) == ["a"], "nothing half-written stays"


def test_a_name_is_shown_as_it_would_be_typed(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "images of #1"
    expected = {
        "LocalStorage": f"{folder}/sub/a b.png",
        "file": f"file://{folder}/sub/a b.png",
        "memory": "memory://images/sub/a b.png",
    }
    kind = storage.url.partition(":")[0] if isinstance(storage, FsspecStorage) else "LocalStorage"
    assert storage.text("sub/a b.png") == expected[kind]
    assert storage.text() + "/sub/a b.png" == expected[kind]


def test_a_local_path_leads_to_the_same_bytes(storage: Storage) -> None:
    storage.write("a b.png", b"bytes")
    path = storage.local_path("a b.png")
    if path is None:
        assert storage.text().startswith("memory://")
    else:
        assert path.read_bytes() == b"bytes"


@pytest.mark.parametrize("storage", ["local", "file"], indirect=True)
def test_a_folder_that_cannot_be_read_is_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("locked/a.png", b"")
    storage.write("open/b.png", b"")
    really = os.scandir

    def scandir(path: str | Path) -> object:  # root reads everything, so the refusal is made here
        if str(path).endswith("/locked"):
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unlisted = UnlistedFile("locked", "unreadable folder", "Permission denied")
    listed = list(storage.list())
    assert listed[0] == unlisted
    assert [file.name for file in listed[1:]] == ["open/b.png"]


def test_a_folder_is_passed_over_for_the_names_in_it(storage: Storage) -> None:
    for name in ("a.png", "sub/marked", "sub/b.png", "sub/deeper/c.png", "other/d.png"):
        storage.write(name, b"")

    def skip_reason(names: Collection[str]) -> str | None:
        return "a marked folder" if "marked" in names else None

    passed = "skipped, with everything in it"
    listed = sorted(storage.list(skip_reason=skip_reason), key=lambda file: file.name)
    assert [file.name for file in listed] == ["a.png", "other/d.png", "sub"]
    assert listed[-1] == UnlistedFile("sub", "a marked folder", passed)
    assert list(storage.list("sub", skip_reason=skip_reason)) == [UnlistedFile("sub", "a marked folder", passed)]


@pytest.mark.parametrize("storage", ["local", "file"], indirect=True)
def test_what_never_ends_is_neither_listed_nor_read(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "images of #1"
    storage.write("a.png", b"bytes")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
    (folder.parent / "elsewhere.png").write_bytes(b"more")
    kinds = {file.name: "" if isinstance(file, StoredFile) else file.reason for file in storage.list()}
    no_file = "not a regular file"
    assert kinds == {"a.png": "", "link.png": "", "pipe.png": no_file, "zero.png": no_file}
    assert storage.read("link.png") == b"more"


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="neither a file nor a link to one"):
            LocalStorage(tmp_path).read(name)
        with pytest.raises(OSError, match="neither a file nor a link to one"):
            LocalStorage(tmp_path).read(name, 0, 10)
