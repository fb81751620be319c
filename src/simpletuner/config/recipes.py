"""Recipes: starting values for a subject, style or edit LoRA, with the source of every number; and the options with
which each FLUX.2 flavour fits on a GPU. Plain data.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from simpletuner.config.flavours import FlavourName

RecipeName = Literal["subject", "style", "edit"]
"""What a LoRA learns: one subject, a style, or how to edit an image."""


@dataclass(frozen=True)
class Recipe:
    """Starting options for training a kind of LoRA on a flavour. `docs/recipes.md` lists all recipes."""

    name: RecipeName
    flavour: FlavourName
    title: str
    summary: str
    """One sentence."""
    options: Mapping[str, Any]
    """Value of each option, as in JSON."""
    sources: Mapping[str, str]
    """Source of each option's value."""
    is_tested: bool
    """Whether the results of a run with real weights have been judged."""
    needs: str = ""
    """A requirement of the recipe that this program does not provide; empty if the recipe is ready."""

    @property
    def is_ready(self) -> bool:
        """Whether this program can train the recipe."""
        return not self.needs

    def batches(self, images: int) -> int:
        """Approximate optimizer steps of an epoch over `images` images."""
        return max(1, math.ceil(images / int(self.options["train_batch_size"])))

    def epochs(self, images: int) -> int:
        """`num_train_epochs` for `images` images: the recipe's, or more if needed to reach `MIN_STEPS`."""
        return max(int(self.options["num_train_epochs"]), math.ceil(MIN_STEPS / self.batches(images)))


@dataclass(frozen=True)
class CardFit:
    """Options with which a flavour's recipes fit on a GPU at 1024x1024."""

    options: Mapping[str, Any]
    summary: str
    """Effect of the options, in a few words."""


@dataclass(frozen=True)
class Card:
    """A GPU memory size, and how each full-size flavour fits into it."""

    name: str
    vram_gib: float
    ram_gib: float
    """Host memory that the machine should have."""
    fits: Mapping[FlavourName, CardFit]
    """Options for each flavour."""


MIN_STEPS = 500
"""Minimum optimizer steps for a useful LoRA: the fewest that any of the sources reports."""

_QUICKSTART = "SimpleTuner's FLUX.2 quickstart"
_ALL_LINEARS = "unsloth PR #8267: klein LoRAs were weak until the single blocks' output projections were targets too"
_BFL_SHIFT = "OneTrainer PR #1516: Black Forest Labs trained with the shift that follows the image's size"
_NO_ALPHA_TRAP = "ComfyUI #6909: alpha far below the rank gives a weak LoRA; equal to it, the scale is 1"
_AI_TOOLKIT = "ai-toolkit's FLUX.2 form"
_STYLE_STUDY = "happyin.space, 56 jobs over 16 style sets on klein-9b: 30 steps per image, at least 500"
_REPETITIONS = "unsloth PR #8267: 500 steps on 5 images; RunComfy's klein-9b guide: each image 50 to 120 times"
_EXAMPLE = "the example tiny-lora, measured in docs/log.md"

_SourcedValues = Mapping[str, tuple[Any, str]]
"""Value and source of each option."""

_COMMON: _SourcedValues = {
    "flux_lora_target": ("all", _ALL_LINEARS),
    "learning_rate": (1e-4, f"{_QUICKSTART}; {_AI_TOOLKIT} has the same"),
    "lr_scheduler": ("constant", _QUICKSTART),
    "optimizer": ("adamw", f"{_AI_TOOLKIT} has adamw8bit; adapters are small, so plain AdamW costs little more"),
    "max_grad_norm": (1.0, f"{_QUICKSTART}, on unstable training"),
    "train_batch_size": (1, _QUICKSTART),
    "gradient_accumulation_steps": (1, _QUICKSTART),
    "flow_schedule_auto_shift": (True, _BFL_SHIFT),
    "caption_dropout_probability": (0.05, f"{_AI_TOOLKIT}; happyin.space has the same"),
    "mixed_precision": ("bf16", _QUICKSTART),
    "gradient_checkpointing": (True, _QUICKSTART),
}

_DEV: _SourcedValues = {
    "lora_rank": (16, f"{_QUICKSTART}: 101 M parameters on dev, more than rank 32 on klein-9b"),
    "lora_alpha": (16, _NO_ALPHA_TRAP),
    "flux_guidance_mode": ("constant", _QUICKSTART),
    "flux_guidance_value": (1.0, f"{_QUICKSTART}; ai-toolkit, musubi-tuner and OneTrainer train at 1 too"),
}

_KLEIN: _SourcedValues = {
    "lora_rank": (32, "the klein workshop of stephen37/workshops for a character; ai-toolkit's form"),
    "lora_alpha": (32, _NO_ALPHA_TRAP),
}

