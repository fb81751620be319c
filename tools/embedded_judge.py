"""Recognize the scene in an image of the embedded model, and compare it with the caption. Uses no neural network.

Recognition does not read the caption: it fits a smooth surface to the background, takes the pixels that differ from it
as the object, and names color, shape, size and position. Only these names are compared with the caption's.

    python tools/embedded_judge.py FOLDER
"""

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageFilter

from simpletuner.base.errors import DataError, Problem, UserError
from simpletuner.examples.pictures import ORANGE, TEAL, WHITE, cloth
from simpletuner.examples.world import COLORS, POSITIONS, SHAPES, SIDE, SIZES, SUPERSAMPLING, Rgb, Scene, silhouette

GRAIN = 1.0
"""Radius in pixels of the blur that removes grain first; no shape has parts this thin."""

STANDS_OUT = 32.0
"""Distance in RGB levels from the background's surface above which a pixel belongs to an object. The background's
texture reaches 20; the least contrast, yellow on the light end of orange, is 55.
"""

NOISES = 4.0
"""The same distance, as a multiple of the median distance of the background's pixels; both must be exceeded."""

LEAST_AREA = 0.015
"""Least area of an object as a share of the image. The smallest shape, a small star, has 0.03."""

STRAY = 0.08
"""Largest area of further objects as a share of the object's. The smallest shape beside the largest has 0.12."""

OVERLAP = 0.85
"""Least intersection over union with the best template."""

SAME_COLOR = 30.0
"""CIE76 distance within which a color has its name; the two nearest colors, red and orange, are 52 apart."""

OF_ONE_COLOR = 0.8
"""Least share of an object, or of the background, whose nearest color name must be the same."""

SAME_PLACE = 11.0
"""Largest distance in pixels between an object's center and its position: about half of that between two positions."""

SAME_SIZE = math.sqrt(SIZES["large"] / SIZES["small"])
"""Ratio of diameters halfway between the two sizes."""

Mask = Bool[np.ndarray, "128 128"]
Pixels = Float[np.ndarray, "128 128 3"]


@dataclass(frozen=True)
class Sight:
    """The names of what an image shows; None for what has no name."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    background: str | None = None
    overlap: float = 0.0
    """Intersection over union of the object with the best template, in [0, 1], also if it is too small for a name."""


@dataclass(frozen=True)
class Verdict:
    """The requested scene, and what the image shows."""

    wanted: Scene
    seen: Sight

    @property
    def color(self) -> bool:
        return self.seen.color == self.wanted.color

    @property
    def shape(self) -> bool:
        return self.seen.shape == self.wanted.shape

    @property
    def size(self) -> bool:
        return self.seen.size == self.wanted.size

    @property
    def place(self) -> bool:
        return self.seen.place == self.wanted.position

    @property
    def background(self) -> bool:
        return self.seen.background == self.wanted.background

    @property
    def right(self) -> Mapping[str, bool]:
        """Whether each aspect is right, and combinations of aspects."""
        return {
            "color and shape": self.color and self.shape,
            "color": self.color,
            "shape": self.shape,
            "size": self.size,
            "place": self.place,
            "background": self.background,
            "everything": self.color and self.shape and self.size and self.place and self.background,
        }


@dataclass(frozen=True)
class Share:
    """`right` of `count`."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def error(self) -> float:
        """Standard error of the share: that of a binomial with this share."""
        return math.sqrt(self.value * (1 - self.value) / self.count)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Mean ± its standard error; for a single value the value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


