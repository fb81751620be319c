"""What a configuration begins with: a model, a card and a recipe."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import FLAVOURS, Flavour
from simpletuner.config.recipes import CARDS, LEAST_STEPS, RECIPES, Card, Recipe, card_of
from simpletuner.server.context import InContext
from simpletuner.server.meter import MeteredGpu

router = APIRouter()


class ModelChoice(BaseModel):
    """A flavour."""

    name: str
    summary: str
    license: str
    licence: str
    """The same, under its older name."""
    preview: str | None
    """The distilled flavour of the same size, which draws in few steps and is no choice for training."""
    download_bytes: int
    """Weights that a first run downloads."""
    is_embedded: bool
    """Whether it is made on the spot and trains without a GPU."""
    options: dict[str, Any]
    """What every run of it needs."""
    sources: dict[str, str]
    """Option to where its value comes from."""


class FoundGpu(BaseModel):
    """A GPU of this machine."""

    name: str
    vram_gib: float
    card: str | None
    """The card whose options suit it; null where it is smaller than all of them."""


class Choices(BaseModel):
    """What a configuration begins with."""

    models: list[ModelChoice]
    cards: list[Card]
    gpus: list[FoundGpu]
    """Empty where there is none."""
    recipes: list[Recipe]
    least_steps: int
    """Optimizer steps under which a LoRA has hardly learned anything."""


@router.get("/recipes")
def recipes(here: InContext) -> Choices:
    """Models, cards and recipes to choose from, and the GPUs of this machine."""
    return Choices(
        models=_models(),
        cards=list(CARDS),
        gpus=_gpus(here.meter.read(here.workspace).gpus),
        recipes=[replace(recipe, **_with_epochs(recipe)) for recipe in RECIPES],
        least_steps=LEAST_STEPS,
    )


def _models() -> list[ModelChoice]:
    models = [
        ModelChoice(
            name=name,
            summary=flavour.summary,
            license=flavour.license,
            licence=flavour.license,
            preview=flavour.preview,
            download_bytes=sum(flavour.downloads.values()),
            is_embedded=flavour.repo is None,
            options=_sizes(flavour),
            sources=dict.fromkeys(_sizes(flavour), "the only size that this model can make"),
        )
        for name, flavour in FLAVOURS.items()
        if not flavour.is_distilled
    ]
    return sorted(models, key=lambda model: model.is_embedded)


def _sizes(flavour: Flavour) -> dict[str, Any]:
    side = flavour.only_side
    return {} if side is None else {"validation_resolution": f"{side}x{side}"}


def _gpus(metered: Sequence[MeteredGpu]) -> list[FoundGpu]:
    found = []
    for gpu in metered:
        if gpu.total_bytes is not None:
            card = card_of(gpu.total_bytes / GIB)
            found.append(
                FoundGpu(name=gpu.name, vram_gib=gpu.total_bytes / GIB, card=None if card is None else card.name)
            )
    return found


def _with_epochs(recipe: Recipe) -> dict[str, Any]:
    """Options and sources of `recipe` for a config that may have a number of steps, which would win over its epochs;
    null means left out.
    """
    reason = "the recipe counts epochs: a number of steps wins"
    return {
        "options": {"max_train_steps": None, **recipe.options},
        "sources": {"max_train_steps": reason, **recipe.sources},
    }
