"""The examples' pictures: the same from the same seed, whole or absent."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.examples.pictures import EXAMPLES, SIDE, materialise, render


def digest(folder: Path) -> str:
    """Of pixels and captions: a PNG's bytes may differ between versions of its writer."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".png":
            found.update(Image.open(path).tobytes())
        elif path.suffix == ".txt":
            found.update(path.read_bytes())
    return found.hexdigest()


def test_the_same_seed_draws_the_same_pictures(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        render(tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_picture_has_a_caption(name: str, tmp_path: Path) -> None:
    materialise(name, tmp_path / "datasets" / name)
    pictures = sorted((tmp_path / "datasets" / name).rglob("*.png"))
    assert [path.parent.name for path in pictures] == ["held-out"] * 6 + ["train"] * 20
    for path in pictures:
        assert "zorblat flag" in path.with_suffix(".txt").read_text(encoding="utf-8")
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "tiny-lora"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine", encoding="utf-8")
    materialise("tiny-lora", mine)
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(EXAMPLES, "tiny-lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        materialise("tiny-lora", tmp_path / "tiny-lora")
    assert list(tmp_path.iterdir()) == []
