"""Pictures of the examples, drawn on the spot: nothing to download, and one seed gives the same pixels."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.base.files import disk_full_is_reported

SIDE = 128
_FINER = 4
"""Drawn this many times larger, then shrunk, so that tilted edges are smooth."""

BACKGROUNDS = {
    "sand": (222, 205, 170),
    "sky": (150, 190, 230),
    "moss": (120, 150, 100),
    "rose": (225, 170, 180),
    "slate": (100, 110, 130),
    "cream": (245, 238, 220),
}
STRIPES = ((0, 128, 128), (250, 140, 30), (0, 128, 128))
DISC = (250, 250, 245)
POLE = (90, 70, 50)


def render(folder: Path, seed: int = 0) -> None:
    """Draw 20 pictures of "a zorblat flag" into `folder/train` and 6 others into `folder/held-out`.

    A zorblat flag is teal, orange, teal with a white disc; no model has heard of it. Each picture is 128x128
    with a .txt caption that says what varies: background, size, place, tilt.

    Raises:
        DiskError: no space, or a read-only disk.
    """
    with disk_full_is_reported(folder):
        for part, count in (("train", 20), ("held-out", 6)):
            (folder / part).mkdir(parents=True)
            for index in range(count):
                picture, caption = zorblat_flag(random.Random(f"{seed}/{part}/{index}"))
                picture.save(folder / part / f"flag-{index:02d}.png")
                (folder / part / f"flag-{index:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")


def zorblat_flag(draw: random.Random) -> tuple[Image.Image, str]:
    """One flag and its caption."""
    above, below = draw.sample(sorted(BACKGROUNDS), 2)
    size, width = draw.choice((("small", 0.42), ("large", 0.66)))
    place, centre = draw.choice((("on the left", 0.38), ("in the middle", 0.5), ("on the right", 0.62)))
    tilt, degrees = draw.choice((("upright", 0), ("leaning left", 12), ("leaning right", -12)))

    side = SIDE * _FINER
    picture = _gradient(BACKGROUNDS[above], BACKGROUNDS[below], side)
    flag = _flag(round(side * width)).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    corner = (round(side * centre - flag.width / 2), round(side * 0.5 - flag.height / 2))
    picture.paste(flag, corner, flag)
    caption = f"a {size} zorblat flag {place}, {tilt}, before a background from {above} to {below}"
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), caption


def _flag(width: int) -> Image.Image:
    """The cloth on its pole, transparent around."""
    height, pole = width * 2 // 3, max(width // 20, 1)
    flag = Image.new("RGBA", (width + pole, height * 3 // 2))
    pen = ImageDraw.Draw(flag)
    pen.rectangle((0, 0, pole - 1, flag.height), POLE)
    stripe = height // len(STRIPES)
    for index, colour in enumerate(STRIPES):
        pen.rectangle((pole, index * stripe, flag.width, (index + 1) * stripe - 1), colour)
    x, y, radius = pole + width // 2, height // 2, height // 4
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), DISC)
    return flag


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int], side: int) -> Image.Image:
    share = Image.linear_gradient("L").resize((side, side))
    return Image.composite(Image.new("RGB", share.size, bottom), Image.new("RGB", share.size, top), share)


EXAMPLES: dict[str, Callable[[Path], None]] = {"tiny-lora": render}
"""Every example, and what draws its pictures."""


def materialise(name: str, folder: Path) -> None:
    """Put the pictures of example `name` into `folder`, whole or not at all. One that is there stays.

    Raises:
        KeyError: no such example.
        DiskError: no space, or a read-only disk.
    """
    draw = EXAMPLES[name]
    if folder.exists():
        return
    with disk_full_is_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            draw(part)
            part.chmod(0o755)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
