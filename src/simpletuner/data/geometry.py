"""Which pixels of a picture are trained: a target, one resize that covers it, one crop. Integers and exact
fractions only, so that the same file gives the same crop on every machine.

All sizes are (width, height) in pixels of the upright picture; an aspect is width / height.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

from simpletuner.base.draws import draw_seed
from simpletuner.config.datasets import ConditioningSet, PictureSet
from simpletuner.data.rejected import Rejected

Size = tuple[int, int]
ResolutionType = Literal["pixel", "area", "pixel_area"]

ALIGNMENT = 16
"""Pixels per latent cell and side: 8 in the autoencoder, 2 in its packing."""

DEFAULT_ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
"""`crop_aspect` closest and random without `crop_aspect_buckets`: the shapes that cameras and screens
have."""


@dataclass(frozen=True)
class Geometry:
    """Resize the upright picture to `resize`, then cut `target` out of it with its corner at `crop`."""

    target: Size
    """Multiples of 16."""
    resize: Size
    """Covers the target on both sides, in the picture's own aspect to the nearest pixel."""
    crop: tuple[int, int]
    """Left and top of the target inside `resize`."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the crop inside `resize`."""
        (left, top), (width, height) = self.crop, self.target
        return left, top, left + width, top + height


def place(size: Size, picture_set: PictureSet, *, seed: int, content: str) -> Geometry:
    """The geometry of one picture of `size`.

    A random aspect or crop is drawn by (seed, "crop", content hash): it stays the same from run to run, so
    that the cached latent stays valid.

    `maximum_image_size` and `target_downsample_size` decide how much of a large picture a crop holds. Without
    them a crop is as much of the picture as the target's shape allows. A picture above the maximum is resized
    to the target downsample size instead (by default the maximum; where only `target_downsample_size` is
    given it is both), if that is larger than what the crop must cover, and never beyond the picture's own
    size; the crop is then a part of it. Without `crop` there is nothing to choose and they change nothing.

    Raises:
        Rejected: outside `minimum_image_size`, an aspect limit or `max_upscale_threshold`.
    """
    _check_size(size, picture_set)
    target = _target(size, picture_set, seed, content)
    cover = _cover(size, target)
    _check_enlargement(size, target, picture_set)
    resize = _downsampled(size, cover, picture_set) or cover
    room = (resize[0] - target[0], resize[1] - target[1])
    return Geometry(target, resize, _corner(room, picture_set, seed, content))


LEAST_REFERENCE_PX, MOST_REFERENCE_ASPECT = 64, 8
"""Shorter side of a reference, and its longer side over the shorter one: what the base models were trained with."""


