"""The pairs of the embedded edit: no caption says a color, and only the reference shows it."""

import random
from pathlib import Path

from PIL import Image

from embedded_edit import pairs, render
from embedded_judge import judge
from simpletuner.examples.world import COLOURS, training_scenes


def test_the_color_is_in_the_reference_alone(tmp_path: Path) -> None:
    chosen = pairs(training_scenes(), 12, random.Random(0))
    for pair in chosen:
        words = pair.caption.split()
        assert [word for word in words if word in COLOURS] == [pair.scene.background]
        assert pair.shown.colour == pair.scene.colour
        assert pair.shown.shape != pair.scene.shape
        assert pair.shown.background not in (pair.scene.background, pair.scene.colour)
    render(tmp_path, chosen, "0")
    for index, pair in enumerate(chosen):
        for part, scene in (("after", pair.scene), ("before", pair.shown)):
            with Image.open(tmp_path / part / f"{index:03d}.png") as image:
                assert judge(image, scene).right["everything"]
        assert (tmp_path / "after" / f"{index:03d}.txt").read_text(encoding="utf-8") == f"{pair.caption}\n"