_TINY: _SourcedValues = {
    "lora_rank": (32, _EXAMPLE),
    "lora_alpha": (32, _NO_ALPHA_TRAP),
    "flux_lora_target": ("all", _EXAMPLE),
    "learning_rate": (2e-3, _EXAMPLE),
    "lr_scheduler": ("cosine", _EXAMPLE),
    "lr_warmup_steps": (20, _EXAMPLE),
    "optimizer": ("adamw", _EXAMPLE),
    "train_batch_size": (8, _EXAMPLE),
    "gradient_accumulation_steps": (1, _EXAMPLE),
    "flow_schedule_shift": (5.0, _EXAMPLE),
    "caption_dropout_probability": (0.0, _EXAMPLE),
    "mixed_precision": ("bf16", _EXAMPLE),
    "gradient_checkpointing": (False, _EXAMPLE),
    "num_train_epochs": (100, "as on dev"),
}

_EPOCHS: Mapping[RecipeName, tuple[int, str]] = {
    "subject": (100, _REPETITIONS),
    "style": (30, _STYLE_STUDY),
    "edit": (30, "as for a style: no number for edits was found"),
}

_TITLES: Mapping[RecipeName, tuple[str, str]] = {
    "subject": ("A subject", "A person, an animal or a thing, from 5 to 30 images of it in different places."),
    "style": ("A style", "How images look, whatever they show, from 15 to 100 images in that style."),
    "edit": ("An edit", "What to do to an image, from pairs of images before and after."),
}


def _recipes() -> Iterator[Recipe]:
    flavours: Mapping[FlavourName, _SourcedValues] = {
        "dev": _DEV,
        "klein-9b": _KLEIN,
        "klein-4b": _KLEIN,
        "tiny": {},
        "tiny-klein": _KLEIN,
    }
    for flavour, flavour_numbers in flavours.items():
        for name, (title, summary) in _TITLES.items():
            numbers = _TINY if flavour == "tiny" else {**flavour_numbers, **_COMMON, "num_train_epochs": _EPOCHS[name]}
            yield Recipe(
                name=name,
                flavour=flavour,
                title=title,
                summary=summary,
                options={option: value for option, (value, _) in numbers.items()},
                sources={option: source for option, (_, source) in numbers.items()},
                is_tested=flavour == "tiny" and name == "subject",
                needs="a dataset of reference images, which `init` does not write yet (docs/edit.md shows one)"
                if name == "edit"
                else "",
            )


RECIPES: tuple[Recipe, ...] = tuple(_recipes())

_STREAMED = {"enable_group_offload": True}
_INT8 = {"base_model_precision": "int8-quanto"}
_INT4 = {"base_model_precision": "int4-quanto"}

_BF16 = CardFit({}, "bf16, everything on the GPU")
_IN_INT8 = CardFit(_INT8, "8 bits")


def _card(name: str, vram_gib: float, dev: CardFit, klein_9b: CardFit, klein_4b: CardFit) -> Card:
    return Card(name, vram_gib, 32.0, {"dev": dev, "klein-9b": klein_9b, "klein-4b": klein_4b})


CARDS: tuple[Card, ...] = (
    _card(
        "8 GB",
        8.0,
        CardFit({**_INT4, **_STREAMED, "activation_offload": True}, "4 bits, all but one block in RAM"),
        CardFit({**_INT4, **_STREAMED}, "4 bits, most weights in RAM"),
        _IN_INT8,
    ),
    _card(
        "12 GB",
        12.0,
        CardFit({**_INT4, **_STREAMED}, "4 bits, weights in RAM"),
        CardFit({**_INT8, **_STREAMED}, "8 bits, half of the weights in RAM"),
        _BF16,
    ),
    _card("16 GB", 16.0, CardFit({**_INT8, **_STREAMED}, "8 bits, most weights in RAM"), _IN_INT8, _BF16),
    _card("24 GB", 24.0, CardFit({**_INT8, **_STREAMED}, "8 bits, half of the weights in RAM"), _BF16, _BF16),
    _card("32 GB", 32.0, CardFit({**_INT8, **_STREAMED}, "8 bits, some weights in RAM"), _BF16, _BF16),
    _card("48 GB", 48.0, _IN_INT8, _BF16, _BF16),
    _card("80 GB", 80.0, _BF16, _BF16, _BF16),
)
"""GPU sizes in ascending order. Each fits by the memory plan; none has been measured with real weights."""


def recipe(name: str, flavour: str) -> Recipe:
    """The recipe `name` for `flavour`.

    Raises:
        KeyError: there is no such recipe.
    """
    for each in RECIPES:
        if (each.name, each.flavour) == (name, flavour):
            return each
    raise KeyError((name, flavour))


def card_of(vram_gib: float) -> Card | None:
    """The largest of `CARDS` that is no larger than `vram_gib`; None below the smallest.

    Drivers report some hundred MiB less than a card's nominal size, so the comparison allows half a GiB.
    """
    return next((card for card in reversed(CARDS) if card.vram_gib <= vram_gib + 0.5), None)


def resident_flavour(card: Card | None) -> FlavourName | None:
    """The largest flavour whose weights all stay on `card`; None without a card, or if that flavour is dev."""
    resident = [name for name, fit in card.fits.items() if "enable_group_offload" not in fit.options] if card else []
    return resident[0] if resident and "dev" not in resident else None