@dataclass(frozen=True)
class Score:
    """The share of right images for each entry of `Verdict.right`."""

    shares: Mapping[str, Share]

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> "Score":
        """The score of `verdicts`.

        Raises:
            ValueError: there are none.
        """
        right = [verdict.right for verdict in verdicts]
        if not right:
            raise ValueError("a score needs at least one verdict")
        return cls({name: Share(sum(each[name] for each in right), len(right)) for name in right[0]})

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{share}" for name, share in self.shares.items())


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare `picture` with `scene`. Images of other sizes than 128x128 are scaled first."""
    return Verdict(scene, see(picture))


def see(picture: Image.Image) -> Sight:
    """What `picture` shows, if it is one object on one background."""
    pixels = levels(picture)
    surface, noise = _background(pixels)
    lab = to_lab(pixels)
    stands_out = _distance(pixels, surface) > max(STANDS_OUT, NOISES * noise)
    parts = _parts(stands_out)
    if not parts or parts[0].sum() < LEAST_AREA * SIDE**2:
        return Sight(background=_color(lab, ~_grown(stands_out)))
    # The edge of a blurred object lies halfway between its color and the background's, whatever the threshold.
    inside = np.median(pixels[_core(parts[0])], axis=0)
    halfway = _distance(pixels, inside) < _distance(pixels, surface)
    thing = _parts(halfway & _grown(parts[0]))[0]
    background = _color(lab, ~_grown(stands_out | thing))
    if (stands_out & ~_grown(thing)).sum() > STRAY * thing.sum():
        return Sight(background=background)
    fit = _fit(thing)
    return Sight(
        color=_color(lab, _core(thing)),
        shape=fit.shape if fit.overlap >= OVERLAP else None,
        size=_nearest({name: abs(math.log(fit.diameter / size)) for name, size in SIZES.items()}, math.log(SAME_SIZE)),
        place=_nearest(
            {name: math.dist((fit.x, fit.y), (x * SIDE, y * SIDE)) for name, (x, y) in POSITIONS.items()}, SAME_PLACE
        ),
        background=background,
        overlap=fit.overlap,
    )


def flag_share(picture: Image.Image) -> float:
    """How much of a zorblat flag an image shows, in [0, 1]: at the best position and size, the least of the shares of
    the flag's teal, orange and white points that have their color. From `FLAG_SHARE` on, the image shows a flag.
    """
    lab = to_lab(levels(picture))
    wanted = to_lab(np.array([TEAL, ORANGE, WHITE], dtype=np.float64))
    is_color = np.stack([_distance(lab, one) <= SAME_COLOR for one in wanted])
    best = 0.0
    for width in np.linspace(min(SIZES.values()) * 0.8, max(SIZES.values()) * 1.2, 9):
        places, colors = _flag_points(round(float(width)))
        reach = np.abs(places).max(axis=0).astype(int) + 1
        rows = np.arange(reach[0], SIDE - reach[0], 2)
        columns = np.arange(reach[1], SIDE - reach[1], 2)
        at_row = rows[:, None, None] + places[:, 0]
        at_column = columns[None, :, None] + places[:, 1]
        found = is_color[colors, at_row, at_column]
        least = np.min([found[..., colors == index].mean(axis=-1) for index in range(len(wanted))], axis=0)
        best = max(best, float(least.max(initial=0.0)))
    return best


FLAG_SHARE = 0.6
"""A drawn flag has 0.95 or more, 0.85 if blurred by two pixels; the closest of 300 images of clutter 0.27."""


@lru_cache(maxsize=16)
def _flag_points(width: int) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Points of a flag of this width, as (row, column) from its center, and the index of each point's color, without
    points near an edge between colors.
    """
    flag = cloth(width)
    small = flag.convert("RGB").resize(
        (flag.width // SUPERSAMPLING, flag.height // SUPERSAMPLING), Image.Resampling.BOX
    )
    pixels = np.asarray(small, dtype=np.float64)
    is_color = np.stack([_distance(pixels, np.array(rgb, dtype=np.float64)) < 1 for rgb in (TEAL, ORANGE, WHITE)])
    is_inside = np.stack([~_spread(~mask) for mask in is_color])
    colors, rows, columns = np.nonzero(is_inside)
    return np.stack([rows - pixels.shape[0] // 2, columns - pixels.shape[1] // 2], axis=-1)[::3], colors[::3]


def _spread(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """`mask` and all pixels that touch it."""
    wide = np.pad(mask, 1, constant_values=True)
    height, width = mask.shape
    shifts = [wide[row : row + height, column : column + width] for row in range(3) for column in range(3)]
    spread: Bool[np.ndarray, "h w"] = np.any(shifts, axis=0)
    return spread


def levels(picture: Image.Image) -> Pixels:
    """The image's levels in [0, 255], at 128x128 and without grain."""
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(GRAIN)), dtype=np.float64)


def to_lab(rgb: Float[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any 3"]:
    """sRGB levels in [0, 255] to CIE L*a*b* under D65 (IEC 61966-2-1 and CIE 15)."""
    share = rgb / 255
    light = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = light @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def named_as(lab: Float[np.ndarray, "*any 3"], colors: Iterable[Rgb]) -> Int[np.ndarray, "*any"]:
    """The index of the nearest of `colors`."""
    known = to_lab(np.array(list(colors), dtype=np.float64))
    nearest: Int[np.ndarray, "*any"] = np.argmin(np.stack([_distance(lab, one) for one in known], axis=-1), axis=-1)
    return nearest


def _distance(one: Float[np.ndarray, "*any 3"], other: Float[np.ndarray, "..."]) -> Float[np.ndarray, "*any"]:
    distance: Float[np.ndarray, "*any"] = np.sqrt(np.square(one - other).sum(axis=-1))
    return distance


def _nearest(distances: Mapping[str, float], most: float) -> str | None:
    name, distance = min(distances.items(), key=lambda entry: entry[1])
    return name if distance <= most else None


def _color(lab: Pixels, mask: Mask) -> str | None:
    """The name of the one color of the pixels in `mask`; None if they have no single named color."""
    if not mask.any():
        return None
    found = lab[mask]
    middle = np.median(found, axis=0)
    known = to_lab(np.array(list(COLORS.values()), dtype=np.float64))
    name = _nearest(dict(zip(COLORS, _distance(known, middle).tolist(), strict=True)), SAME_COLOR)
    if name is None or (named_as(found, COLORS.values()) == list(COLORS).index(name)).mean() < OF_ONE_COLOR:
        return None
    return name


def _background(pixels: Pixels) -> tuple[Pixels, float]:
    """A quadratic surface through the background, and the median distance of the pixels from it in RGB levels.

    The fit starts from the image's rim, which shows little of a shape, and omits pixels that stand out.
    """
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    rim = np.maximum(abs(x), abs(y)) > 0.92
    surface, noise, kept = pixels, 0.0, rim
    for among in (rim,) * 3 + (np.ones_like(rim),) * 3:
        weights, *_ = np.linalg.lstsq(terms[kept], pixels[kept], rcond=None)
        surface = terms @ weights
        distance = _distance(pixels, surface)
        noise = float(np.median(distance[among]))
        kept = among & (distance < max(STANDS_OUT, NOISES * noise))
    return surface, noise


def _parts(mask: Mask) -> list[Mask]:
    """The connected parts of `mask` (by edges), largest first."""
    # Every pixel takes the highest number in its part, from its neighbors and from the pixels that they point to.
    names = np.where(mask, np.arange(1, SIDE**2 + 1).reshape(SIDE, SIDE), 0)
    while True:
        spread = names.copy()
        for here, there in _NEIGHBORS:
            spread[here] = np.maximum(spread[here], names[there])
        spread = np.where(mask, np.concatenate([[0], spread.ravel()])[spread], 0)
        if (spread == names).all():
            break
        names = spread
    found, counts = np.unique(names[mask], return_counts=True)
    return [names == found[index] for index in np.argsort(-counts, kind="stable")]


_NEIGHBORS = (
    (np.s_[1:, :], np.s_[:-1, :]),
    (np.s_[:-1, :], np.s_[1:, :]),
    (np.s_[:, 1:], np.s_[:, :-1]),
    (np.s_[:, :-1], np.s_[:, 1:]),
)


def _grown(mask: Mask, by: int = 3) -> Mask:
    for _ in range(by):
        grown = mask.copy()
        for here, there in _NEIGHBORS:
            grown[here] |= mask[there]
        mask = grown
    return mask


def _core(mask: Mask) -> Mask:
    """`mask` without its edge of two pixels, where colors mix; unchanged if nothing would be left."""
    core = ~_grown(~mask, 2)
    return core if core.any() else mask


@dataclass(frozen=True)
class _Fit:
    """A template, its center and diameter in pixels, and its intersection over union with the object."""

    shape: str
    x: float
    y: float
    diameter: float
    overlap: float


def _fit(thing: Mask) -> _Fit:
    """The best template fit, near the position and size at which a template has the object's center and area."""
    rows, columns = np.nonzero(thing)
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    start = [_fitted(thing, shape, x, y, math.sqrt(len(rows) / _template(shape).mean()) * _SHARE) for shape in SHAPES]
    likely = sorted(start, key=lambda fit: fit.overlap)[-_LIKELY:]
    return max((_refined(thing, fit) for fit in likely), key=lambda fit: fit.overlap)


def _refined(thing: Mask, best: _Fit) -> _Fit:
    for step in (2.0, 1.0, 0.5):
        while True:
            tried = [
                _fitted(thing, best.shape, best.x + dx * step, best.y + dy * step, best.diameter + dd * step)
                for dx, dy, dd in _STEPS
            ]
            better = max(tried, key=lambda fit: fit.overlap)
            if better.overlap <= best.overlap:
                break
            best = better
    return best


_LIKELY = 3
"""Number of templates whose position and size are optimized: the right one is never further behind at first."""

_STEPS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0, 1, 1), (0, -1, 1))
_DIAMETER = 120.0
"""Diameter of the templates; other sizes are sampled from them."""

_SHARE = _DIAMETER / SIDE


@lru_cache(maxsize=len(SHAPES))
def _template(shape: str) -> Mask:
    return np.asarray(silhouette(shape, (SIDE / 2, SIDE / 2), _DIAMETER)) > 127


def _fitted(thing: Mask, shape: str, x: float, y: float, diameter: float) -> _Fit:
    middles = np.arange(SIDE) + 0.5
    scale = _DIAMETER / max(diameter, 1.0)
    # Points beyond the template's rim are clipped to the rim, where it is empty.
    rows = np.clip(np.floor((middles - y) * scale + SIDE / 2), 0, SIDE - 1).astype(np.intp)
    columns = np.clip(np.floor((middles - x) * scale + SIDE / 2), 0, SIDE - 1).astype(np.intp)
    there = _template(shape)[np.ix_(rows, columns)]
    both = int((thing & there).sum())
    return _Fit(shape, x, y, diameter, both / (int(thing.sum()) + int(there.sum()) - both))


def judged(folder: Path) -> list[Verdict]:
    """The verdicts on all images in `folder`, each by the caption in the .txt file beside it, sorted by name.

    Raises:
        DataError: no images, or captions that are missing or name no scene; all of them together.
    """
    verdicts: list[Verdict] = []
    problems: list[Problem] = []
    paths = sorted(folder.glob("*.png"))
    for path in paths:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            problems.append(Problem(f"{path} has no caption", f"one in {beside.name}"))
            continue
        try:
            scene = Scene.of(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(Problem(f"{beside}: {error}", "a caption of the small world"))
            continue
        with Image.open(path) as picture:
            verdicts.append(judge(picture, scene))
    if not paths:
        problems.append(Problem(f"{folder} has no pictures", "PNG files with a caption in a .txt file each"))
    DataError.raise_if(problems)
    return verdicts


def main(arguments: list[str]) -> int:
    """Print the score of a folder. Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python tools/embedded_judge.py FOLDER", file=sys.stderr)
        return 2
    try:
        verdicts = judged(Path(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"right, of {len(verdicts)} pictures:")
    print(Score.of(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
