"""Pictures of the examples, drawn on the spot: nothing to download, and one seed gives the same pixels."""

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
from simpletuner.examples.world import FINER

TEAL, ORANGE, WHITE = (0, 128, 128), (250, 140, 30), (250, 250, 245)
STRIPES = (TEAL, ORANGE, TEAL)
POLE = (90, 70, 50)
DISC_SHARE = 0.5
"""Of the cloth's height."""


def render_flags(folder: Path, seed: int = 0) -> None:
    """Draw 20 pictures of "a zorblat flag" into `folder/train` and 6 others into `folder/held-out`; into `folder/prior`
    160 of what the base knows already, so that it stays known.

    A zorblat flag is teal, orange, teal with a white disc; no model has heard of it. It stands in the small world, at
    its sizes and places, on its backgrounds. Each picture is 128x128 with a .txt caption that says which.

    Raises:
        DiskError: no space, or a read-only disk.
    """
    with file_errors_reported(folder):
        for part, scenes in (("train", training_flags(seed)), ("held-out", held_out_flags(seed)[:HELD_OUT])):
            (folder / part).mkdir(parents=True)
            for index, scene in enumerate(scenes):
                picture = zorblat_flag(scene, random.Random(f"{seed}/{part}/{index}"))
                picture.save(folder / part / f"flag-{index:02d}.png")
                (folder / part / f"flag-{index:02d}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")
        world.render_scenes(folder / "prior", PRIOR, seed)


TRAINED, HELD_OUT, PRIOR = 20, 6, 160


@dataclass(frozen=True)
class FlagScene:
    """What a picture of a flag shows, in the words of its caption."""

    size: str
    background: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.size} zorblat flag {world.setting(self.background, self.place)}"


def training_flags(seed: int = 0) -> list[FlagScene]:
    """Those of which there is a picture to train on; among them every size, background and place."""
    return _shuffled(seed)[:TRAINED]


def held_out_flags(seed: int = 0) -> list[FlagScene]:
    """All others."""
    return _shuffled(seed)[TRAINED:]


def _shuffled(seed: int) -> list[FlagScene]:
    """All scenes, in an order in which sizes, backgrounds and places come by turns."""
    order = random.Random(f"{seed}/flags")
    sizes, places = list(world.SIZES), list(world.PLACES)
    backgrounds = [name for name in world.COLORS if name != "orange"]
    combinations = [FlagScene(*parts) for parts in product(sizes, backgrounds, places)]
    # The turn of a scene is the sum of its parts' numbers: a Latin square, as in the world's own held-out scenes.
    turns = [
        (sizes.index(scene.size) + backgrounds.index(scene.background) + 2 * places.index(scene.place))
        % len(backgrounds)
        for scene in combinations
    ]
    shuffled = order.sample(list(zip(turns, combinations, strict=True)), len(combinations))
    return [scene for _, scene in sorted(shuffled, key=lambda entry: entry[0])]


def zorblat_flag(scene: FlagScene, chance: random.Random) -> Image.Image:
    """A picture of `scene`, 128x128; `chance` decides what its caption leaves open."""
    picture = world.background(world.COLORS[scene.background], chance)
    x, y = world.PLACES[scene.place]
    center = (x * world.SIDE + chance.uniform(-2, 2), y * world.SIDE + chance.uniform(-2, 2))
    flag = cloth(world.SIZES[scene.size] * chance.uniform(0.96, 1.04))
    layer = Image.new("RGBA", (world.SIDE * FINER, world.SIDE * FINER))
    layer.paste(flag, (round(center[0] * FINER - flag.width / 2), round(center[1] * FINER - flag.height / 2)))
    layer = layer.resize(picture.size, Image.Resampling.BOX)
    picture.paste(layer, mask=layer.getchannel("A"))
    return picture


def cloth(width: float) -> Image.Image:
    """The cloth on its pole, `FINER` times as large as it will be, transparent around; `width` in pixels of the picture
    to come, the height two thirds of it."""
    wide, high = round(width * FINER), round(width * FINER * 2 / 3)
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
"""Every example, and what draws its pictures."""


def materialize(name: str, folder: Path) -> None:
    """Put the pictures of example `name` into `folder`, whole or not at all. One that is there stays.

    Raises:
        KeyError: no such example.
        DiskError: no space, or a read-only disk.
    """
    draw = EXAMPLES[name]
    if folder.exists():
        return
    with file_errors_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            draw(part)
            part.chmod(0o755)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
