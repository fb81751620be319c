"""Every recipe that is ready loads as it stands, and says where each of its numbers comes from."""

import json
from typing import Any, get_args

import pytest

from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.recipes import (
    CARDS,
    MIN_STEPS,
    RECIPES,
    Recipe,
    RecipeName,
    card_of,
    recipe,
    resident_flavour,
)
from simpletuner.config.run import OPTION_NAMES

READY = [each for each in RECIPES if each.is_ready]


def test_subject_and_style_are_ready_for_every_flavour_that_can_be_trained() -> None:
    assert {(each.name, each.flavour) for each in READY} == {
        (name, flavour.name)
        for name in ("subject", "style")
        for flavour in FLAVOURS.values()
        if not flavour.is_distilled
    }


def test_recipes_that_need_what_is_not_built_say_so() -> None:
    assert {each.name for each in RECIPES} == set(get_args(RecipeName))
    for each in RECIPES:
        assert ("reference images" in each.needs) == (each.name == "edit")


@pytest.mark.parametrize("each", RECIPES, ids=lambda each: f"{each.name}-{each.flavour}")
def test_each_number_names_its_source(each: Recipe) -> None:
    assert set(each.options) == set(each.sources) <= set(OPTION_NAMES)
    assert all(each.sources.values())
    assert json.loads(json.dumps(dict(each.options))) == each.options


@pytest.mark.parametrize("each", READY, ids=lambda each: f"{each.name}-{each.flavour}")
def test_each_ready_recipe_loads_without_problem(each: Recipe, place: Any) -> None:
    is_embedded = FLAVOURS[each.flavour].repo is None
    cards: list[dict[str, Any]] = [{}] if is_embedded else [dict(card.fits[each.flavour].options) for card in CARDS]
    for card in cards:
        place.config = {"model_flavour": each.flavour, **each.options, **card}
        loaded = place.load()
        assert [notice for notice in loaded.notices if "non-commercial" not in notice] == []


def test_only_the_recipe_of_the_embedded_model_counts_as_tested() -> None:
    assert [(each.name, each.flavour) for each in RECIPES if each.is_tested] == [("subject", "tiny")]


def test_few_images_are_seen_more_often() -> None:
    style = recipe("style", "dev")
    assert style.epochs(5) * 5 == MIN_STEPS
    assert style.epochs(100) == 30
    assert recipe("subject", "tiny").epochs(12) * 2 == MIN_STEPS


@pytest.mark.parametrize(
    ("gib", "name"), [(4.0, None), (7.6, "8 GB"), (11.9, "12 GB"), (39.4, "32 GB"), (79.6, "80 GB"), (140.0, "80 GB")]
)
def test_a_card_is_taken_by_the_memory_it_has(gib: float, name: str | None) -> None:
    card = card_of(gib)
    assert (card and card.name) == name


@pytest.mark.parametrize(
    ("gib", "name"),
    [(4.0, None), (8.0, "klein-4b"), (12.0, "klein-4b"), (16.0, "klein-9b"), (24.0, "klein-9b"), (48.0, None)],
)
def test_the_largest_model_that_stays_on_a_card_is_named_where_dev_does_not(gib: float, name: str | None) -> None:
    assert resident_flavour(card_of(gib)) == name


def test_klein_recipes_hold_no_option_of_a_guidance_embedder() -> None:
    for each in (each for each in READY if "klein" in each.flavour):
        assert not [option for option in each.options if option.startswith("flux_guidance")]
        assert each.options["caption_dropout_probability"] > 0
