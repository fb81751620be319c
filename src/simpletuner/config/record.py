"""What a run keeps of its configuration (no secrets, no private paths), and what a resumed run may change."""

import json
from pathlib import Path
from typing import Any

from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import kinds

RECORDED_TEXTS = frozenset(
    {
        "custom_text_encoder_intermediary_layers",
        "disk_low_threshold",
        "eval_dataset_id",
        "flow_custom_timesteps",
        "modelspec_comment",
        "optimizer",
        "optimizer_config",
        "peft_lora_target_modules",
        "report_to",
        "revision",
        "tracker_project_name",
        "tracker_run_name",
        "tread_config",
        "validation_negative_prompt",
        "validation_prompt",
        "validation_resolution",
        "validation_subject",
        "variant",
    }
)
"""Free values without paths and secrets, as numbers and choices always are; all else is left out."""

MAY_CHANGE = frozenset(
    name
    for group in (ValidationOptions, CheckpointOptions, TrackingOptions, ProcessOptions, DataOptions, OffloadOptions)
    for name in group.model_fields
) | {"ema_validation", "max_train_steps", "num_train_epochs", "text_encoder_mode", "write_batch_size"}
"""Options that a resumed run may change. The datasets themselves are compared by their fingerprint."""


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every option that may be kept, as JSON: an allow-list. Of models only Hub ids are kept."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in OPTION_NAMES if _is_recorded(config, name, values[name])}


def _is_recorded(config: RunConfig, name: str, value: object) -> bool:
    kind = kinds(type(config))[name]
    if kind.is_model:
        # A local one is an absolute path here or begins with a dot, or it is there.
        return isinstance(value, str) and not Path(value).exists() and value.count("/") == 1 and value[0] not in "./~"
    return bool(kind.choices) or kind.base in (bool, int, float) or name in RECORDED_TEXTS


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Options that differ between two results of `resolved` although a resumed run must keep them."""
    new = json.loads(json.dumps(new))
    keys = sorted({*old, *new} - MAY_CHANGE)
    return [key for key in keys if old.get(key) != new.get(key)]
