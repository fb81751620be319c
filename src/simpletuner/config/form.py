"""The config form of the page, generated from the options: one field for each option."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.labels import DATASET_LABELS, LABELS
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
"""Options that a user with one GPU usually sets; the form shows the others as advanced."""

BASIC_DATASET_KEYS = frozenset(
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
"""The same for the keys of datasets and text stores."""

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
"""Unit of a number, where the option's name does not say it."""

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")

FieldKind = Literal["boolean", "integer", "number", "text", "choice", "path", "model", "json"]


class Field(BaseModel):
    """One option as a form field."""

    name: str
    label: str
    """The name in words."""
    meaning: str
    """The option's help, without its links."""
    expects: str
    kind: FieldKind
    """`json` takes a JSON value; text that is not JSON is kept as text. `model` takes a Hub id or a path."""
    choices: list[str]
    """All values of a `choice`, in their order; for `text`, names to suggest."""
    default: Any
    """Value used if the option is left out; null if it is required or unset by default."""
    required: bool
    minimum: float | int | None
    """The lower bound; `expects` says whether it is inclusive."""
    maximum: float | int | None
    basic: bool
    unit: str
    """Unit of a number; empty where the name says it."""


class OptionGroup(BaseModel):
    """Options that the form shows together."""

    title: str
    fields: list[Field]


class Form(BaseModel):
    """Fields for every option of a config, and for the keys of an entry in its dataset list."""

    groups: list[OptionGroup]
    image_set: list[Field]
    conditioning_set: list[Field]
    text_store: list[Field]


@cache
def form() -> Form:
    """The form for the options of this version."""
    return Form(
        groups=[
            OptionGroup(title=str(group.__doc__).rstrip("."), fields=_fields(group, BASIC, LABELS)) for group in SLICES
        ],
        image_set=_fields(ImageSet, BASIC_DATASET_KEYS, DATASET_LABELS),
        conditioning_set=_fields(ConditioningSet, BASIC_DATASET_KEYS, DATASET_LABELS),
        text_store=_fields(TextStore, BASIC_DATASET_KEYS, DATASET_LABELS),
    )


def _fields(model: type[Slice], basic: frozenset[str], labels: Mapping[str, str]) -> list[Field]:
    texts = model.documentation()
    fields = []
    for name, kind in kinds(model).items():
        declared = model.model_fields[name]
        fields.append(
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
    return fields


def _kind(kind: OptionType) -> FieldKind:
    if kind.choices:
        return "choice"
    if kind.is_model:
        return "model"
    if kind.is_path:
        return "path"
    plain: dict[Any, FieldKind] = {bool: "boolean", int: "integer", float: "number", str: "text"}
    return "json" if kind.is_json else plain.get(kind.base, "json")
