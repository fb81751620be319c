"""The scenes on which the embedded model was trained: one shape on a background, and their captions."""

import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from simpletuner.base.files import file_errors_reported

SIDE = 128
"""Side of an image in pixels."""

SUPERSAMPLING = 4
"""Factor by which shapes are drawn larger before they are shrunk, so that edges are smooth."""

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLORS: Mapping[str, Rgb] = {
    "red": (206, 40, 46),
    "orange": (240, 132, 32),
    "yellow": (246, 216, 62),
    "green": (48, 150, 66),
    "blue": (40, 84, 200),
    "purple": (128, 52, 158),
    "white": (244, 244, 240),
    "black": (24, 24, 28),
}
SIZES: Mapping[str, float] = {"small": 54, "large": 78}
"""Diameter of the circle around the shape, in pixels."""

POSITIONS: Mapping[str, Point] = {
    "left": (0.34, 0.5),
    "right": (0.66, 0.5),
    "top": (0.5, 0.34),
    "bottom": (0.5, 0.66),
    "middle": (0.5, 0.5),
}
"""Center of the shape, as shares of the side."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT_ONE_IN = 6
"""One scene in this many is held out."""

_CAPTION = re.compile(
    f"a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
    f" on an? (?P<background>{'|'.join(COLORS)}) background, (?P<position>{'|'.join(POSITIONS)})"
)


@dataclass(frozen=True)
class Scene:
    """Content of an image, in the words of its caption."""

    size: str
    color: str
    shape: str
    background: str
    position: str

    @classmethod
    def of(cls, caption: str) -> "Scene":
        """The scene with this caption.

        Raises:
            ValueError: no scene has it.
        """
        words = _CAPTION.fullmatch(caption.strip())
        if words is None:
            raise ValueError(f"no scene has the caption {caption.strip()!r}")
        scene = cls(**words.groupdict())
        if scene.caption != caption.strip():
            raise ValueError(f"no scene has the caption {caption.strip()!r}")
        return scene

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.color} {self.shape} {setting(self.background, self.position)}"

    @property
    def is_held_out(self) -> bool:
        """Whether no training image has this shape in this color on this background, in any size or place.

        The rule is a Latin square: training images still have every shape in every color, and both on every background.
        """
        colors = list(COLORS)
        number = SHAPES.index(self.shape) + colors.index(self.color) + 2 * colors.index(self.background)
        return number % HELD_OUT_ONE_IN == 0


def setting(background: str, position: str) -> str:
    """The end of a caption."""
    article = "an" if background[0] in "aeiou" else "a"
    return f"on {article} {background} background, {position}"


def scenes() -> Iterator[Scene]:
    """All scenes, in a fixed order."""
    for size, color, shape, background, place in product(SIZES, COLORS, SHAPES, COLORS, POSITIONS):
        if color != background:
            yield Scene(size, color, shape, background, place)


def training_scenes() -> list[Scene]:
    return [scene for scene in scenes() if not scene.is_held_out]


def held_out_scenes() -> list[Scene]:
    return [scene for scene in scenes() if scene.is_held_out]


def render_scenes(folder: Path, count: int, seed: int = 0, *, held_out: bool = False) -> None:
    """Draw `count` images into `folder`, each with its caption in a .txt file. A scene recurs only after all others.

    Raises:
        DiskError: no space, or a read-only disk.
    """
    pool = held_out_scenes() if held_out else training_scenes()
    deck_rng = random.Random(f"{seed}/order")
    deck: list[Scene] = []
    with file_errors_reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            if not deck:
                deck = deck_rng.sample(pool, len(pool))
            scene = deck.pop()
            image = draw_scene(scene, random.Random(f"{seed}/{'held-out' if held_out else 'train'}/{index}"))
            image.save(folder / f"{index:05d}.png")
            (folder / f"{index:05d}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """An image of `scene`, 128x128; `rng` draws the details that the caption does not determine."""
    image = background(COLORS[scene.background], rng)
    x, y = POSITIONS[scene.position]
    center = (x * SIDE + rng.uniform(-2, 2), y * SIDE + rng.uniform(-2, 2))
    mask = silhouette(scene.shape, center, SIZES[scene.size] * rng.uniform(0.96, 1.04))
    color = tuple(min(max(round(part + rng.uniform(-8, 8)), 0), 255) for part in COLORS[scene.color])
    image.paste(Image.new("RGB", image.size, color), mask=mask)
    return image


def silhouette(shape: str, center: Point, diameter: float) -> Image.Image:
    """The shape as a 128x128 mask, 255 inside. `diameter` is that of its circumscribed circle, in pixels."""
    mask = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    x, y = center[0] * SUPERSAMPLING, center[1] * SUPERSAMPLING
    radius = diameter * SUPERSAMPLING / 2

    def point(turn: float, reach: float = 1.0) -> Point:
        """The point at `turn` full turns from the top, clockwise, and `reach` radii from the center."""
        angle = 2 * math.pi * turn
        return x + math.sin(angle) * radius * reach, y - math.cos(angle) * radius * reach

    def disc(reach: float, value: int) -> None:
        pen.ellipse((x - radius * reach, y - radius * reach, x + radius * reach, y + radius * reach), value)

    match shape:
        case "circle":
            disc(0.92, 255)
        case "ring":
            disc(1.0, 255)
            disc(0.52, 0)
        case "square":
            pen.polygon([point(turn) for turn in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], 255)
        case "triangle":
            pen.polygon([point(turn) for turn in (0, 1 / 3, 2 / 3)], 255)
        case "star":
            pen.polygon([point(turn / 10, 0.42 if turn % 2 else 1.0) for turn in range(10)], 255)
        case "cross":
            arm = radius * 0.3
            reach = math.sqrt(radius**2 - arm**2)
            pen.rectangle((x - arm, y - reach, x + arm, y + reach), 255)
            pen.rectangle((x - reach, y - arm, x + reach, y + arm), 255)
        case _:
            raise KeyError(shape)
    return mask.resize((SIDE, SIDE), Image.Resampling.BOX)


def background(color: Rgb, rng: random.Random) -> Image.Image:
    """A background of `color` with a brightness gradient in a direction that `rng` draws, and soft clouds."""
    slope = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, fillcolor=128)
    left = top = (slope.width - SIDE) // 2
    light = slope.crop((left, top, left + SIDE, top + SIDE))
    cells = 4
    noise = Image.new("L", (cells, cells))
    noise.putdata([rng.randrange(256) for _ in range(cells * cells)])
    clouds = noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    dark = Image.new("RGB", (SIDE, SIDE), _shaded(color, -40))
    bright = Image.new("RGB", (SIDE, SIDE), _shaded(color, 40))
    return Image.composite(bright, dark, ImageChops.blend(light, clouds, 0.3))


def _shaded(color: Rgb, change: int) -> Rgb:
    red, green, blue = (min(max(part + change, 0), 255) for part in color)
    return red, green, blue
