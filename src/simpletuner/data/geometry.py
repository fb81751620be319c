"""Geometry of a training image: a target size, one resize that covers it, one crop. Computed with integers and exact
fractions only, so that the same file gives the same crop on every machine.

All sizes are (width, height) in pixels of the upright image; an aspect is width / height.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Literal

from simpletuner.base.draws import draw_seed
from simpletuner.config.datasets import ConditioningSet, FolderDataset
from simpletuner.data.rejected import Rejected

Size = tuple[int, int]
ResolutionType = Literal["pixel", "area", "pixel_area"]

ALIGNMENT = 16
"""Pixels per side of a latent: 8 by the VAE times 2 by its packing."""

DEFAULT_ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
"""Aspects of cameras and screens, for `crop_aspect` closest and random without `crop_aspect_buckets`."""


@dataclass(frozen=True)
class Geometry:
    """How to resize and crop: resize the upright image to `resize`, then crop `target` with its corner at `crop`."""

    target: Size
    """Multiples of 16."""
    resize: Size
    """Covers the target on both sides, in the image's aspect to the nearest pixel."""
    crop: tuple[int, int]
    """Left and top of the target inside `resize`."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the crop inside `resize`."""
        (left, top), (width, height) = self.crop, self.target
        return left, top, left + width, top + height


def image_geometry(size: Size, dataset: FolderDataset, *, seed: int, content: str) -> Geometry:
    """Geometry of an image of `size`.

    A random aspect or crop is drawn by (seed, "crop", content hash), so it is the same in every run and cached latents
    stay valid.

    By default, the crop is the largest part of the image with the target's shape. With `maximum_image_size` and
    `target_downsample_size`, it is a smaller part of a large image: an image above the maximum is resized to the
    downsample size, but never enlarged, before the crop. This applies only if that size is larger than the size that
    just covers the target. If one of the two options is not set, the other stands for both. Without `crop` they have no
    effect.

    Raises:
        Rejected: the image violates `minimum_image_size`, an aspect limit or `max_upscale_threshold`.
    """
    _check_size(size, dataset)
    target = _target(size, dataset, seed, content)
    cover = _cover(size, target)
    _check_enlargement(size, target, dataset)
    resize = _downsampled(size, cover, dataset) or cover
    margin = (resize[0] - target[0], resize[1] - target[1])
    return Geometry(target, resize, _corner(margin, dataset, seed, content))


MIN_REFERENCE_PX, MAX_REFERENCE_ASPECT = 64, 8
"""Limits of a reference: its shorter side, and longer / shorter side. The base models were trained within them."""


