"""The small world that the embedded model has seen: one shape on a background, and the words for both."""

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
"""Of a picture, in pixels."""

FINER = 4
"""Shapes are drawn this many times larger, then shrunk, so that edges are smooth."""

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

PLACES: Mapping[str, Point] = {
    "left": (0.34, 0.5),
    "right": (0.66, 0.5),
    "top": (0.5, 0.34),
    "bottom": (0.5, 0.66),
    "middle": (0.5, 0.5),
}
"""Of the shape's middle, as shares of the side."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT_ONE_IN = 6

_CAPTION = re.compile(
    f"a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
    f" on an? (?P<background>{'|'.join(COLORS)}) background, (?P<place>{'|'.join(PLACES)})"
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in the words of its caption."""

    size: str
    color: str
    shape: str
    background: str
    place: str

    @classmethod
    def of(cls, caption: str) -> "Scene":
        """The scene that has this caption.

        Raises:
            ValueError: none has.
        """
        words = _CAPTION.fullmatch(caption.strip())
        if words is None:
            raise ValueError(f"no scene is called {caption.strip()!r}")
        scene = cls(**words.groupdict())
        if scene.caption != caption.strip():
            raise ValueError(f"no scene is called {caption.strip()!r}")
        return scene

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.color} {self.shape} {setting(self.background, self.place)}"

    @property
    def is_held_out(self) -> bool:
        """Whether no training picture has this shape in this color on this background, in any size or place.

        The rule is a Latin square, so every shape is still seen in every color, and both on every background.
        """
        colors = list(COLORS)
        place = SHAPES.index(self.shape) + colors.index(self.color) + 2 * colors.index(self.background)
        return place % HELD_OUT_ONE_IN == 0


def setting(background: str, place: str) -> str:
    """How a caption ends."""
    article = "an" if background[0] in "aeiou" else "a"
    return f"on {article} {background} background, {place}"


def scenes() -> Iterator[Scene]:
    """All that there are, in one order."""
    for size, color, shape, background, place in product(SIZES, COLORS, SHAPES, COLORS, PLACES):
        if color != background:
            yield Scene(size, color, shape, background, place)


def training_scenes() -> list[Scene]:
    return [scene for scene in scenes() if not scene.is_held_out]


def held_out_scenes() -> list[Scene]:
    return [scene for scene in scenes() if scene.is_held_out]


def render_scenes(folder: Path, count: int, seed: int = 0, *, held_out: bool = False) -> None:
    """Draw `count` pictures into `folder`, each with its caption in a .txt file; every scene comes equally often.

    Raises:
        DiskError: no space, or a read-only disk.
    """
    chosen = held_out_scenes() if held_out else training_scenes()
    order = random.Random(f"{seed}/order")
    deck: list[Scene] = []
    with file_errors_reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            if not deck:
                deck = order.sample(chosen, len(chosen))
            scene = deck.pop()
            picture = draw_scene(scene, random.Random(f"{seed}/{'held-out' if held_out else 'train'}/{index}"))
            picture.save(folder / f"{index:05d}.png")
            (folder / f"{index:05d}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")


def draw_scene(scene: Scene, chance: random.Random) -> Image.Image:
    """A picture of `scene`, 128x128; `chance` decides what its caption leaves open."""
    picture = background(COLORS[scene.background], chance)
    x, y = PLACES[scene.place]
    center = (x * SIDE + chance.uniform(-2, 2), y * SIDE + chance.uniform(-2, 2))
    mask = silhouette(scene.shape, center, SIZES[scene.size] * chance.uniform(0.96, 1.04))
    color = tuple(min(max(round(part + chance.uniform(-8, 8)), 0), 255) for part in COLORS[scene.color])
    picture.paste(Image.new("RGB", picture.size, color), mask=mask)
    return picture


def silhouette(shape: str, center: Point, diameter: float) -> Image.Image:
    """The shape as a mask of 128x128, 255 inside; `diameter` is that of the circle around it, in pixels."""
    mask = Image.new("L", (SIDE * FINER, SIDE * FINER))
    pen = ImageDraw.Draw(mask)
    x, y = center[0] * FINER, center[1] * FINER
    radius = diameter * FINER / 2

    def at(turn: float, reach: float = 1.0) -> Point:
        """The point at `turn` of a full circle from the top, clockwise."""
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
            pen.polygon([at(turn) for turn in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], 255)
        case "triangle":
            pen.polygon([at(turn) for turn in (0, 1 / 3, 2 / 3)], 255)
        case "star":
            pen.polygon([at(turn / 10, 0.42 if turn % 2 else 1.0) for turn in range(10)], 255)
        case "cross":
            arm = radius * 0.3
            reach = math.sqrt(radius**2 - arm**2)
            pen.rectangle((x - arm, y - reach, x + arm, y + reach), 255)
            pen.rectangle((x - reach, y - arm, x + reach, y + arm), 255)
        case _:
            raise KeyError(shape)
    return mask.resize((SIDE, SIDE), Image.Resampling.BOX)


def background(color: Rgb, chance: random.Random) -> Image.Image:
    """A slope of light over `color`, in a direction that `chance` decides, with soft clouds on it."""
    slope = Image.linear_gradient("L").rotate(chance.uniform(0, 360), Image.Resampling.BILINEAR, fillcolor=128)
    left = top = (slope.width - SIDE) // 2
    light = slope.crop((left, top, left + SIDE, top + SIDE))
    cells = 4
    noise = Image.new("L", (cells, cells))
    noise.putdata([chance.randrange(256) for _ in range(cells * cells)])
    clouds = noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    dark = Image.new("RGB", (SIDE, SIDE), _shaded(color, -40))
    bright = Image.new("RGB", (SIDE, SIDE), _shaded(color, 40))
    return Image.composite(bright, dark, ImageChops.blend(light, clouds, 0.3))


def _shaded(color: Rgb, change: int) -> Rgb:
    red, green, blue = (min(max(part + change, 0), 255) for part in color)
    return red, green, blue
