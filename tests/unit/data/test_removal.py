"""Images that are deleted with their captions, and come back."""

import os
from pathlib import Path

import pytest

from simpletuner.base.errors import DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.data.removal import empty_trash, plan_partner_removal, plan_removal, remove_images, restore_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    (made / "inner").mkdir(parents=True)
    for name in ("a.jpg", "a.txt", "a.caption", "b.jpg", "b.png", "b.txt", "inner/c.png", "inner/c.txt"):
        (made / name).write_text(name)
    return made


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in LocalStorage(folder).list())


def test_an_image_goes_with_its_captions_and_comes_back(folder: Path) -> None:
    before = listed(folder)
    plan = plan_removal(folder, ["a.jpg", "inner/c.png", "b.jpg"])
    assert plan.captions == ("a.txt", "a.caption", "inner/c.txt"), "b.txt is b.png's too"
    trash = remove_images(plan)
    assert listed(folder) == ["b.png", "b.txt"]
    assert (trash / "inner" / "c.png").read_text() == "inner/c.png"
    remove_images(plan_removal(folder, ["b.png"]))
    assert restore_images(folder) == (2, [])
    assert restore_images(folder) == (6, [])
    assert listed(folder) == before
    with pytest.raises(DataError, match="no deleted files to restore"):
        restore_images(folder)


def test_partners_go_with_their_image_unless_another_image_has_them(folder: Path, tmp_path: Path) -> None:
    beside = tmp_path / "before"
    (beside / "inner").mkdir(parents=True)
    for name in ("a.png", "a.1.png", "a.1.txt", "b.png", "inner/c.1.png", "inner/d.png"):
        (beside / name).write_text(name)
    plan = plan_partner_removal(plan_removal(folder, ["a.jpg", "b.jpg", "inner/c.png"]), beside)
    assert plan.images == ("a.1.png", "a.png", "inner/c.1.png"), "b.png is the partner of the image b.png too"
    assert plan.captions == ("a.1.txt",)
    remove_images(plan)
    assert listed(beside) == ["b.png", "inner/d.png"]
    assert restore_images(beside) == (4, [])


def test_what_is_in_the_way_stays_and_so_does_what_was_deleted(folder: Path) -> None:
    remove_images(plan_removal(folder, ["a.jpg"]))
    (folder / "a.txt").write_text("new")
    returned, left = restore_images(folder)
    assert (returned, [each.name for each in left]) == (2, ["a.txt"])
    assert (folder / "a.txt").read_text() == "new"
    assert empty_trash(folder) == 1
    assert not list((folder / ".simpletuner").rglob("a*"))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", ".hidden.png", "notes.md", "a.txt", "inner", ""])
def test_only_images_of_the_folder_are_deleted(folder: Path, name: str) -> None:
    (folder.parent / "secret.png").write_text("mine")
    (folder / ".hidden.png").write_text("mine")
    (folder / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="no such image"):
        plan_removal(folder, [name])


def test_a_link_goes_and_what_it_leads_to_stays(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_text("x")
    (folder / "link.png").symlink_to(outside / "x.png")
    (folder / "out").symlink_to(outside)
    plan = plan_removal(folder, ["link.png"])
    remove_images(plan)
    assert not os.path.lexists(folder / "link.png")
    assert (outside / "x.png").read_text() == "x"
    plan = plan_removal(folder, ["out/x.png"])
    assert (plan.images, [each.reason for each in plan.left_out]) == ((), ["outside"])