def reference_geometry(size: Size, conditioning_set: ConditioningSet, *, seed: int, content: str) -> Geometry:
    """Geometry of a `reference_loose` image of `size`.

    With `crop` it is that of `image_geometry`. Otherwise it follows Black Forest Labs' preparation of references: an
    area above `resolution` is scaled down to it (sides rounded down), a smaller one keeps its size, and sides are
    cropped to multiples of 16 at the center.

    Raises:
        Rejected: the image is outside the dataset's limits, has a side below 64 pixels, or is narrower than 8:1.
    """
    if conditioning_set.crop:
        return image_geometry(size, conditioning_set, seed=seed, content=content)
    _check_size(size, conditioning_set)
    width, height = size
    if min(size) < MIN_REFERENCE_PX:
        raise Rejected("reference is too small", f"{width}x{height}, the minimum side is {MIN_REFERENCE_PX} pixels")
    if max(size) > MAX_REFERENCE_ASPECT * min(size):
        raise Rejected("reference is too narrow", f"{width}x{height}, the maximum is {MAX_REFERENCE_ASPECT}:1")
    unit = conditioning_set.resolution_type
    max_area, area = _area(conditioning_set.resolution, unit), _measured(size, unit)
    if area > max_area:
        # int(side · √(max_area / area)) in integers, without float rounding.
        width, height = (math.isqrt(side * side * max_area // area) for side in size)
    target = (width // ALIGNMENT * ALIGNMENT, height // ALIGNMENT * ALIGNMENT)
    if 0 in target:
        raise Rejected("reference is too narrow", f"{size[0]}x{size[1]} has a side below {ALIGNMENT} at `resolution`")
    return Geometry(target, (width, height), ((width - target[0]) // 2, (height - target[1]) // 2))


def has_aspect_of(size: Size, other_size: Size) -> bool:
    """Whether the aspects of two sizes differ by at most a pixel of the smaller size, the error of rounded sizes."""
    return abs(size[0] * other_size[1] - size[1] * other_size[0]) <= max(*size, *other_size)


def downsample_is_idle(size: Size, geometry: Geometry, dataset: FolderDataset) -> bool:
    """Whether `maximum_image_size` has no effect on this image because its target would not be covered."""
    limit = _limit(dataset)
    if limit is None or not _exceeds(size, limit, dataset.resolution_type):
        return False
    return _downsampled(size, _cover(size, geometry.target), dataset) is None


def enlargement(size: Size, target: Size) -> Fraction:
    """Factor by which an image of `size` is resized to cover `target`; below 1 it shrinks."""
    return max(Fraction(target[0], size[0]), Fraction(target[1], size[1]))


def _check_size(size: Size, dataset: FolderDataset) -> None:
    width, height = size
    aspect = Fraction(width, height)
    dimensions = f"{width}x{height}"
    minimum, unit = dataset.minimum_image_size, dataset.resolution_type
    if minimum is not None and _measured(size, unit) < _area(minimum, unit):
        raise Rejected("below minimum_image_size", f"{dimensions}, the minimum is {describe(minimum, unit)}")
    lowest, highest = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if lowest is not None and aspect < Fraction(lowest):
        raise Rejected("below minimum_aspect_ratio", f"{dimensions} is {float(aspect):.3f}, the minimum is {lowest:g}")
    if highest is not None and aspect > Fraction(highest):
        raise Rejected("above maximum_aspect_ratio", f"{dimensions} is {float(aspect):.3f}, the maximum is {highest:g}")


def _check_enlargement(size: Size, target: Size, dataset: FolderDataset) -> None:
    if not _is_enlargement_allowed(size, target, dataset):
        factor = float(enlargement(size, target))
        raise Rejected(
            "above max_upscale_threshold",
            f"{size[0]}x{size[1]} would be enlarged ×{factor:.2f} to cover {target[0]}x{target[1]}, "
            f"the maximum is ×{1 + (dataset.max_upscale_threshold or 0):g}",
        )


def _is_enlargement_allowed(size: Size, target: Size, dataset: FolderDataset) -> bool:
    threshold = dataset.max_upscale_threshold
    return threshold is None or enlargement(size, target) <= 1 + Fraction(threshold)


def describe(value: float, unit: ResolutionType) -> str:
    """A size option in words: "1024 pixels on the shorter side", "1024² pixels", "0.5 × 1024² pixels"."""
    if unit == "pixel":
        return f"{value:g} pixels on the shorter side"
    return f"{value:g}² pixels" if unit == "pixel_area" else f"{value:g} × 1024² pixels"


def _area(value: float, unit: ResolutionType) -> int:
    """The area in pixels of a size option; for `pixel`, the area of the square on the shorter side."""
    return round(Fraction(value) * 1024**2) if unit == "area" else round(Fraction(value) ** 2)


def _measured(size: Size, unit: ResolutionType) -> int:
    """The image's area in pixels, for comparison with `_area`."""
    return min(size) ** 2 if unit == "pixel" else size[0] * size[1]


def _exceeds(size: Size, limit: float, unit: ResolutionType) -> bool:
    return _measured(size, unit) > _area(limit, unit)


def _target(size: Size, dataset: FolderDataset, seed: int, content: str) -> Size:
    aspect = Fraction(*size)
    if not dataset.crop or dataset.crop_aspect == "preserve":
        return aligned(aspect, dataset)
    if dataset.crop_aspect == "square":
        return aligned_square(dataset)
    aspects = [_ratio(value) for value in dataset.crop_aspect_buckets or DEFAULT_ASPECTS]
    reachable = [a for a in aspects if _is_enlargement_allowed(size, aligned(a, dataset), dataset)] or aspects
    if dataset.crop_aspect == "closest":
        return aligned(min(reachable, key=lambda bucket: _distance(bucket, aspect)), dataset)
    return aligned(reachable[draw_seed(seed, "crop", content, "aspect") % len(reachable)], dataset)


def _ratio(value: float) -> Fraction:
    """An aspect from the configuration as an exact ratio: 0.75 is 3/4, and 1.33 is 133/100 on every machine."""
    return Fraction(value).limit_denominator(1000)


def _distance(first: Fraction, second: Fraction) -> Fraction:
    """Distance of two aspects as a factor: 1 if they are equal, and the same for both aspects transposed."""
    return max(first / second, second / first)


def aligned_square(dataset: FolderDataset) -> Size:
    """(edge, edge), the edge rounded to the nearest multiple of 16."""
    area = _area(dataset.resolution, dataset.resolution_type)
    cells = math.isqrt(area) // ALIGNMENT
    cells += 4 * area >= (2 * ALIGNMENT * cells + ALIGNMENT) ** 2
    return (max(cells, 1) * ALIGNMENT,) * 2


def aligned(aspect: Fraction, dataset: FolderDataset) -> Size:
    """The target size for an aspect a: edge·√a × edge/√a, or for `pixel` edge on the shorter side and edge·a on the
    longer.

    Each side is rounded down or up to a multiple of 16. Of the possible pairs, the one with the nearest area is
    returned, and of equal ones the one with the nearest aspect.
    """
    unit = dataset.resolution_type
    area = Fraction(_area(dataset.resolution, unit))
    widths, heights = map(_nearest_multiples, _squared_sides(area, aspect, unit))
    if unit == "pixel":
        area *= _distance(aspect, Fraction(1))
    return min(
        product(widths, heights),
        key=lambda pair: (abs(pair[0] * pair[1] - area), _distance(Fraction(*pair), aspect)),
    )


def _squared_sides(area: Fraction, aspect: Fraction, unit: ResolutionType) -> tuple[Fraction, Fraction]:
    """width² and height² of an aspect at an area; for `pixel`, √area is the shorter side. Squares are exact."""
    if unit == "pixel":
        return area * max(aspect, Fraction(1)) ** 2, area * max(1 / aspect, Fraction(1)) ** 2
    return area * aspect, area / aspect


def _nearest_multiples(square: Fraction) -> tuple[int, ...]:
    """The multiples of 16 just below and above √square; only one if √square is a multiple."""
    cells = math.isqrt(math.floor(square / ALIGNMENT**2))
    if cells and Fraction(cells * ALIGNMENT) ** 2 == square:
        return (cells * ALIGNMENT,)
    return (max(cells, 1) * ALIGNMENT, (cells + 1) * ALIGNMENT)


def _cover(size: Size, target: Size) -> Size:
    """The smallest size with the image's aspect that covers the target."""
    width, height = size
    if target[0] * height >= target[1] * width:
        return target[0], max(target[1], _rounded_quotient(height * target[0], width))
    return max(target[0], _rounded_quotient(width * target[1], height)), target[1]


def _rounded_quotient(numerator: int, denominator: int) -> int:
    """The quotient rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _nearest_root(square: Fraction) -> int:
    """√square rounded to the nearest integer."""
    root = math.isqrt(math.floor(square))
    return root + (4 * square >= (2 * root + 1) ** 2)


def _limit(dataset: FolderDataset) -> float | None:
    return dataset.target_downsample_size if dataset.maximum_image_size is None else dataset.maximum_image_size


def _downsampled(size: Size, cover: Size, dataset: FolderDataset) -> Size | None:
    """The size to which an image above the maximum is downsampled; None if it must be resized to `cover` instead."""
    limit, unit = _limit(dataset), dataset.resolution_type
    if not dataset.crop or limit is None or not _exceeds(size, limit, unit):
        return None
    goal = dataset.target_downsample_size
    area = Fraction(_area(limit if goal is None else goal, unit))
    squares = _squared_sides(area, Fraction(*size), unit)
    width, height = (min(_nearest_root(square), side) for square, side in zip(squares, size, strict=True))
    return (width, height) if width > cover[0] and height > cover[1] else None


def _corner(margin: tuple[int, int], dataset: FolderDataset, seed: int, content: str) -> tuple[int, int]:
    """Left and top of the crop. Without `crop`, the few excess pixels are cropped equally on all sides."""
    if not dataset.crop or dataset.crop_style == "center":
        return margin[0] // 2, margin[1] // 2
    if dataset.crop_style == "corner":
        return 0, 0
    left, top = (draw_seed(seed, "crop", content, axis) % (space + 1) for axis, space in zip("xy", margin, strict=True))
    return left, top
