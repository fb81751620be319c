"""The pairs of the embedded edit: no caption says a color, and only the reference shows it."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from embedded_edit import encoded, main, pairs, render, sheet
from embedded_judge import judge
from simpletuner.examples.world import COLORS, SIDE, training_scenes


def save_images(folder: Path, pattern: str, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (SIDE, SIDE)).save(folder / pattern.format(index))


def test_the_color_is_in_the_reference_alone(tmp_path: Path) -> None:
    chosen = pairs(training_scenes(), 12, random.Random(0))
    for pair in chosen:
        words = pair.caption.split()
        assert [word for word in words if word in COLORS] == [pair.scene.background]
        assert pair.shown.color == pair.scene.color
        assert pair.shown.shape != pair.scene.shape
        assert pair.shown.background not in (pair.scene.background, pair.scene.color)
    render(tmp_path, chosen, "0")
    for index, pair in enumerate(chosen):
        for part, scene in (("after", pair.scene), ("before", pair.shown)):
            with Image.open(tmp_path / part / f"{index:03d}.png") as image:
                assert judge(image, scene).right["everything"]
        assert (tmp_path / "after" / f"{index:03d}.txt").read_text(encoding="utf-8") == f"{pair.caption}\n"


def test_the_sheet_shows_as_many_pairs_as_there_are(tmp_path: Path) -> None:
    save_images(tmp_path / "held-out" / "before", "{:03d}.png", 5)
    for name in ("with", "without"):
        save_images(tmp_path / name, "held-out-{:03d}.png", 5)
    assert sheet(tmp_path, 5).width == 5 * (SIDE + 4) - 4


@pytest.mark.parametrize("count", ["1", "100000"])
def test_a_count_that_cannot_be_judged_or_drawn_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "folder"), f"--pairs={count}"])
    assert "--pairs must be from 2 to" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_images_that_an_earlier_run_left_are_not_encoded(tmp_path: Path) -> None:
    save_images(tmp_path / "before", "{:03d}.png", 3)
    assert len(encoded(tmp_path / "before", 2, lambda pixels: torch.zeros(len(pixels), 128, 2, 2))) == 2