def place_reference(size: Size, conditioning_set: ConditioningSet, *, seed: int, content: str) -> Geometry:
    """The geometry of a `reference_loose` image of `size`: as `place` with `crop`; otherwise as Black Forest Labs
    prepare references: an area above `resolution` is scaled down to it (sides rounded down), a smaller one is left
    as it is, and what does not divide by 16 is cut from all sides alike.

    Raises:
        Rejected: outside of the set's limits, below 64 pixels or beyond 8:1.
    """
    if conditioning_set.crop:
        return place(size, conditioning_set, seed=seed, content=content)
    _check_size(size, conditioning_set)
    width, height = size
    if min(size) < LEAST_REFERENCE_PX:
        raise Rejected("reference is too small", f"{width}x{height}, the least side is {LEAST_REFERENCE_PX} pixels")
    if max(size) > MOST_REFERENCE_ASPECT * min(size):
        raise Rejected("reference is too narrow", f"{width}x{height}, the most is {MOST_REFERENCE_ASPECT}:1")
    unit = conditioning_set.resolution_type
    cap, measured = _area(conditioning_set.resolution, unit), _measured(size, unit)
    if measured > cap:
        # int(side · √(cap / area)), without the rounding of a float.
        width, height = (math.isqrt(side * side * cap // measured) for side in size)
    target = (width // ALIGNMENT * ALIGNMENT, height // ALIGNMENT * ALIGNMENT)
    if 0 in target:
        raise Rejected("reference is too narrow", f"{size[0]}x{size[1]} has a side below {ALIGNMENT} at `resolution`")
    return Geometry(target, (width, height), ((width - target[0]) // 2, (height - target[1]) // 2))


def has_aspect_of(size: Size, other: Size) -> bool:
    """Whether two sizes differ in aspect by no more than a pixel of the smaller one, as sizes do that were rounded."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def downsample_is_idle(size: Size, geometry: Geometry, picture_set: PictureSet) -> bool:
    """Whether `maximum_image_size` asks to shrink this picture below what its crop must cover, and so does
    nothing."""
    limit = _limit(picture_set)
    if limit is None or not _exceeds(size, limit, picture_set.resolution_type):
        return False
    return _downsampled(size, _cover(size, geometry.target), picture_set) is None


def enlargement(size: Size, target: Size) -> Fraction:
    """By which factor a side grows so that the picture covers the target; below 1 it shrinks."""
    return max(Fraction(target[0], size[0]), Fraction(target[1], size[1]))


def _check_size(size: Size, picture_set: PictureSet) -> None:
    width, height = size
    aspect = Fraction(width, height)
    found = f"{width}x{height}"
    minimum, unit = picture_set.minimum_image_size, picture_set.resolution_type
    if minimum is not None and _measured(size, unit) < _area(minimum, unit):
        raise Rejected("below minimum_image_size", f"{found}, the minimum is {describe(minimum, unit)}")
    lowest, highest = picture_set.minimum_aspect_ratio, picture_set.maximum_aspect_ratio
    if lowest is not None and aspect < Fraction(lowest):
        raise Rejected("below minimum_aspect_ratio", f"{found} is {float(aspect):.3f}, the minimum is {lowest:g}")
    if highest is not None and aspect > Fraction(highest):
        raise Rejected("above maximum_aspect_ratio", f"{found} is {float(aspect):.3f}, the maximum is {highest:g}")


def _check_enlargement(size: Size, target: Size, picture_set: PictureSet) -> None:
    if not _is_near_enough(size, target, picture_set):
        factor = float(enlargement(size, target))
        raise Rejected(
            "above max_upscale_threshold",
            f"{size[0]}x{size[1]} would be enlarged ×{factor:.2f} to cover {target[0]}x{target[1]}, "
            f"the most is ×{1 + (picture_set.max_upscale_threshold or 0):g}",
        )


def _is_near_enough(size: Size, target: Size, picture_set: PictureSet) -> bool:
    threshold = picture_set.max_upscale_threshold
    return threshold is None or enlargement(size, target) <= 1 + Fraction(threshold)


def describe(value: float, unit: ResolutionType) -> str:
    """A size option in words: "1024 pixels on the shorter side", "1024² pixels", "0.5 × 1024² pixels"."""
    if unit == "pixel":
        return f"{value:g} pixels on the shorter side"
    return f"{value:g}² pixels" if unit == "pixel_area" else f"{value:g} × 1024² pixels"


def _area(value: float, unit: ResolutionType) -> int:
    """The area in pixels that a size option stands for; for `pixel`, that of the square on the shorter
    side."""
    return round(Fraction(value) * 1024**2) if unit == "area" else round(Fraction(value) ** 2)


def _measured(size: Size, unit: ResolutionType) -> int:
    """The picture's area as `_area` counts it."""
    return min(size) ** 2 if unit == "pixel" else size[0] * size[1]


def _exceeds(size: Size, limit: float, unit: ResolutionType) -> bool:
    return _measured(size, unit) > _area(limit, unit)


def _target(size: Size, picture_set: PictureSet, seed: int, content: str) -> Size:
    aspect = Fraction(*size)
    if not picture_set.crop or picture_set.crop_aspect == "preserve":
        return aligned(aspect, picture_set)
    if picture_set.crop_aspect == "square":
        return aligned_square(picture_set)
    aspects = [_ratio(value) for value in picture_set.crop_aspect_buckets or DEFAULT_ASPECTS]
    reachable = [a for a in aspects if _is_near_enough(size, aligned(a, picture_set), picture_set)] or aspects
    if picture_set.crop_aspect == "closest":
        return aligned(min(reachable, key=lambda bucket: _distance(bucket, aspect)), picture_set)
    return aligned(reachable[draw_seed(seed, "crop", content, "aspect") % len(reachable)], picture_set)


def _ratio(value: float) -> Fraction:
    """A typed aspect as the ratio that was meant: 0.75 is 3/4, and 1.33 is 133/100 on every machine."""
    return Fraction(value).limit_denominator(1000)


def _distance(one: Fraction, other: Fraction) -> Fraction:
    """How far apart two aspects are, as a factor: 1 when equal, and the same for a picture and its
    transpose."""
    return max(one / other, other / one)


def aligned_square(picture_set: PictureSet) -> Size:
    """(edge, edge), the edge rounded to the nearest multiple of 16."""
    area = _area(picture_set.resolution, picture_set.resolution_type)
    cells = math.isqrt(area) // ALIGNMENT
    cells += 4 * area >= (2 * ALIGNMENT * cells + ALIGNMENT) ** 2
    return (max(cells, 1) * ALIGNMENT,) * 2


def aligned(aspect: Fraction, picture_set: PictureSet) -> Size:
    """The target of an aspect: edge·√a × edge/√a, or for `pixel` edge on the shorter side and edge·a on the
    longer.

    Each side is rounded down or up to a multiple of 16: of these the pair whose area is nearest, then the one
    whose aspect is.
    """
    unit = picture_set.resolution_type
    area = Fraction(_area(picture_set.resolution, unit))
    widths, heights = map(_multiples_beside, _squared_sides(area, aspect, unit))
    if unit == "pixel":
        area *= _distance(aspect, Fraction(1))
    return min(
        product(widths, heights),
        key=lambda pair: (abs(pair[0] * pair[1] - area), _distance(Fraction(*pair), aspect)),
    )


def _squared_sides(area: Fraction, aspect: Fraction, unit: ResolutionType) -> tuple[Fraction, Fraction]:
    """width² and height² of an aspect at an area; for `pixel`, with √area on the shorter side. Squares are
    exact."""
    if unit == "pixel":
        return area * max(aspect, Fraction(1)) ** 2, area * max(1 / aspect, Fraction(1)) ** 2
    return area * aspect, area / aspect


def _multiples_beside(square: Fraction) -> tuple[int, ...]:
    """The multiples of 16 just below and above √square, or the one that it is."""
    cells = math.isqrt(math.floor(square / ALIGNMENT**2))
    if cells and Fraction(cells * ALIGNMENT) ** 2 == square:
        return (cells * ALIGNMENT,)
    return (max(cells, 1) * ALIGNMENT, (cells + 1) * ALIGNMENT)


def _cover(size: Size, target: Size) -> Size:
    """The smallest size in the picture's aspect that covers the target."""
    width, height = size
    if target[0] * height >= target[1] * width:
        return target[0], max(target[1], _divided(height * target[0], width))
    return max(target[0], _divided(width * target[1], height)), target[1]


def _divided(numerator: int, denominator: int) -> int:
    """Nearest whole quotient, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _nearest_root(square: Fraction) -> int:
    """√square to the nearest whole number."""
    root = math.isqrt(math.floor(square))
    return root + (4 * square >= (2 * root + 1) ** 2)


def _limit(picture_set: PictureSet) -> float | None:
    return (
        picture_set.target_downsample_size if picture_set.maximum_image_size is None else picture_set.maximum_image_size
    )


def _downsampled(size: Size, cover: Size, picture_set: PictureSet) -> Size | None:
    """What a picture above the maximum is brought to, or None where that says no more than `cover`."""
    limit, unit = _limit(picture_set), picture_set.resolution_type
    if not picture_set.crop or limit is None or not _exceeds(size, limit, unit):
        return None
    goal = picture_set.target_downsample_size
    area = Fraction(_area(limit if goal is None else goal, unit))
    squares = _squared_sides(area, Fraction(*size), unit)
    width, height = (min(_nearest_root(square), side) for square, side in zip(squares, size, strict=True))
    return (width, height) if width > cover[0] and height > cover[1] else None


def _corner(room: tuple[int, int], picture_set: PictureSet, seed: int, content: str) -> tuple[int, int]:
    """Left and top of the crop. Without `crop`, the few pixels of alignment are taken from all sides
    alike."""
    if not picture_set.crop or picture_set.crop_style == "center":
        return room[0] // 2, room[1] // 2
    if picture_set.crop_style == "corner":
        return 0, 0
    left, top = (draw_seed(seed, "crop", content, axis) % (space + 1) for axis, space in zip("xy", room, strict=True))
    return left, top
