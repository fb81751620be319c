"""Every file is a picture, a caption, hidden, or rejected by name."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.base.errors import DataError
from simpletuner.base.imagefiles import caption_key
from simpletuner.base.storage import LocalStorage
from simpletuner.data.discover import discover
from simpletuner.data.sample import Rejection


def test_files_are_sorted_into_pictures_captions_and_the_rest(folder: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/deep/c.webp", "a.txt", "sub/notes.txt", "clip.mp4", "README"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = discover(LocalStorage(folder))
    assert tuple(found.pictures) == ("a.png", "b.JPG", "sub/deep/c.webp")
    assert found.captions == {"a": "a.txt", "sub/notes": "sub/notes.txt"}
    assert [(r.name, r.reason) for r in found.rejections] == [("README", "not an image"), ("clip.mp4", "not an image")]


def test_hidden_files_and_folders_are_passed_over(folder: Path) -> None:
    for name in (".DS_Store", "._a.jpg", ".git/x.png", "__MACOSX/._a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = discover(LocalStorage(folder))
    assert tuple(found.pictures) == ()
    assert found.rejections == ()


def test_links_are_followed_once(folder: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    picture = save("real/a.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.png").write_bytes(picture.read_bytes())
    (folder / "0-outside").symlink_to(elsewhere)
    (folder / "1-outside-again").symlink_to(elsewhere)
    (folder / "2-copy.png").symlink_to(picture)
    (folder / "real" / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to(tmp_path / "nothing")
    (folder / "self").symlink_to(folder / "self")
    found = discover(LocalStorage(folder))
    assert tuple(found.pictures) == ("0-outside/b.png", "real/a.png")
    assert {(r.name, r.reason) for r in found.rejections} == {
        ("1-outside-again", "link followed already"),
        ("2-copy.png", "link followed already"),
        ("real/loop", "link followed already"),
        ("broken.png", "broken link"),
        ("self", "broken link"),
    }


def test_a_folder_that_is_itself_a_link_is_entered(folder: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    save("a.png")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "link").symlink_to(folder)
    found = discover(LocalStorage(tmp_path / "link"))
    assert tuple(found.pictures) == ("a.png",)
    assert [(r.name, r.reason) for r in found.rejections] == [("loop", "link followed already")]


def test_a_name_that_is_not_text_is_rejected(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))).touch()
    assert discover(LocalStorage(folder)).rejections == (Rejection("caf�.png", "name is not UTF-8", "rename the file"),)


def test_accents_composed_differently_are_the_same_name() -> None:
    assert caption_key(unicodedata.normalize("NFD", "fête.png")) == caption_key("fête.txt")
    assert caption_key("a.b.png") == "a.b"


def test_a_missing_folder_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        discover(LocalStorage(Path("nowhere")))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        discover(LocalStorage(tmp_path / "file"))
