"""The form of a config, made from the options themselves: what a page needs to ask for each of them."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.labels import LABELS, LABELS_OF_SETS
from simpletuner.config.options.kinds import Slice
from simpletuner.config.run import SLICES
from simpletuner.config.values import OptionType, kinds

BASIC = frozenset(
    {
        "model_flavour",
        "pretrained_model_name_or_path",
        "seed",
        "lora_rank",
        "lora_alpha",
        "flux_lora_target",
        "optimizer",
        "learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "mixed_precision",
        "base_model_precision",
        "text_encoder_1_precision",
        "gradient_checkpointing",
        "enable_group_offload",
        "validation_prompt",
        "validation_step_interval",
        "validation_resolution",
        "validation_num_inference_steps",
        "validation_guidance",
        "output_dir",
        "checkpoint_step_interval",
        "checkpoints_total_limit",
    }
)
"""What a person with one GPU sets; the other options can wait."""

BASIC_OF_SETS = frozenset(
    {
        "id",
        "dataset_type",
        "instance_data_dir",
        "repeats",
        "resolution",
        "resolution_type",
        "crop",
        "crop_aspect",
        "caption_strategy",
        "instance_prompt",
        "conditioning_type",
        "conditioning_data",
        "default",
        "cache_dir",
    }
)
"""The same of a set of images and of a text store."""

UNITS = {
    "max_train_steps": "steps",
    "lr_warmup_steps": "steps",
    "num_train_epochs": "epochs",
    "validation_step_interval": "steps",
    "validation_epoch_interval": "epochs",
    "eval_steps_interval": "steps",
    "checkpoint_step_interval": "steps",
    "checkpoint_epoch_interval": "epochs",
    "ema_update_interval": "steps",
    "validation_num_inference_steps": "steps",
    "validation_resolution": "pixels",
    "tokenizer_max_length": "tokens",
    "train_batch_size": "images",
    "vae_batch_size": "images",
    "num_eval_images": "images",
    "num_validation_images": "images",
    "max_num_samples": "images",
    "text_encoder_batch_size": "captions",
    "write_batch_size": "files",
    "group_offload_blocks_per_group": "blocks",
    "group_offload_resident_blocks": "blocks",
    "max_workers": "threads",
    "distributed_timeout_s": "seconds",
}
"""What a number counts, where its name leaves that open."""

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")

FieldKind = Literal["boolean", "integer", "number", "text", "choice", "path", "model", "json"]


class Field(BaseModel):
    """One option as a form asks for it."""

    name: str
    label: str
    """The name in words."""
    meaning: str
    """From the docs, without their links."""
    expects: str
    kind: FieldKind
    """`json` is a JSON value; text that is none is meant as text. `model` is a Hub id or a path."""
    choices: list[str]
    """All values of a `choice`, in their order; of `text`, names to suggest."""
    default: Any
    """What counts where the option is left out; null where it is required or nothing is set."""
    required: bool
    minimum: float | int | None
    """The lower bound; `expects` says whether it is allowed itself."""
    maximum: float | int | None
    basic: bool
    unit: str
    """What a number counts; empty where that is plain."""


class OptionGroup(BaseModel):
    """Options that stand together."""

    title: str
    fields: list[Field]


class Form(BaseModel):
    """Every option of a config, and the keys of an entry in its list of datasets."""

    groups: list[OptionGroup]
    image_set: list[Field]
    conditioning_set: list[Field]
    text_store: list[Field]


@cache
def form() -> Form:
    """The form of this version of the program."""
    return Form(
        groups=[
            OptionGroup(title=str(group.__doc__).rstrip("."), fields=_fields(group, BASIC, LABELS)) for group in SLICES
        ],
        image_set=_fields(ImageSet, BASIC_OF_SETS, LABELS_OF_SETS),
        conditioning_set=_fields(ConditioningSet, BASIC_OF_SETS, LABELS_OF_SETS),
        text_store=_fields(TextStore, BASIC_OF_SETS, LABELS_OF_SETS),
    )


def _fields(model: type[Slice], basic: frozenset[str], labels: Mapping[str, str]) -> list[Field]:
    texts = model.documentation()
    found = []
    for name, kind in kinds(model).items():
        declared = model.model_fields[name]
        found.append(
            Field(
                name=name,
                label=labels[name],
                meaning=_LINK.sub(r"\1", " ".join(texts[name].split())),
                expects=kind.expects,
                kind=_kind(kind),
                choices=list(kind.near),
                default=None if declared.is_required() else declared.default,
                required=declared.is_required(),
                minimum=kind.minimum,
                maximum=kind.maximum,
                basic=name in basic,
                unit=UNITS.get(name, ""),
            )
        )
    return found


def _kind(kind: OptionType) -> FieldKind:
    if kind.choices:
        return "choice"
    if kind.is_model:
        return "model"
    if kind.is_path:
        return "path"
    plain: dict[Any, FieldKind] = {bool: "boolean", int: "integer", float: "number", str: "text"}
    return "json" if kind.is_json else plain.get(kind.base, "json")
