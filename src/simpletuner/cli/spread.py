"""A density of sigma in numbers, in characters and as a picture.

All of it comes from the quantile function that training draws from, taken at evenly spaced u: each of the sigmas that
come out stands for the same share of the samples.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from simpletuner.config.options.schedule import TIMESTEPS
from simpletuner.flow.sigma import Density, shifted

POINTS = 400
"""Quantiles that stand for a density; their mean is within 1e-3 of its mean."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 50
"""Of the histogram, in the picture and in the terminal alike."""

Weighted = list[tuple[float, float]]
"""(sigma, share of the samples), sigma rising."""


@dataclass(frozen=True)
class Resolution:
    """The samples that share a shift."""

    name: str
    tokens: int | None
    """Image tokens of a sample; None where the shift does not depend on them."""
    share: float
    """Of an epoch's samples."""
    shift: float


@dataclass(frozen=True)
class Part:
    """One resolution's density."""

    resolution: Resolution
    sigmas: tuple[float, ...]
    """Rising, each for the same share of the resolution's samples."""

    @property
    def mean(self) -> float:
        return sum(self.sigmas) / len(self.sigmas)

    @property
    def weighted(self) -> Weighted:
        share = self.resolution.share / len(self.sigmas)
        return [(sigma, share) for sigma in self.sigmas]


@dataclass(frozen=True)
class Spread:
    """The density of all samples of an epoch, and of each resolution."""

    title: str
    """The density and its shift, in words."""
    parts: tuple[Part, ...]
    is_listed: bool
    """Whether single sigmas are drawn and nothing between them."""
    strata: int | None
    """Parts of equal share that an epoch's samples take once each; None where each sample draws from the whole."""

    @classmethod
    def of(
        cls,
        density: Density,
        title: str,
        resolutions: Sequence[Resolution],
        *,
        listed_values: int | None,
        strata: int | None,
    ) -> "Spread":
        """`listed_values` is how many single timesteps are drawn, or None for a density."""
        points = POINTS if listed_values is None else listed_values
        plain = [density((index + 0.5) / points) for index in range(points)]
        parts = [Part(own, tuple(shifted(sigma, own.shift) for sigma in plain)) for own in resolutions]
        return cls(title, tuple(parts), listed_values is not None, strata)

    @property
    def weighted(self) -> Weighted:
        return sorted(pair for part in self.parts for pair in part.weighted)

    @property
    def mean(self) -> float:
        return sum(part.mean * part.resolution.share for part in self.parts)

    def percentile(self, percent: float) -> float:
        """The sigma below which `percent` of the samples lie."""
        sigmas, shares = zip(*self.weighted, strict=True)
        below = list(accumulate(shares))
        return float(sigmas[min(bisect_left(below, percent / 100 - 1e-9), len(sigmas) - 1)])

    def histogram(self) -> list[float]:
        """The share of the samples in each of `BINS` equal parts of [0, 1]."""
        shares = [0.0] * BINS
        for part in self.parts:
            for low, high, share in self._cells(part):
                for index in range(_bin(low), _bin(high) + 1):
                    overlap = min(high, (index + 1) / BINS) - max(low, index / BINS)
                    shares[index] += share * (overlap / (high - low) if high > low else 1.0)
        return shares

    def curve(self, part: Part) -> list[tuple[float, float]]:
        """(sigma, density) along one resolution's density, 1 being the uniform one; empty where it is a list."""
        if self.is_listed:
            return []
        pairs = [(low, high) for low, high in pairwise(part.sigmas) if high > low]
        return [((low + high) / 2, 1 / len(part.sigmas) / (high - low)) for low, high in pairs]

    def _cells(self, part: Part) -> list[tuple[float, float, float]]:
        """(from, to, share): each sigma spread evenly half way to its neighbors. What is listed stays a point."""
        share = part.resolution.share / len(part.sigmas)
        if self.is_listed:
            return [(sigma, sigma, share) for sigma in part.sigmas]
        inner = [(low + high) / 2 for low, high in pairwise(part.sigmas)]
        first, last = part.sigmas[0], part.sigmas[-1]
        edges = [max(0.0, 2 * first - inner[0]), *inner, min(1.0, 2 * last - inner[-1])]
        return [(low, high, share) for low, high in pairwise(edges)]

    def summary(self) -> dict[str, Any]:
        """For a JSON reader."""
        return {
            "density": self.title,
            "mean": round(self.mean, 4),
            "percentiles": {str(percent): round(self.percentile(percent), 4) for percent in PERCENTILES},
            "strata": self.strata,
            "resolutions": [
                {
                    "name": part.resolution.name,
                    "tokens": part.resolution.tokens,
                    "share": round(part.resolution.share, 4),
                    "shift": round(part.resolution.shift, 4),
                    "mean": round(part.mean, 4),
                }
                for part in self.parts
            ],
            "histogram": {"bins": BINS, "from": 0, "to": 1, "shares": [round(v, 5) for v in self.histogram()]},
        }

    def notes(self) -> list[str]:
        """What is told below the drawing."""
        lines = [f"mean σ {self.mean:.3f} (timestep {self.mean * TIMESTEPS:.0f})"]
        found = ", ".join(f"{percent} %: {self.percentile(percent):.3f}" for percent in PERCENTILES)
        lines.append(f"percentiles of σ  {found}")
        if self.strata is not None:
            lines.append(f"an epoch takes each {self.strata}th part of it once (timestep_strata)")
        return lines


