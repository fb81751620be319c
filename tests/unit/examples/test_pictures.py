"""The examples' pictures: the same from the same seed, whole or absent."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.examples.pictures import (
    EXAMPLES,
    HELD_OUT,
    PRIOR,
    TRAINED,
    held_out_flags,
    materialize,
    render_flags,
    training_flags,
)
from simpletuner.examples.world import COLORS, POSITIONS, SIDE, SIZES


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
        render_flags(tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_picture_has_a_caption(name: str, tmp_path: Path) -> None:
    materialize(name, tmp_path / "datasets" / name)
    pictures = sorted((tmp_path / "datasets" / name).rglob("*.png"))
    assert [path.parent.name for path in pictures] == ["held-out"] * HELD_OUT + ["prior"] * PRIOR + ["train"] * TRAINED
    for path in pictures:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        assert ("zorblat flag" in caption) == (path.parent.name != "prior")
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")


def test_flags_are_trained_at_every_size_and_place_and_on_every_background_but_their_own_color() -> None:
    trained, others = training_flags(), held_out_flags()
    assert not set(trained) & set(others)
    assert {flag.size for flag in trained} == set(SIZES)
    assert {flag.position for flag in trained} == set(POSITIONS)
    assert {flag.background for flag in trained} == set(COLORS) - {"orange"}


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "tiny-lora"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine", encoding="utf-8")
    materialize("tiny-lora", mine)
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(EXAMPLES, "tiny-lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        materialize("tiny-lora", tmp_path / "tiny-lora")
    assert list(tmp_path.iterdir()) == []
