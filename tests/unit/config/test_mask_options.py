"""Options about masks that have no effect."""

from typing import Any

import pytest

MASKS = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "datasets/masks",
}
OPTIONS = {
    "masked_loss_probability": 0.5,
    "masked_loss_floor": 0.1,
    "masked_loss_invert": True,
}


@pytest.fixture
def masked(place: Any) -> Any:
    """A set with masks."""
    (place.folder / "datasets" / "masks").mkdir()
    place.datasets[0]["conditioning_data"] = "masks"
    place.datasets.append(dict(MASKS))
    return place


def test_without_masks_none_of_the_options_has_an_effect(place: Any) -> None:
    place.config |= OPTIONS
    names = "masked_loss_probability, masked_loss_floor and masked_loss_invert"
    assert place.load().notices == (f"{names} have no effect: no dataset has masks.",)


def test_with_masks_they_have(masked: Any) -> None:
    masked.config |= OPTIONS
    assert masked.load().notices == ()
    masked.datasets = [masked.datasets[0] | {"conditioning_data": [], "mask_source": "alpha"}, masked.datasets[1]]
    assert masked.load().notices == ()


def test_the_share_of_visits_acts_on_training_sets_alone(masked: Any) -> None:
    (masked.folder / "datasets" / "dogs").mkdir()
    held_out = masked.datasets[0] | {"id": "dogs", "instance_data_dir": "datasets/dogs", "dataset_type": "eval"}
    del masked.datasets[0]["conditioning_data"]
    masked.datasets.append(held_out)
    masked.config |= OPTIONS
    assert masked.load().notices == ("masked_loss_probability has no effect: no training dataset has masks.",)


def test_inversion_of_a_floor_of_1_has_none(masked: Any) -> None:
    masked.config |= OPTIONS | {"masked_loss_floor": 1}
    assert masked.load().notices == ("masked_loss_invert has no effect: masked_loss_floor is 1.",)


def test_masks_of_a_regularization_set_have_none(masked: Any) -> None:
    masked.datasets.append(masked.datasets[0] | {"id": "others", "is_regularisation_data": True})
    (notice,) = masked.load().notices
    assert notice.startswith("others: its masks have no effect: with is_regularisation_data")
