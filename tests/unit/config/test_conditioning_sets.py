"""Conditioning sets in the dataset list: what is wrong across entries, and what has no effect."""

from typing import Any

import pytest

LIST = "config/multidatabackend.json, "


pytestmark = pytest.mark.usefixtures("edits")


@pytest.fixture
def edits(place: Any) -> dict[str, Any]:
    """A conditioning set that the image set names."""
    (place.folder / "datasets" / "before").mkdir()
    place.datasets.append(entry("before"))
    place.datasets[0]["conditioning_data"] = "before"
    found: dict[str, Any] = place.datasets[-1]
    return found


def entry(name: str, kind: str = "reference_strict", **keys: Any) -> dict[str, Any]:
    own = {"id": name, "dataset_type": "conditioning", "conditioning_type": kind}
    return own | {"instance_data_dir": "datasets/before", **keys}


def test_conditions_come_in_the_order_in_which_they_are_named(place: Any) -> None:
    place.datasets.append(entry("style", "reference_loose", resolution=512))
    place.datasets.append(entry("masks", "mask"))
    place.datasets[0]["conditioning_data"] = ["style", "masks", "before"]
    loaded = place.load()
    (image_set,) = loaded.datasets.train_sets
    assert [each.id for each in loaded.datasets.conditions_of(image_set)] == ["style", "masks", "before"]
    assert [each.is_reference for each in loaded.datasets.conditions_of(image_set)] == [True, False, True]
    assert loaded.notices == ()


def test_faults_between_entries_come_all_at_once(place: Any) -> None:
    place.datasets += [entry("masks", "mask"), entry("segments", "segmentation"), entry("off", disabled=True)]
    place.datasets += [entry("lonely"), entry("inside", instance_data_dir="datasets/cats/sub")]
    place.datasets.append(entry("same", instance_data_dir="datasets/cats"))
    (place.folder / "datasets/cats/sub").mkdir()
    named = ["before", "befor", "off", "masks", "segments", "inside", "same"]
    place.datasets[0] |= {"conditioning_data": named, "mask_source": "alpha"}
    cats = f"{LIST}cats: "
    assert place.problems() == [
        f"{cats}conditioning_data = 'befor': expected the id of a conditioning set: "
        "before, masks, segments, off, lonely, inside or same.",
        f"{cats}conditioning_data = 'off', which is disabled: expected an enabled conditioning set.",
        f"{cats}conditioning_data names masks and segments: expected one set of masks.",
        f"{cats}mask_source = 'alpha' beside the mask set masks: expected one source of masks. "
        "Leave masks out of conditioning_data, or set mask_source to set.",
        f"{LIST}inside: instance_data_dir is inside that of cats, which would train its files as images: "
        "expected a folder beside it.",
        f"{LIST}same: instance_data_dir is that of cats, which would train its files as images: "
        "expected a folder beside it.",
        f"{LIST}lonely: no image set names it in conditioning_data: expected an image set that it belongs to. "
        'Put "conditioning_data": "lonely" into the image set, or "disabled": true into this entry.',
    ]


def test_a_set_is_named_once_and_eleven_sets_of_references_are_too_many(place: Any) -> None:
    place.datasets[0]["conditioning_data"] = ["before", "before"]
    assert place.problems() == [f"{LIST}cats: conditioning_data names before more than once: expected each set once."]
    more = [f"more-{number}" for number in range(10)]
    place.datasets += [entry(name) for name in more]
    place.datasets[0]["conditioning_data"] = ["before", *more]
    assert place.problems() == [f"{LIST}cats: conditioning_data names 11 sets of references: expected at most 10."]


def test_a_condition_of_a_disabled_set_only_is_passed_over(place: Any) -> None:
    place.datasets.append(place.datasets[0] | {"id": "more", "conditioning_data": []})
    place.datasets[0]["disabled"] = True
    assert place.load().notices == ()


def test_without_a_conditioning_set_an_unknown_id_says_so(place: Any) -> None:
    del place.datasets[-1]
    assert place.problems() == [
        f"{LIST}cats: conditioning_data = 'before': expected the id of a conditioning set; there is none."
    ]


def test_a_cache_does_not_lie_among_the_conditions(place: Any, edits: dict[str, Any]) -> None:
    edits["cache_dir_vae"] = "datasets/before"
    (problem,) = place.problems()
    assert problem.startswith(f"{LIST}before: instance_data_dir is also cache_dir_vae of before: expected a folder")


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        (
            {"resolution": 512, "crop": True},
            "resolution and crop have no effect: with reference_strict a file is resized and cropped like its image.",
        ),
        (
            {"conditioning_type": "mask", "minimum_image_size": 512},
            "minimum_image_size has no effect: with mask a file is resized and cropped like its image.",
        ),
        (
            {"conditioning_type": "reference_loose", "maximum_image_size": 512},
            "maximum_image_size has no effect: references without crop are downsampled to resolution, "
            "and never enlarged.",
        ),
        (
            {"conditioning_type": "reference_loose", "crop_style": "center"},
            "crop_style has no effect: crop is false.",
        ),
    ],
)
def test_keys_without_effect_are_named(
    place: Any, edits: dict[str, Any], changes: dict[str, object], notice: str
) -> None:
    edits |= changes
    assert place.load().notices == (f"{LIST}before: {notice}",)


def test_options_of_references_need_references(place: Any, edits: dict[str, Any]) -> None:
    flags = ("--reference_attention=own", "--reference_dropout_probability=0.5")
    assert place.load(*flags).notices == ()
    edits["conditioning_type"] = "mask"
    assert place.load(*flags).notices == (
        "reference_dropout_probability and reference_attention have no effect: no dataset has references.",
    )


def test_a_condition_that_is_required_needs_a_set(place: Any) -> None:
    del place.datasets[-1], place.datasets[0]["conditioning_data"]
    place.datasets[0]["conditioning_required"] = True
    assert place.load().notices == (
        f"{LIST}cats: conditioning_required has no effect: conditioning_data names no set.",
    )


def test_the_keys_of_a_conditioning_set_are_checked_like_others(place: Any, edits: dict[str, Any]) -> None:
    edits |= {"conditioning_type": "reference_loose", "resolution": 8}
    (problem,) = place.problems()
    assert problem.startswith(f"{LIST}before: resolution = 8 with resolution_type = 'pixel_area': expected a whole")
    edits |= {"resolution": 512, "repeats": 2}
    assert place.problems() == [
        f"{LIST}before: repeats: no such key of a conditioning set. It belongs in an image set."
    ]
