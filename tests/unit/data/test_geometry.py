"""Targets, resizes and crops: by hand where a person can follow, by property where not."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.datasets import ImageSet
from simpletuner.data.geometry import Geometry, Size, downsample_is_idle, image_geometry
from simpletuner.data.rejected import Rejected

QUICKSTART = {
    "crop": True,
    "crop_aspect": "square",
    "crop_style": "center",
    "resolution": 1024,
    "minimum_image_size": 1024,
    "maximum_image_size": 1024,
    "resolution_type": "pixel_area",
}


def image_set(**keys: Any) -> ImageSet:
    return ImageSet.model_validate({"id": "a", "instance_data_dir": "pictures"} | keys)


def placed(size: Size, *, seed: int = 42, content: str = "c", **keys: Any) -> Geometry:
    return image_geometry(size, image_set(**keys), seed=seed, content=content)


def test_the_quickstarts_set_takes_a_4k_photograph_whole_in_height() -> None:
    """Two resamples would shrink it to 1365x768 and enlarge that again; one goes straight to what the crop covers."""
    assert placed((3840, 2160), **QUICKSTART) == Geometry((1024, 1024), (1820, 1024), (398, 0))
    assert placed((2160, 3840), **QUICKSTART) == Geometry((1024, 1024), (1024, 1820), (0, 398))
    assert placed((1024, 1024), **QUICKSTART) == Geometry((1024, 1024), (1024, 1024), (0, 0))


@pytest.mark.parametrize("size", [(1023, 1024), (1365, 768), (640, 480)])
def test_the_quickstarts_set_leaves_out_what_is_below_its_minimum(size: Size) -> None:
    with pytest.raises(Rejected, match=f"{size[0]}x{size[1]}, the minimum is 1024² pixels") as caught:
        placed(size, **QUICKSTART)
    assert caught.value.reason == "below minimum_image_size"


@pytest.mark.parametrize("size", [(3840, 2160), (2160, 3840), (1500, 1000), (1024, 1025)])
def test_the_quickstarts_maximum_is_idle_and_said_to_be(size: Size) -> None:
    own = image_set(**QUICKSTART)
    assert downsample_is_idle(size, image_geometry(size, own, seed=1, content="c"), own)


@pytest.mark.parametrize(
    ("keys", "size", "target"),
    [
        ({"resolution": 1024}, (3000, 2000), (1264, 832)),
        ({"resolution": 1024}, (2000, 3000), (832, 1264)),
        ({"resolution": 1, "resolution_type": "area"}, (3000, 2000), (1264, 832)),
        ({"resolution": 0.25, "resolution_type": "area"}, (3000, 3000), (512, 512)),
        ({"resolution": 512, "resolution_type": "pixel"}, (3000, 2000), (768, 512)),
        ({"resolution": 512, "resolution_type": "pixel"}, (1000, 3000), (512, 1536)),
        ({"resolution": 520, "crop": True, "crop_aspect": "square"}, (3000, 2000), (528, 528)),
        ({"resolution": 519, "crop": True, "crop_aspect": "square"}, (3000, 2000), (512, 512)),
        ({"resolution": 5, "crop": True, "crop_aspect": "square"}, (3000, 2000), (16, 16)),
        ({"resolution": 1, "resolution_type": "area", "crop": True}, (3000, 2000), (1024, 1024)),
        ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0, 1.5]}, (3000, 2000), (1264, 832)),
        ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1, 1.5]}, (2000, 3000), (1024, 1024)),
        ({"crop": True, "crop_aspect": "closest"}, (4000, 3000), (1168, 896)),
    ],
)
def test_targets(keys: dict[str, Any], size: Size, target: Size) -> None:
    assert placed(size, **keys).target == target


def test_a_picture_without_crop_loses_only_the_alignment() -> None:
    geometry = placed((3000, 2000), resolution=1024)
    assert geometry == Geometry((1264, 832), (1264, 843), (0, 5))


@pytest.mark.parametrize("style", ["random", "corner", "center"])
def test_a_larger_downsample_size_crops_a_part_of_the_picture(style: str) -> None:
    keys = {"crop": True, "crop_style": style, "maximum_image_size": 2048}
    assert placed((4096, 4096), **keys).resize == (2048, 2048)
    assert placed((2048, 2048), **keys).resize == (1024, 1024), "not above the maximum"
    larger = placed((4096, 4096), **keys | {"target_downsample_size": 1536})
    assert larger.resize == (1536, 1536)
    assert placed((3000, 3000), **keys | {"target_downsample_size": 8000}).resize == (3000, 3000), "never enlarged"
    assert placed((4000, 2000), **keys | {"resolution_type": "pixel", "maximum_image_size": 1500}).resize == (
        3000,
        1500,
    )


def test_a_downsample_size_alone_is_its_own_maximum() -> None:
    keys = {"crop": True, "target_downsample_size": 2048}
    assert placed((4096, 4096), **keys).resize == (2048, 2048)
    assert placed((2000, 2000), **keys).resize == (1024, 1024)


def test_crop_styles() -> None:
    keys = {"crop": True, "resolution": 64}
    assert placed((128, 64), crop_style="center", **keys).crop == (32, 0)
    assert placed((128, 64), crop_style="corner", **keys).crop == (0, 0)
    drawn = [placed((128, 64), crop_style="random", content=str(turn), **keys).crop for turn in range(200)]
    assert {left for left, _ in drawn} >= {0, 64}, "both ends are reached"
    assert max(left for left, _ in drawn) == 64
    assert {top for _, top in drawn} == {0}


def test_a_random_crop_stays_with_the_content_and_the_seed() -> None:
    keys = {"crop": True, "resolution": 64, "crop_style": "random"}
    assert placed((1280, 64), **keys) == placed((1280, 64), **keys)
    assert placed((1280, 64), **keys) != placed((1280, 64), seed=43, **keys)
    assert placed((1280, 64), **keys) == Geometry((64, 64), (1280, 64), (439, 0)), "the same on every machine"


def test_random_buckets_are_all_used_and_enlarging_ones_only_as_far_as_allowed() -> None:
    keys = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0], "resolution": 64}
    seen = {placed((128, 128), content=str(turn), **keys).target for turn in range(50)}
    assert seen == {(48, 80), (64, 64), (80, 48)}
    limited = keys | {"max_upscale_threshold": 0.0}
    assert {placed((64, 64), content=str(turn), **limited).target for turn in range(20)} == {(64, 64)}


def test_filters() -> None:
    with pytest.raises(Rejected, match=r"is 0\.500, the minimum is 0\.6") as narrow:
        placed((100, 200), minimum_aspect_ratio=0.6)
    with pytest.raises(Rejected, match=r"is 2\.000, the maximum is 1\.5") as wide:
        placed((200, 100), maximum_aspect_ratio=1.5)
    with pytest.raises(Rejected, match=r"×1.28 to cover 1024x1024, the maximum is ×1.25") as small:
        placed((800, 800), max_upscale_threshold=0.25)
    reasons = [caught.value.reason for caught in (narrow, wide, small)]
    assert reasons == ["below minimum_aspect_ratio", "above maximum_aspect_ratio", "above max_upscale_threshold"]
    placed((820, 820), max_upscale_threshold=0.25)


@pytest.mark.parametrize(
    ("unit", "minimum", "passes", "fails"),
    [
        ("pixel", 500, (500, 9000), (499, 9000)),
        ("pixel_area", 500, (250, 1000), (250, 999)),
        ("area", 0.25, (512, 512), (511, 512)),
    ],
)
def test_the_minimum_has_the_unit_of_the_resolution(unit: str, minimum: float, passes: Size, fails: Size) -> None:
    keys = {"resolution_type": unit, "resolution": 1, "minimum_image_size": minimum}
    placed(passes, **keys)
    with pytest.raises(Rejected):
        placed(fails, **keys)


sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000)).filter(lambda s: max(s) <= 12 * min(s))
sets = st.fixed_dictionaries(
    {
        "resolution": st.integers(64, 1536),
        "resolution_type": st.sampled_from(["pixel", "pixel_area"]),
        "crop": st.booleans(),
        "crop_aspect": st.sampled_from(["square", "preserve", "closest", "random"]),
        "crop_style": st.sampled_from(["center", "centre", "corner", "random"]),
        "maximum_image_size": st.none() | st.integers(64, 4096),
        "target_downsample_size": st.none() | st.integers(64, 4096),
    }
)


@given(sizes, sets)
def test_the_crop_lies_inside_one_resize_that_keeps_the_aspect(size: Size, keys: dict[str, Any]) -> None:
    geometry = placed(size, **keys)
    (width, height), (across, down), (left, top) = geometry.target, geometry.resize, geometry.crop
    assert width % 16 == height % 16 == 0
    assert 0 <= left <= across - width
    assert 0 <= top <= down - height
    # Each side is within a pixel of the picture scaled by one factor.
    low = max(Fraction(2 * across - 3, 2 * size[0]), Fraction(2 * down - 3, 2 * size[1]))
    high = min(Fraction(2 * across + 3, 2 * size[0]), Fraction(2 * down + 3, 2 * size[1]))
    assert low <= high
    enlarges = across > size[0] or down > size[1]
    if enlarges:
        assert width == across or height == down, "no larger than the target needs"


@given(sizes.filter(lambda size: size[0] != size[1]), sets)
def test_a_transposed_picture_has_the_transposed_target(size: Size, keys: dict[str, Any]) -> None:
    keys = keys | {"crop_aspect": "preserve"}
    assert placed(size, **keys).target == placed(size[::-1], **keys).target[::-1]


@given(sizes, st.integers(64, 1536))
def test_no_other_rounding_has_a_nearer_area(size: Size, edge: int) -> None:
    target = placed(size, resolution=edge).target
    exact = (edge * (size[0] / size[1]) ** 0.5, edge * (size[1] / size[0]) ** 0.5)
    gap = abs(target[0] * target[1] - edge**2)
    for width in {math.floor(exact[0] / 16) * 16, math.ceil(exact[0] / 16) * 16}:
        for height in {math.floor(exact[1] / 16) * 16, math.ceil(exact[1] / 16) * 16}:
            assert not width or not height or abs(width * height - edge**2) >= gap
