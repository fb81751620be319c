"""The density of the sigmas that a run trains: as JSON, as a chart in the terminal and as an image.

All figures come from the quantile function that training draws from. It is evaluated at evenly spaced probabilities, so
each of the resulting sigmas represents the same share of the samples.
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
"""Number of quantiles that represent a density. Their mean is within 1e-3 of the density's mean."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 50
"""Bins of the histogram, in the image and in the terminal."""

Weighted = list[tuple[float, float]]
"""Pairs (sigma, share of the samples) with ascending sigma."""


@dataclass(frozen=True)
class ResolutionShift:
    """A resolution, or all resolutions that have the same shift."""

    name: str
    tokens: int | None
    """Image tokens of a sample; None if the shift does not depend on them."""
    share: float
    """Share of an epoch's samples."""
    shift: float


@dataclass(frozen=True)
class ResolutionDensity:
    """The density of one resolution."""

    resolution: ResolutionShift
    sigmas: tuple[float, ...]
    """Ascending sigmas, each of which represents the same share of the resolution's samples."""

    @property
    def mean(self) -> float:
        return sum(self.sigmas) / len(self.sigmas)

    @property
    def weighted(self) -> Weighted:
        share = self.resolution.share / len(self.sigmas)
        return [(sigma, share) for sigma in self.sigmas]


@dataclass(frozen=True)
class SampledDensity:
    """The density of all samples of an epoch, and of each resolution."""

    title: str
    """The density and its shift, in words."""
    parts: tuple[ResolutionDensity, ...]
    is_listed: bool
    """Whether training draws only the listed sigmas and no values between them."""
    strata: int | None
    """Number of equal strata, each sampled once per epoch; None if every sample draws from the whole density."""

    @classmethod
    def of(
        cls,
        density: Density,
        title: str,
        resolutions: Sequence[ResolutionShift],
        *,
        listed_values: int | None,
        strata: int | None,
    ) -> "SampledDensity":
        """The shifted density of each resolution. `listed_values` is the number of listed timesteps; None for a
        continuous density."""
        points = POINTS if listed_values is None else listed_values
        unshifted = [density((index + 0.5) / points) for index in range(points)]
        parts = [ResolutionDensity(each, tuple(shifted(s, each.shift) for s in unshifted)) for each in resolutions]
        return cls(title, tuple(parts), listed_values is not None, strata)

    @property
    def weighted(self) -> Weighted:
        return sorted(pair for part in self.parts for pair in part.weighted)

    @property
    def mean(self) -> float:
        return sum(part.mean * part.resolution.share for part in self.parts)

    def percentile(self, percent: float) -> float:
        """The sigma below which `percent` % of the samples lie."""
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

    def curve(self, part: ResolutionDensity) -> list[tuple[float, float]]:
        """Points (sigma, density) of one resolution's density, where 1 is uniform; empty for listed timesteps."""
        if self.is_listed:
            return []
        pairs = [(low, high) for low, high in pairwise(part.sigmas) if high > low]
        return [((low + high) / 2, 1 / len(part.sigmas) / (high - low)) for low, high in pairs]

    def _cells(self, part: ResolutionDensity) -> list[tuple[float, float, float]]:
        """(low, high, share): each sigma's share, spread halfway to its neighbors. Listed sigmas stay points."""
        share = part.resolution.share / len(part.sigmas)
        if self.is_listed:
            return [(sigma, sigma, share) for sigma in part.sigmas]
        inner = [(low + high) / 2 for low, high in pairwise(part.sigmas)]
        first, last = part.sigmas[0], part.sigmas[-1]
        edges = [max(0.0, 2 * first - inner[0]), *inner, min(1.0, 2 * last - inner[-1])]
        return [(low, high, share) for low, high in pairwise(edges)]

    def summary(self) -> dict[str, Any]:
        """The density as JSON."""
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
        """Lines of text below the chart."""
        lines = [f"mean σ {self.mean:.3f} (timestep {self.mean * TIMESTEPS:.0f})"]
        percentiles = ", ".join(f"{percent} %: {self.percentile(percent):.3f}" for percent in PERCENTILES)
        lines.append(f"percentiles of σ  {percentiles}")
        if self.strata is not None:
            lines.append(f"an epoch samples each of {self.strata} equal strata once (timestep_strata)")
        return lines


def _bin(sigma: float) -> int:
    return min(int(sigma * BINS), BINS - 1)


# --- terminal ----------------------------------------------------------------------------------------------------

ROWS = 12
EIGHTHS = " ▁▂▃▄▅▆▇█"
MARGIN = 8
"""Characters before the first bar."""
SIZE_ROWS = 12
"""Maximum number of resolutions in the table; a dataset may have many more."""


