"""Captions of a folder, changed together and taken back."""

import os
from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError, DataError
from simpletuner.base.imagefiles import list_images
from simpletuner.data.captionedits import (
    TextEdit,
    apply_caption_plan,
    plan_caption_edit,
    undo_captions,
    without_caption,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images with captions, one of them two lines, and two without."""
    made = tmp_path / "images"
    (made / "inner").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "inner/c.png", "none.png", "blank.png"):
        (made / name).write_bytes(b"")
    (made / "a.txt").write_text("a red cat\n")
    (made / "b.txt").write_bytes(b"a cat\r\n\r\nthe cat sits\r\n")
    (made / "inner" / "c.caption").write_text("two cats")
    (made / "blank.txt").write_text(" \n")
    return made


def texts(folder: Path) -> dict[str, str]:
    """Every caption file."""
    found = [path for path in folder.rglob("*") if path.suffix in (".txt", ".caption") and path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in sorted(found)}


@pytest.mark.parametrize(
    ("edit", "before", "after"),
    [
        (TextEdit(), "a cat\n", "a cat\n"),
        (TextEdit(find="cat", replace="dog"), "a cat, a cat\n", "a dog, a dog\n"),
        (TextEdit(find=", blurry"), "a cat, blurry", "a cat"),
        (TextEdit(find="a.t", replace="x"), "a.t cat", "x cat"),
        (TextEdit(r"^(\w+) cat", r"\1 one cat", is_regex=True), "red cat\nold cat", "red one cat\nold one cat"),
        (TextEdit(find="cat", replace=r"\1"), "a cat", r"a \1"),
        (TextEdit(prepend="sks", append=", photo"), "a cat\n\nit\r\n", "sks a cat, photo\n\nsks it, photo\r\n"),
        (TextEdit(prepend="sks ", append="indoors"), "a cat", "sks a cat indoors"),
        (TextEdit(prepend="sks", is_whole=True), "a cat\nsits\n", "sks a cat\nsits\n"),
        (TextEdit(prepend="sks", append="photo"), "", "sks photo"),
    ],
)  # fmt: skip
def test_an_edit_changes_each_caption_of_a_text(edit: TextEdit, before: str, after: str) -> None:
    assert edit.applied(before) == after


@pytest.mark.parametrize(("find", "replace"), [("(", ""), ("cat", r"\1")])
def test_what_is_no_regular_expression_is_said(find: str, replace: str) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        TextEdit(find, replace, is_regex=True)


def test_a_plan_says_what_changes_and_changes_nothing(folder: Path) -> None:
    before = texts(folder)
    plan = plan_caption_edit(folder, TextEdit(find="cat", replace="dog"))
    assert (plan.images, [change.file for change in plan.changes]) == (5, ["a.txt", "b.txt", "inner/c.caption"])
    assert plan.changes[0].images == ("a.jpg",)
    assert texts(folder) == before
    assert plan_caption_edit(folder, TextEdit(find="a red cat")).emptied == 1


def test_captions_change_together_and_go_back_byte_for_byte(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa red cat\r\n")  # with a byte-order mark
    before = texts(folder)
    plan = plan_caption_edit(folder, TextEdit(prepend="sks"))
    assert apply_caption_plan(plan) == []
    assert texts(folder)["none.txt"] == texts(folder)["blank.txt"] == "sks"
    assert texts(folder)["b.txt"] == "sks a cat\r\n\r\nsks the cat sits\r\n"
    assert undo_captions(folder) == (5, [])
    assert texts(folder) == before
    with pytest.raises(DataError, match="no change of captions to undo"):
        undo_captions(folder)


def test_only_the_images_that_are_named_change(folder: Path) -> None:
    apply_caption_plan(plan_caption_edit(folder, TextEdit(find="cat", replace="dog"), ["a.jpg"]))
    assert texts(folder)["a.txt"] == "a red dog\n"
    assert "dog" not in texts(folder)["b.txt"]
    with pytest.raises(DataError, match=r"\.\./x\.png: no such image"):
        plan_caption_edit(folder, TextEdit(find="cat"), ["../x.png"])


def test_images_that_share_a_caption_change_it_once(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    plan = plan_caption_edit(folder, TextEdit(append="!"))
    assert [change.images for change in plan.changes if change.file == "a.txt"] == [("a.jpg", "a.png")]


def test_what_somebody_else_changed_meanwhile_stays(folder: Path) -> None:
    plan = plan_caption_edit(folder, TextEdit(find="cat", replace="dog"))
    (folder / "a.txt").write_text("typed elsewhere")
    assert [each.name for each in apply_caption_plan(plan)] == ["a.txt"]
    assert texts(folder)["a.txt"] == "typed elsewhere"
    (folder / "b.txt").write_text("typed after the change")
    undone, left = undo_captions(folder)
    assert (undone, sorted(each.name for each in left)) == (1, ["a.txt", "b.txt"])
    assert texts(folder)["b.txt"] == "typed after the change"
    assert plan_caption_edit(folder, TextEdit(find="typed")).revision != plan.revision


def test_an_undo_that_restores_nothing_can_be_repeated(folder: Path) -> None:
    before = texts(folder)
    apply_caption_plan(plan_caption_edit(folder, TextEdit(find="red", replace="blue")))
    edited = (folder / "a.txt").read_bytes()
    (folder / "a.txt").write_text("typed after the change")
    undone, left = undo_captions(folder)
    assert (undone, [each.name for each in left]) == (0, ["a.txt"])
    (folder / "a.txt").write_bytes(edited)
    assert undo_captions(folder) == (1, [])
    assert texts(folder) == before
    with pytest.raises(DataError, match="no change of captions to undo"):
        undo_captions(folder)


def test_no_link_is_followed_and_no_other_text_is_guessed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(b"")
    (outside / "x.txt").write_text("a cat outside")
    (folder / "out").symlink_to(outside)
    (folder / "none.txt").symlink_to(outside / "x.txt")
    (folder / "a.txt").write_bytes(b"caf\xe9 cat")
    (folder / "b.txt").write_text("a cat", encoding="utf-16")
    plan = plan_caption_edit(folder, TextEdit(find="cat", replace="dog"))
    assert {each.name: each.reason for each in plan.left_out} == {
        "out/x.txt": "outside", "none.txt": "a link", "a.txt": "caption is not UTF-8"
    }  # fmt: skip
    apply_caption_plan(plan)
    assert (outside / "x.txt").read_text() == "a cat outside"
    assert (folder / "b.txt").read_text() == "a dog"
    (folder / ".simpletuner" / "lock").unlink()
    (folder / ".simpletuner" / "captions.json").unlink()
    os.rmdir(folder / ".simpletuner")
    (folder / ".simpletuner").symlink_to(outside)
    with pytest.raises(DataError, match="is a link"):
        undo_captions(folder)


def test_images_without_a_caption_are_those_whose_text_says_nothing(folder: Path) -> None:
    assert without_caption(folder, list_images(folder)) == ["blank.png", "none.png"]
