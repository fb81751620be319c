"""Training images of the examples. They are drawn rather than downloaded; the same seed gives the same pixels."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.base.files import file_errors_reported
from simpletuner.examples import world
from simpletuner.examples.world import SUPERSAMPLING

TEAL, ORANGE, WHITE = (0, 128, 128), (250, 140, 30), (250, 250, 245)
STRIPES = (TEAL, ORANGE, TEAL)
POLE = (90, 70, 50)
DISC_SHARE = 0.5
"""Diameter of the disc as a share of the cloth's height."""


def render_flags(folder: Path, seed: int = 0) -> None:
    """Draw 20 images of "a zorblat flag" into `folder/train` and 6 others into `folder/held-out`. Draw 160 images of
    scenes that the base model knows into `folder/prior`, so that training preserves this knowledge.

    A zorblat flag is teal, orange, teal with a white disc; no model knows it. The flags have the sizes, places and
    backgrounds of the scenes in `world`, which the embedded model knows. Each image is 128x128, with its caption in a
    .txt file.

    Raises:
        DiskError: no space, or a read-only disk.
    """
    with file_errors_reported(folder):
        for subset, scenes in (("train", training_flags(seed)), ("held-out", held_out_flags(seed)[:HELD_OUT])):
            (folder / subset).mkdir(parents=True)
            for index, scene in enumerate(scenes):
                image = zorblat_flag(scene, random.Random(f"{seed}/{subset}/{index}"))
                image.save(folder / subset / f"flag-{index:02d}.png")
                (folder / subset / f"flag-{index:02d}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")
        world.render_scenes(folder / "prior", PRIOR, seed)


TRAINED, HELD_OUT, PRIOR = 20, 6, 160


@dataclass(frozen=True)
class FlagScene:
    """Content of a flag's image, in the words of its caption."""

    size: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        return f"a {self.size} zorblat flag {world.setting(self.background, self.position)}"


def training_flags(seed: int = 0) -> list[FlagScene]:
    """The scenes of the training images; every size, background and place occurs."""
    return _shuffled(seed)[:TRAINED]


def held_out_flags(seed: int = 0) -> list[FlagScene]:
    """The scenes of no training image."""
    return _shuffled(seed)[TRAINED:]


def _shuffled(seed: int) -> list[FlagScene]:
    """All scenes, in an order in which sizes, backgrounds and places alternate."""
    rng = random.Random(f"{seed}/flags")
    sizes, places = list(world.SIZES), list(world.POSITIONS)
    backgrounds = [name for name in world.COLORS if name != "orange"]
    combinations = [FlagScene(*parts) for parts in product(sizes, backgrounds, places)]
    # Sorted by a weighted sum of the parts' indices, modulo the number of backgrounds: a Latin square, as in
    # `Scene.is_held_out`.
    sort_keys = [
        (sizes.index(scene.size) + backgrounds.index(scene.background) + 2 * places.index(scene.position))
        % len(backgrounds)
        for scene in combinations
    ]
    shuffled = rng.sample(list(zip(sort_keys, combinations, strict=True)), len(combinations))
    return [scene for _, scene in sorted(shuffled, key=lambda entry: entry[0])]


def zorblat_flag(scene: FlagScene, rng: random.Random) -> Image.Image:
    """An image of `scene`, 128x128; `rng` draws the details that the caption does not determine."""
    image = world.background(world.COLORS[scene.background], rng)
    x, y = world.POSITIONS[scene.position]
    center = (x * world.SIDE + rng.uniform(-2, 2), y * world.SIDE + rng.uniform(-2, 2))
    flag = cloth(world.SIZES[scene.size] * rng.uniform(0.96, 1.04))
    layer = Image.new("RGBA", (world.SIDE * SUPERSAMPLING, world.SIDE * SUPERSAMPLING))
    layer.paste(
        flag, (round(center[0] * SUPERSAMPLING - flag.width / 2), round(center[1] * SUPERSAMPLING - flag.height / 2))
    )
    layer = layer.resize(image.size, Image.Resampling.BOX)
    image.paste(layer, mask=layer.getchannel("A"))
    return image


def cloth(width: float) -> Image.Image:
    """The flag with its pole on a transparent background, enlarged by the factor `SUPERSAMPLING`.

    `width` is that of the cloth in pixels of the final image; its height is two thirds of that.
    """
    wide, high = round(width * SUPERSAMPLING), round(width * SUPERSAMPLING * 2 / 3)
    pole = wide // 16
    flag = Image.new("RGBA", (wide, high + high // 6))
    pen = ImageDraw.Draw(flag)
    pen.rectangle((0, 0, pole - 1, flag.height), POLE)
    for index, color in enumerate(STRIPES):
        pen.rectangle((pole, index * high // len(STRIPES), wide, (index + 1) * high // len(STRIPES) - 1), color)
    x, y, radius = (pole + wide) / 2, high / 2, high * DISC_SHARE / 2
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), WHITE)
    return flag


EXAMPLES: dict[str, Callable[[Path], None]] = {"tiny-lora": render_flags}
"""The function that draws the training images of each example."""


def materialize(name: str, folder: Path) -> None:
    """Draw the images of example `name` into `folder`, atomically. An existing folder is not changed.

    Raises:
        KeyError: there is no such example.
        DiskError: no space, or a read-only disk.
    """
    draw = EXAMPLES[name]
    if folder.exists():
        return
    with file_errors_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            draw(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