def terminal_chart(sampled: SampledDensity) -> str:
    """The chart as text, at most 80 characters wide."""
    shares = sampled.histogram()
    top = max(shares)
    lines = [sampled.title, ""]
    for row in range(ROWS, 0, -1):
        label = f"{top * row / ROWS:6.1%} ┤" if row % 4 == 0 else " " * 7 + "│"
        bars = (round(8 * ROWS * share / top) - 8 * (row - 1) for share in shares)
        lines.append(label + "".join(EIGHTHS[min(max(bar, 0), 8)] for bar in bars).rstrip())
    lines.append(f"{0:6.1%} └" + "".join("┴" if (column + 1) % (BINS // 10) == 0 else "─" for column in range(BINS)))
    lines.append(" " * MARGIN + _ruler())
    lines.append(" " * MARGIN + "σ: data".ljust(BINS - 5) + "noise")
    lines += ["", *_wrapped(sampled.notes())]
    if sampled.parts[0].resolution.tokens is not None:
        lines += ["", f"  {'size':<12}{'tokens':>8}{'samples':>10}{'shift':>8}{'mean σ':>9}"]
        for part in sampled.parts[:SIZE_ROWS]:
            size = part.resolution
            lines.append(f"  {size.name:<12}{size.tokens:>8}{size.share:>10.1%}{size.shift:>8.2f}{part.mean:>9.3f}")
        if len(sampled.parts) > SIZE_ROWS:
            lines.append(f"  and {len(sampled.parts) - SIZE_ROWS} more sizes (--json has all)")
    return "\n".join(lines)


def _ruler() -> str:
    """The numbers below the axis: every fifth of the range, under its tick."""
    line = "0"
    for fifth in range(1, 6):
        line = line.ljust(BINS * fifth // 5 - 2) + f"{fifth / 5:.1f}"
    return line


def _wrapped(lines: Sequence[str]) -> list[str]:
    """`lines`, with those over 78 characters broken at a comma."""
    wrapped = []
    for line in lines:
        remainder = line
        while len(remainder) > 78:
            cut = remainder.rindex(", ", 0, 78) + 1
            wrapped.append(remainder[:cut])
            remainder = "   " + remainder[cut:]
        wrapped.append(remainder)
    return wrapped


# --- image ------------------------------------------------------------------------------------------------------------

WIDTH_PX, HEIGHT_PX = 1000, 620
PLOT = (90, 70, 970, 430)
"""Left, top, right and bottom of the axes."""
CHART_PAPER, CHART_INK, CHART_GRID, CHART_BAR = "white", "#222222", "#dddddd", "#b9cbe4"
LINES = ("#1f4e9c", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#117a8b")
"""Color of each curve. At most this many curves are plotted, of evenly chosen resolutions."""


def chart_image(sampled: SampledDensity) -> Image.Image:
    """The chart as an image: the histogram of all samples as bars, and a curve for each resolution."""
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), CHART_PAPER)
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(19)
    x_min, top, x_max, bottom = PLOT
    heights = [share * BINS for share in sampled.histogram()]
    count = min(len(sampled.parts), len(LINES))
    plotted = [sampled.parts[i * (len(sampled.parts) - 1) // max(count - 1, 1)] for i in range(count)]
    curves = [sampled.curve(part) for part in plotted]
    # A density may be infinite at an end, so the bars limit the height of the axis.
    highest = min(max([*heights, *(y for curve in curves for _, y in curve)]), 4 * max(heights))
    unit = _round_step(highest)
    ceiling = unit * (int(highest / unit) + 1)

    def pixel(sigma: float, density: float) -> tuple[float, float]:
        return x_min + sigma * (x_max - x_min), bottom - min(density / ceiling, 1) * (bottom - top)

    draw.text((x_min, 16), _ascii_text(f"Density of sigma: {sampled.title}"), fill=CHART_INK, font=large)
    for tick in range(int(ceiling / unit) + 1):
        x, y = pixel(0, tick * unit)
        draw.line((x, y, x_max, y), fill=CHART_GRID)
        draw.text((x - 10, y), f"{tick * unit:g}", fill=CHART_INK, font=small, anchor="rm")
    draw.text((x_min, top - 14), "density (1 is uniform)", fill=CHART_INK, font=small, anchor="lm")
    for index, height in enumerate(heights):
        if height > 0:
            x0, y0 = pixel(index / BINS, height)
            x1, y1 = pixel((index + 1) / BINS, 0)
            draw.rectangle((x0 + 1, y0, x1 - 1, y1), fill=CHART_BAR)
    for curve, color in zip(curves, LINES, strict=False):
        if curve:
            draw.line([pixel(*point) for point in curve], fill=color, width=3, joint="curve")
    for tick in range(11):
        x, y = pixel(tick / 10, 0)
        draw.line((x, y, x, y + 6), fill=CHART_INK)
        draw.text((x, y + 10), f"{tick / 10:g}", fill=CHART_INK, font=small, anchor="mt")
    draw.line((x_min, bottom, x_max, bottom), fill=CHART_INK, width=2)
    draw.text((x_min, bottom + 32), "data", fill=CHART_INK, font=small, anchor="lt")
    draw.text(((x_min + x_max) / 2, bottom + 32), "sigma (timestep / 1000)", fill=CHART_INK, font=small, anchor="mt")
    draw.text((x_max, bottom + 32), "noise", fill=CHART_INK, font=small, anchor="rt")
    _legend(draw, plotted, sampled, small)
    return image


def _legend(
    draw: ImageDraw.ImageDraw,
    plotted: Sequence[ResolutionDensity],
    sampled: SampledDensity,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x_min, _, _, bottom = PLOT
    y = bottom + 66
    for line in sampled.notes():
        draw.text((x_min, y), _ascii_text(line), fill=CHART_INK, font=font)
        y += 22
    if sampled.parts[0].resolution.tokens is None:
        return
    for index, (part, color) in enumerate(zip(plotted, LINES, strict=False)):
        x = x_min + index % 3 * 300
        row = y + 8 + index // 3 * 22
        size = part.resolution
        draw.line((x, row + 9, x + 22, row + 9), fill=color, width=3)
        text = f"{size.name} ({size.share:.0%}): shift {size.shift:.2f}, mean {part.mean:.3f}"
        draw.text((x + 28, row), text, fill=CHART_INK, font=font)


def _ascii_text(text: str) -> str:
    """`text` with replacements for the characters σ and ×, which Pillow's default font lacks."""
    return text.replace("σ", "sigma").replace("×", "x")


def _round_step(highest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides the axis into three to seven intervals."""
    steps = [base * 10.0**power for power in range(-2, 3) for base in (1, 2, 5)]
    return next((step for step in steps if highest / step < 7), steps[-1])