def _bin(sigma: float) -> int:
    return min(int(sigma * BINS), BINS - 1)


# --- in characters ----------------------------------------------------------------------------------------------------

ROWS = 12
EIGHTHS = " ▁▂▃▄▅▆▇█"
LEFT = 8
"""Characters before the first bar."""
MOST_SHOWN = 12
"""Resolutions in the table; a set may have many more."""


def terminal(spread: Spread) -> str:
    """At most 80 characters wide."""
    shares = spread.histogram()
    top = max(shares)
    lines = [spread.title, ""]
    for row in range(ROWS, 0, -1):
        label = f"{top * row / ROWS:6.1%} ┤" if row % 4 == 0 else " " * 7 + "│"
        bars = (round(8 * ROWS * share / top) - 8 * (row - 1) for share in shares)
        lines.append(label + "".join(EIGHTHS[min(max(bar, 0), 8)] for bar in bars).rstrip())
    lines.append(f"{0:6.1%} └" + "".join("┴" if (column + 1) % (BINS // 10) == 0 else "─" for column in range(BINS)))
    lines.append(" " * LEFT + _ruler())
    lines.append(" " * LEFT + "σ: data".ljust(BINS - 5) + "noise")
    lines += ["", *_broken(spread.notes())]
    if spread.parts[0].resolution.tokens is not None:
        lines += ["", f"  {'size':<12}{'tokens':>8}{'samples':>10}{'shift':>8}{'mean σ':>9}"]
        for part in spread.parts[:MOST_SHOWN]:
            own = part.resolution
            lines.append(f"  {own.name:<12}{own.tokens:>8}{own.share:>10.1%}{own.shift:>8.2f}{part.mean:>9.3f}")
        if len(spread.parts) > MOST_SHOWN:
            lines.append(f"  and {len(spread.parts) - MOST_SHOWN} more sizes (--json has all)")
    return "\n".join(lines)


def _ruler() -> str:
    """The numbers below the axis: every fifth of it, under its tick."""
    line = "0"
    for fifth in range(1, 6):
        line = line.ljust(BINS * fifth // 5 - 2) + f"{fifth / 5:.1f}"
    return line


def _broken(lines: Sequence[str]) -> list[str]:
    """Lines over 78 characters broken at a comma."""
    found = []
    for line in lines:
        rest = line
        while len(rest) > 78:
            cut = rest.rindex(", ", 0, 78) + 1
            found.append(rest[:cut])
            rest = "   " + rest[cut:]
        found.append(rest)
    return found


# --- as a picture -----------------------------------------------------------------------------------------------------

WIDTH_PX, HEIGHT_PX = 1000, 620
PLOT = (90, 70, 970, 430)
"""Left, top, right and bottom of the axes."""
CHART_PAPER, CHART_INK, CHART_GRID, CHART_BAR = "white", "#222222", "#dddddd", "#b9cbe4"
LINES = ("#1f4e9c", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#117a8b")
"""One for each curve; as many curves are drawn as there are colors, spread over the resolutions."""


def spread_picture(spread: Spread) -> Image.Image:
    """The histogram of all samples in bars, and a curve for each resolution."""
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), CHART_PAPER)
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(19)
    left, top, right, bottom = PLOT
    heights = [share * BINS for share in spread.histogram()]
    count = min(len(spread.parts), len(LINES))
    shown = [spread.parts[turn * (len(spread.parts) - 1) // max(count - 1, 1)] for turn in range(count)]
    curves = [spread.curve(part) for part in shown]
    # A density may be infinite at an end: the bars decide how high the axis is.
    highest = min(max([*heights, *(y for curve in curves for _, y in curve)]), 4 * max(heights))
    unit = _round_step(highest)
    ceiling = unit * (int(highest / unit) + 1)

    def place(sigma: float, density: float) -> tuple[float, float]:
        return left + sigma * (right - left), bottom - min(density / ceiling, 1) * (bottom - top)

    draw.text((left, 16), _spelled(f"Where the run trains: {spread.title}"), fill=CHART_INK, font=large)
    for tick in range(int(ceiling / unit) + 1):
        x, y = place(0, tick * unit)
        draw.line((x, y, right, y), fill=CHART_GRID)
        draw.text((x - 10, y), f"{tick * unit:g}", fill=CHART_INK, font=small, anchor="rm")
    draw.text((left, top - 14), "density (1 is even)", fill=CHART_INK, font=small, anchor="lm")
    for index, height in enumerate(heights):
        if height > 0:
            x0, y0 = place(index / BINS, height)
            x1, y1 = place((index + 1) / BINS, 0)
            draw.rectangle((x0 + 1, y0, x1 - 1, y1), fill=CHART_BAR)
    for curve, color in zip(curves, LINES, strict=False):
        if curve:
            draw.line([place(*point) for point in curve], fill=color, width=3, joint="curve")
    for tick in range(11):
        x, y = place(tick / 10, 0)
        draw.line((x, y, x, y + 6), fill=CHART_INK)
        draw.text((x, y + 10), f"{tick / 10:g}", fill=CHART_INK, font=small, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=CHART_INK, width=2)
    draw.text((left, bottom + 32), "data", fill=CHART_INK, font=small, anchor="lt")
    draw.text(((left + right) / 2, bottom + 32), "sigma (timestep / 1000)", fill=CHART_INK, font=small, anchor="mt")
    draw.text((right, bottom + 32), "noise", fill=CHART_INK, font=small, anchor="rt")
    _legend(draw, shown, spread, small)
    return image


def _legend(
    draw: ImageDraw.ImageDraw, shown: Sequence[Part], spread: Spread, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    left, _, _, bottom = PLOT
    y = bottom + 66
    for line in spread.notes():
        draw.text((left, y), _spelled(line), fill=CHART_INK, font=font)
        y += 22
    if spread.parts[0].resolution.tokens is None:
        return
    for index, (part, color) in enumerate(zip(shown, LINES, strict=False)):
        x = left + index % 3 * 300
        row = y + 8 + index // 3 * 22
        own = part.resolution
        draw.line((x, row + 9, x + 22, row + 9), fill=color, width=3)
        text = f"{own.name} ({own.share:.0%}): shift {own.shift:.2f}, mean {part.mean:.3f}"
        draw.text((x + 28, row), text, fill=CHART_INK, font=font)


def _spelled(text: str) -> str:
    """Pillow's own font has neither sign."""
    return text.replace("σ", "sigma").replace("×", "x")


def _round_step(highest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides the axis into three to seven."""
    steps = [base * 10.0**power for power in range(-2, 3) for base in (1, 2, 5)]
    return next((step for step in steps if highest / step < 7), steps[-1])
