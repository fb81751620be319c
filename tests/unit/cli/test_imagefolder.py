"""`simpletuner dataset captions|duplicates|delete`, as they are typed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import ConfigError, DataError, DiskError
from simpletuner.cli.dataset import run


@pytest.fixture
def folder(own_folder: Path, pictures: Path) -> Path:
    """Six images with captions `a soft gradient, number N`."""
    return Path(shutil.copytree(pictures, own_folder / "images"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_captions_are_found_replaced_and_taken_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = ("captions", "images", "--find", "soft", "--replace", "hard")
    dry = answer(capsys, *edit, "--dry-run")
    assert (dry["images"], dry["changed"]) == (6, 6)
    assert dry["changes"][0]["after"] == "a hard gradient, number 0\n"
    assert "soft" in (folder / "picture-0.txt").read_text()
    (folder / "picture-1.txt").write_text("a soft thing")
    with pytest.raises(ConfigError, match="--revision: the captions have changed since then"):
        run([*edit, "--revision", dry["revision"]])
    assert run(list(edit)) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "6 captions of 6 images changed.\n  picture-0.txt\n    - a soft gradient, number 0\n    + a hard"
    )
    assert "`simpletuner dataset captions images --undo` undoes the change." in text
    assert (folder / "picture-1.txt").read_text() == "a hard thing"
    assert answer(capsys, "captions", "images", "--undo")["undone"] == 6
    assert (folder / "picture-1.txt").read_text() == "a soft thing"


def test_an_undo_that_restores_nothing_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "picture-0.txt").write_text("a cat")
    run(["captions", "images", "--find", "cat", "--replace", "dog"])
    (folder / "picture-0.txt").write_text("typed after the change")
    capsys.readouterr()
    undo = ["captions", "images", "--undo"]
    assert run(undo) == 0
    assert capsys.readouterr().out == (
        "No caption is restored, because all changed since the edit. "
        "`simpletuner dataset captions images --undo` tries it again.\n"
        "Left out:\n  picture-0.txt  changed since  it stays as it is\n"
    )
    (folder / "picture-0.txt").write_text("a dog")
    assert run(undo) == 0
    assert (folder / "picture-0.txt").read_text() == "a cat"


def test_missing_captions_are_listed_and_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "picture-4.txt").unlink()
    assert run(["captions", "images", "--missing"]) == 0
    assert capsys.readouterr().out == "images: 1, without a caption: 1\n  picture-4.png\n"
    assert answer(capsys, "captions", "images")["missing"] == 1
    assert answer(capsys, "captions", "images", "--missing", "--append", "a thing")["changed"] == 1
    assert (folder / "picture-4.txt").read_text() == "a thing"


def test_images_are_deleted_once_asked_and_come_back(
    folder: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "names.txt").write_text("picture-0.png\npicture-3.png\n")
    delete = ("delete", "images", "--names", "names.txt")
    with pytest.raises(ConfigError, match="not deleted"):
        run(list(delete))  # nobody can be asked
    assert answer(capsys, *delete, "--dry-run")["captions"] == 2
    assert (folder / "picture-0.png").exists()
    assert answer(capsys, *delete, "--yes")["trash"] == "images/.simpletuner/trash/1"
    assert not (folder / "picture-0.png").exists()
    assert answer(capsys, "delete", "images", "--undo")["undone"] == 4
    for name in ("picture-0.png", "picture-3.png"):
        (own_folder / "one.txt").write_text(f"{name}\n")
        run(["delete", "images", "--names", "one.txt", "--yes"])
    capsys.readouterr()
    undo = "simpletuner dataset delete images --undo"
    assert run(undo.split()[2:]) == 0
    assert capsys.readouterr().out == (
        "2 files of the last deletion are restored. "
        f"2 files of earlier deletions are still in the trash; `{undo}` undoes the deletion before it.\n"
    )
    (folder / "picture-0.txt").write_text("a new caption")
    blocked = answer(capsys, "delete", "images", "--undo")
    assert (blocked["undone"], blocked["remaining"], len(blocked["left_out"])) == (1, 1, 1)
    assert answer(capsys, "delete", "images", "--empty-trash", "--yes")["deleted"] == 1
    run([*delete, "--yes"])
    capsys.readouterr()
    assert answer(capsys, "delete", "images", "--empty-trash", "--yes")["deleted"] == 4
    (own_folder / "names.txt").write_text("picture-0.png\n")
    with pytest.raises(DataError, match="no such image"):
        run([*delete, "--yes"])


def test_partners_are_deleted_with_their_images(
    folder: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "names.txt").write_text("picture-0.png\npicture-3.png\n")
    for name in ("before", "masks"):
        (own_folder / name).mkdir()
    shutil.copy(folder / "picture-0.png", own_folder / "before")
    delete = ("delete", "images", "--names", "names.txt", "--partners", "before", "--partners", "masks")
    assert answer(capsys, *delete, "--dry-run")["partners"] == 1
    assert run([*delete, "--yes"]) == 0
    assert capsys.readouterr().out == (
        "2 images, 2 captions and 1 partners are deleted.\n"
        "4 files are in images/.simpletuner/trash/1; `simpletuner dataset delete images --undo` restores them.\n"
        "1 files are in before/.simpletuner/trash/1; `simpletuner dataset delete before --undo` restores them.\n"
    )
    assert not list((own_folder / "before").glob("*.png"))
    assert answer(capsys, "delete", "before", "--undo")["undone"] == 1
    with pytest.raises(ConfigError, match="the same folder as the images"):
        run(["delete", "images", "--names", "names.txt", "--partners", "images/../images"])
    with pytest.raises(ConfigError, match="--partners without --names"):
        run(["delete", "images", "--undo", "--partners", "before"])


def test_a_partner_that_cannot_be_moved_keeps_its_image(folder: Path, own_folder: Path) -> None:
    (own_folder / "names.txt").write_text("picture-0.png\n")
    before = own_folder / "before"
    before.mkdir()
    shutil.copy(folder / "picture-0.png", before)
    (before / ".simpletuner").write_text("in the way")
    delete = ["delete", "images", "--names", "names.txt", "--partners", "before", "--yes"]
    with pytest.raises(DiskError):
        run(delete)
    assert (folder / "picture-0.png").is_file()
    (before / ".simpletuner").unlink()
    assert run(delete) == 0
    assert not list(before.glob("*.png"))


def test_duplicates_are_printed_with_their_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["duplicates", "images"]) == 0
    assert capsys.readouterr().out == "There are no duplicates.\n"
    shutil.copy(folder / "picture-1.png", folder / "twin.png")
    assert run(["duplicates", "images", "--progress"]) == 0
    out, err = capsys.readouterr()
    assert out == "the same bytes  picture-1.png\n                twin.png\n"
    assert json.loads(err.splitlines()[-1]) == {"what": "images", "done": 7, "total": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["captions"], "no folder"),
        (["captions", "images", "--regex"], "without --find"),
        (["captions", "images", "--undo", "--append", "x"], "--undo with other flags"),
        (["delete", "images"], "one of --names FILE, --undo and --empty-trash"),
        (["duplicates", "images", "--find", "x"], "no such flag"),
        (["captions", "images", "--names", "none.txt"], "none.txt"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_flags_that_do_not_go_together_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(arguments)


@pytest.mark.usefixtures("own_folder")
def test_a_folder_that_is_none_is_told() -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(["captions", "nowhere"])
