"""Choices that a new configuration starts from: a model, a card and a recipe."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import FLAVOURS, Flavour
from simpletuner.config.recipes import CARDS, MIN_STEPS, RECIPES, Card, Recipe, card_of
from simpletuner.server.context import InContext
from simpletuner.server.meter import MeteredGpu

router = APIRouter()


class ModelChoice(BaseModel):
    """A flavour to train."""

    name: str
    summary: str
    license: str
    licence: str
    """Alias of `license`, its older name."""
    preview: str | None
    """The distilled flavour of the same size, which generates images in few steps and should not be trained."""
    download_bytes: int
    """Bytes of weights that the first run downloads."""
    is_embedded: bool
    """Whether it is built in (its weights are created on the spot) and trains without a GPU."""
    options: dict[str, Any]
    """Options that every run of this model needs."""
    sources: dict[str, str]
    """Source of each option's value."""


class FoundGpu(BaseModel):
    """A GPU of this machine."""

    name: str
    vram_gib: float
    card: str | None
    """The card whose options suit it; null if it has less memory than any card."""


class SetupChoices(BaseModel):
    """Choices that a new configuration starts from."""

    models: list[ModelChoice]
    cards: list[Card]
    gpus: list[FoundGpu]
    """Empty if the machine has none."""
    recipes: list[Recipe]
    least_steps: int
    """Optimizer steps below which a LoRA has hardly learned anything."""


@router.get("/recipes")
def recipes(context: InContext) -> SetupChoices:
    """Models, cards and recipes to choose from, and the GPUs of this machine."""
    return SetupChoices(
        models=_models(),
        cards=list(CARDS),
        gpus=_gpus(context.meter.read(context.workspace).gpus),
        recipes=[replace(recipe, **_with_epochs(recipe)) for recipe in RECIPES],
        least_steps=MIN_STEPS,
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
            sources=dict.fromkeys(_sizes(flavour), "the only size that this model generates"),
        )
        for name, flavour in FLAVOURS.items()
        if not flavour.is_distilled
    ]
    return sorted(models, key=lambda model: model.is_embedded)


def _sizes(flavour: Flavour) -> dict[str, Any]:
    side = flavour.fixed_side
    return {} if side is None else {"validation_resolution": f"{side}x{side}"}


def _gpus(metered: Sequence[MeteredGpu]) -> list[FoundGpu]:
    gpus = []
    for gpu in metered:
        if gpu.total_bytes is not None:
            card = card_of(gpu.total_bytes / GIB)
            gpus.append(
                FoundGpu(name=gpu.name, vram_gib=gpu.total_bytes / GIB, card=None if card is None else card.name)
            )
    return gpus


def _with_epochs(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's options and sources with max_train_steps = null, which removes it from a config: a number of
    steps would override the recipe's epochs.
    """
    reason = "the recipe sets epochs, which a number of steps would override"
    return {
        "options": {"max_train_steps": None, **recipe.options},
        "sources": {"max_train_steps": reason, **recipe.sources},
    }
