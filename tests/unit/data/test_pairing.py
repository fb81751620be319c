"""Images and their partners: which files belong together, which part of them is used, and what is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_json
from simpletuner.config.datasets import ConditioningSet, ImageSet
from simpletuner.data.geometry import has_aspect_of, reference_geometry
from simpletuner.data.manifest import Manifest, count_new, scan
from simpletuner.data.pixels import ORIENTATION_TAG, render
from simpletuner.data.rejected import Rejected

Save = Callable[..., Path]
MakeSet = Callable[..., ImageSet]


def condition(tmp_path: Path, name: str = "before", kind: str = "reference_strict", **keys: Any) -> ConditioningSet:
    (tmp_path / name).mkdir(exist_ok=True)
    own = {"id": name, "dataset_type": "conditioning", "conditioning_type": kind, "resolution": 64}
    places = {"instance_data_dir": str(tmp_path / name), "cache_dir_vae": str(tmp_path / "vae" / name)}
    return ConditioningSet.model_validate(own | places | keys)


def put(own: ConditioningSet, name: str, size: tuple[int, int] = (80, 64), **options: Any) -> None:
    path = Path(own.instance_data_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "olive").save(path, **options)


def paired(image_set: ImageSet, *conditions: ConditioningSet) -> Manifest:
    return scan(image_set, conditions, seed=42, workers=2)


def names(manifest: Manifest) -> dict[str, list[str]]:
    """Of each sample, its references as set/name."""
    return {s.name: [f"{crop.dataset}/{crop.name}" for crop in s.references] for s in manifest.samples}


def test_references_come_by_stem_in_the_order_of_the_sets_and_of_their_numbers(
    tmp_path: Path, save: Save, make_set: MakeSet
) -> None:
    for name in ("a/cat.jpg", "dog.png", "dog.1.png", "hen.png"):
        save(name)
    before, style = condition(tmp_path), condition(tmp_path, "style", "reference_loose")
    for name in ("a/cat.10.png", "a/cat.2.jpg", "a/cat.webp", "dog.png", "dog.1.png", "dog.2.png", "cat.png"):
        put(before, name)
    put(style, "a/cat.png")
    found = paired(make_set(), style, before)
    assert names(found) == {
        "a/cat.jpg": ["style/a/cat.png", "before/a/cat.webp", "before/a/cat.2.jpg", "before/a/cat.10.png"],
        "dog.1.png": ["before/dog.1.png"],
        "dog.png": ["before/dog.png", "before/dog.2.png"],
        "hen.png": [],
    }
    assert found.notices == (
        "photos: references: 1 with none, 1 with 1, 1 with 2, 1 with 4.",
        "photos: 3 of 4 images have no partner in style and are trained without one (dog.1.png, dog.png, hen.png).",
        "photos: 1 of 4 images have no partner in before and are trained without one (hen.png).",
        "before: 1 of 7 files belong to no image of photos (cat.png).",
    )
    again = Manifest.of_record(found.image_set, json.loads(json.dumps(found.record())), found.conditions)
    assert again == found
    assert again.fingerprint == found.fingerprint
    assert again.samples[0].references[0].read() == Path(tmp_path / "style/a/cat.png").read_bytes()
    assert count_new(found.image_set, (style, before)) == 0


def test_a_set_without_conditions_keeps_its_fingerprint(save: Save, scanned: Callable[..., Manifest]) -> None:
    """What is hashed is what it was before there were references, so that a run of then can be resumed."""
    save("a.png")
    found = scanned()
    (sample,) = found.samples
    row = (sample.name, sample.content, sample.geometry.__dict__, sample.captions)
    assert found.fingerprint == sha256_json(["photos", 0, 1.0, None, [row]])


def test_references_and_masks_change_the_fingerprint(tmp_path: Path, save: Save, make_set: MakeSet) -> None:
    save("a.png", (80, 64))
    before, mask, segments = (
        condition(tmp_path, name, kind)
        for name, kind in (("before", "reference_strict"), ("masks", "mask"), ("segments", "segmentation"))
    )
    for own in (before, mask, segments):
        put(own, "a.png")
    fingerprints = [paired(make_set(), *sets).fingerprint for sets in ((), (before,), (mask,), (segments,))]
    put(before, "a.png", (160, 128))
    fingerprints.append(paired(make_set(), before).fingerprint)
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize("style", ["center", "corner", "random"])
def test_a_strict_partner_of_twice_the_size_shows_the_same_part(
    tmp_path: Path, folder: Path, make_set: MakeSet, style: str
) -> None:
    """Of a ramp that is drawn at two sizes, the second one turned on its side by EXIF, the pixels are the same."""
    ramp = np.linspace(0, 255, 192 * 128).reshape(128, 192)
    gray = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    gray.save(folder / "a.png")
    before = condition(tmp_path)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    turned = gray.resize((384, 256), Image.Resampling.BICUBIC).transpose(Image.Transpose.ROTATE_90)
    turned.save(Path(before.instance_data_dir) / "a.png", exif=exif)
    (sample,) = paired(make_set(crop=True, crop_style=style), before).samples
    (reference,) = sample.references
    assert (reference.width, reference.height) == (384, 256)
    assert reference.geometry == sample.geometry
    ours, theirs = (render(crop.read(), crop.geometry).astype(int) for crop in (sample, reference))
    assert ours.shape == theirs.shape == (64, 64, 3)
    assert abs(ours - theirs).max() <= 3


def test_a_mask_takes_the_crop_of_its_image_and_no_number(tmp_path: Path, save: Save, make_set: MakeSet) -> None:
    save("a.png", (100, 64))
    save("b.png", (100, 64))
    masks = condition(tmp_path, "masks", "mask")
    put(masks, "a.png", (50, 32))
    put(masks, "b.1.png")
    one, other = paired(make_set(crop=True), masks).samples
    assert one.mask is not None
    assert (one.mask.dataset, one.mask.name, one.mask.geometry) == ("masks", "a.png", one.geometry)
    assert one.references == ()
    assert other.mask is None


def test_with_mask_source_alpha_an_image_with_transparency_is_its_own_mask(
    folder: Path, save: Save, make_set: MakeSet
) -> None:
    save("plain.png")
    Image.new("RGBA", (80, 64), (9, 9, 9, 99)).save(folder / "clear.png")
    found = paired(make_set(mask_source="alpha"))
    clear, plain = found.samples
    assert clear.mask is not None
    assert (clear.mask.dataset, clear.mask.content, clear.mask.geometry) == ("photos", clear.content, clear.geometry)
    assert plain.mask is None
    assert found.notices == ()
    assert Manifest.of_record(found.image_set, json.loads(json.dumps(found.record()))) == found


def test_a_partner_that_cannot_be_used_rejects_its_image(tmp_path: Path, save: Save, make_set: MakeSet) -> None:
    for name in ("fine", "broken", "shape", "two", "small", "narrow", "many", "alone"):
        save(f"{name}.png", (100, 80))
    before, style = condition(tmp_path), condition(tmp_path, "style", "reference_loose")
    put(before, "fine.png", (50, 40))
    (tmp_path / "before" / "broken.png").write_text("not a picture")
    put(before, "shape.png", (80, 100))
    put(before, "two.png", (100, 80))
    put(before, "two.jpg", (100, 80))
    put(style, "small.png", (100, 63))
    put(style, "narrow.png", (1000, 100))
    for number in range(11):
        put(style, f"many.{number}.png", (64, 64))
    found = paired(make_set(), before, style)
    assert [sample.name for sample in found.samples] == ["alone.png", "fine.png"]
    assert {(each.name, each.reason, each.detail) for each in found.rejections} == {
        ("broken.png", "before: not an image", "broken.png: no supported image format"),
        (
            "shape.png",
            "before: aspect differs from its image's",
            "shape.png: 80x100, its image is 100x80; give both the same shape",
        ),
        ("two.png", "more than one partner", "before has two.jpg and two.png: keep one of them"),
        ("small.png", "style: reference is too small", "small.png: 100x63, the minimum side is 64 pixels"),
        ("narrow.png", "style: reference is too narrow", "narrow.png: 1000x100, the maximum is 8:1"),
        ("many.png", "too many references", "11, the maximum is 10"),
    }
    required = paired(make_set(conditioning_required=True), before)
    assert [sample.name for sample in required.samples] == ["fine.png"]
    assert required.summary()["rejected"]["no partner in before"] == 4


def test_a_set_that_has_no_partner_at_all_is_an_error(tmp_path: Path, save: Save, make_set: MakeSet) -> None:
    save("a.png")
    before, empty = condition(tmp_path), condition(tmp_path, "empty")
    put(before, "a_before.png")
    with pytest.raises(DataError) as caught:
        paired(make_set(), before, empty)
    assert [str(problem) for problem in caught.value.problems] == [
        "photos: no image has a partner in before: it has a_before.png: "
        "expected files of the same names, such as a.png for a.png.",
        "photos: no image has a partner in empty: it has no images: "
        "expected files of the same names, such as a.png for a.png.",
    ]


@pytest.mark.parametrize(
    ("size", "resolution", "target"),
    [
        ((4000, 3000), 2024, (2336, 1744)),
        ((4000, 3000), 1024, (1168, 880)),
        ((3840, 2160), 2024, (2688, 1504)),
        ((3840, 2160), 1024, (1360, 768)),
        ((1920, 1080), 2024, (1920, 1072)),
        ((1920, 1080), 1024, (1360, 768)),
        ((1000, 700), 1024, (992, 688)),
        ((512, 64), 1024, (512, 64)),
    ],
)
def test_a_loose_reference_has_the_size_that_black_forest_labs_give_it(
    tmp_path: Path, size: tuple[int, int], resolution: int, target: tuple[int, int]
) -> None:
    own = condition(tmp_path, "style", "reference_loose", resolution=resolution)
    found = reference_geometry(size, own, seed=1, content="c")
    assert found.target == target
    assert all(
        0 <= room - 2 * corner <= 1
        for room, corner in zip((found.resize[0] - target[0], found.resize[1] - target[1]), found.crop, strict=True)
    )
    if size[0] * size[1] <= resolution**2:
        assert found.resize == size


def test_a_loose_reference_with_crop_is_cropped_like_an_image_set(tmp_path: Path) -> None:
    own = condition(tmp_path, "style", "reference_loose", crop=True)
    assert reference_geometry((50, 40), own, seed=1, content="c").target == (64, 64)
    with pytest.raises(Rejected):
        reference_geometry((50, 40), own.model_copy(update={"minimum_image_size": 64.0}), seed=1, content="c")


def test_a_reference_too_narrow_for_its_resolution_is_rejected(tmp_path: Path) -> None:
    own = condition(tmp_path, "style", "reference_loose", resolution=32)
    with pytest.raises(Rejected, match="has a side below 16"):
        reference_geometry((512, 64), own, seed=1, content="c")


@pytest.mark.parametrize(
    ("size", "other", "same"),
    [
        ((1000, 667), (500, 333), True),
        ((1000, 667), (500, 334), True),
        ((500, 333), (2000, 1335), True),
        ((500, 333), (2000, 1340), False),
        ((64, 64), (66, 64), False),
        ((64, 64), (65, 64), True),
        ((80, 64), (64, 80), False),
    ],
)
def test_aspects_agree_to_a_pixel_of_the_smaller_size(
    size: tuple[int, int], other: tuple[int, int], same: bool
) -> None:
    assert has_aspect_of(size, other) is same
    assert has_aspect_of(other, size) is same
