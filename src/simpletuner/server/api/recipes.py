"""What a configuration begins with: a model, a card and a recipe."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import FLAVOURS, Flavour
from simpletuner.config.recipes import CARDS, LEAST_STEPS, RECIPES, card_of
from simpletuner.server.context import InContext
from simpletuner.server.meter import MeteredGpu

router = APIRouter()


class ModelChoice(BaseModel):
    """A flavour."""

    name: str
    summary: str
    licence: str
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


class FlavourFit(BaseModel):
    """Options with which a flavour fits on a card."""

    options: dict[str, Any]
    summary: str
    """What they do, in a few words."""


class CardChoice(BaseModel):
    """A GPU size, and how the flavours fit on it."""

    name: str
    vram_gib: float
    ram_gib: float
    """Host memory that the machine should have beside it."""
    fits: dict[str, FlavourFit]
    """By flavour; embedded ones need no card."""


class RecipeChoice(BaseModel):
    """A recipe for a flavour."""

    name: str
    flavour: str
    title: str
    summary: str
    options: dict[str, Any]
    """Option to value; null means left out."""
    sources: dict[str, str]
    """Option to where its value comes from."""
    is_tested: bool
    needs: str
    """What this program lacks for it; empty where it can be trained."""


class FoundGpu(BaseModel):
    """A GPU of this machine."""

    name: str
    vram_gib: float
    card: str | None
    """The card whose options suit it; null where it is smaller than all of them."""


class Choices(BaseModel):
    """What a configuration begins with."""

    models: list[ModelChoice]
    cards: list[CardChoice]
    gpus: list[FoundGpu]
    """Empty where there is none."""
    recipes: list[RecipeChoice]
    least_steps: int
    """Optimizer steps under which a LoRA has hardly learned anything."""


@router.get("/recipes")
def recipes(here: InContext) -> Choices:
    """Models, cards and recipes to choose from, and the GPUs of this machine."""
    return Choices(
        models=_models(),
        cards=_cards(),
        gpus=_gpus(here.meter.read(here.workspace).gpus),
        recipes=_recipes(),
        least_steps=LEAST_STEPS,
    )


def _models() -> list[ModelChoice]:
    models = [
        ModelChoice(
            name=name,
            summary=flavour.summary,
            licence=flavour.licence,
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


def _cards() -> list[CardChoice]:
    return [
        CardChoice(
            name=card.name,
            vram_gib=card.vram_gib,
            ram_gib=card.ram_gib,
            fits={name: FlavourFit(options=dict(fit.options), summary=fit.summary) for name, fit in card.fits.items()},
        )
        for card in CARDS
    ]


def _gpus(metered: Sequence[MeteredGpu]) -> list[FoundGpu]:
    found = []
    for gpu in metered:
        if gpu.total_bytes is not None:
            card = card_of(gpu.total_bytes / GIB)
            found.append(
                FoundGpu(name=gpu.name, vram_gib=gpu.total_bytes / GIB, card=None if card is None else card.name)
            )
    return found


def _recipes() -> list[RecipeChoice]:
    return [
        RecipeChoice(
            name=recipe.name,
            flavour=recipe.flavour,
            title=recipe.title,
            summary=recipe.summary,
            # A number of steps wins over a number of epochs, so a recipe that counts epochs has no steps.
            options={"max_train_steps": None, **recipe.options},
            sources={
                "max_train_steps": "the recipe counts epochs: a number of steps wins",
                **recipe.sources,
            },
            is_tested=recipe.is_tested,
            needs=recipe.needs,
        )
        for recipe in RECIPES
    ]
