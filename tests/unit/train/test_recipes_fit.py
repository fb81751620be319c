"""The memory plan of every ready recipe stays below the card that it names."""

import pytest

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.recipes import CARDS, RECIPES, Card, Recipe
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.memory.planner import MachineMemory

# Of a flavour all recipes take the same memory.
READY = [each for each in RECIPES if each.name == "subject" and FLAVOURS[each.flavour].repo is not None]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("each", READY, ids=lambda each: f"{each.name}-{each.flavour}")
def test_each_ready_recipe_fits_on_each_card(each: Recipe, card: Card) -> None:
    named = {"model_flavour": each.flavour, **FLAVOURS[each.flavour].option_defaults}
    config = RunConfig.model_validate({**named, **each.options, **card.fits[each.flavour].options})
    machine = MachineMemory.of_size(card.vram_gib * GIB, card.ram_gib * GIB)
    work = Workload((1024, 1024), config.train_batch_size, samples_images=True)
    plan = Footprint(config, Architecture.of(config), work, machine).plan()
    assert plan.fits, plan.lacks
