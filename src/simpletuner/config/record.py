"""The recorded options of a run (no secrets, no private paths), and the options that a resumed run may change."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.config.given import refused
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.other_keys import OPTION_ALIASES
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import kinds

RECORDED_TEXTS = frozenset(
    {
        "custom_text_encoder_intermediary_layers",
        "disk_low_threshold",
        "eval_dataset_id",
        "flow_custom_timesteps",
        "group_offload_resident_blocks",
        "modelspec_comment",
        "modelspec_trigger_phrase",
        "optimizer",
        "optimizer_config",
        "peft_lora_target_modules",
        "preservation_class",
        "preservation_trigger",
        "profile_steps",
        "report_to",
        "revision",
        "tracker_project_name",
        "tracker_run_name",
        "tread_config",
        "validation_drift_prompts",
        "validation_negative_prompt",
        "validation_prompt",
        "validation_resolution",
        "validation_subject",
        "variant",
    }
)
"""Options with free-form values that contain neither paths nor secrets. Numbers and choices are always recorded; all
other options are not."""

MAY_CHANGE = frozenset(
    name
    for group in (
        ValidationOptions,
        CheckpointOptions,
        TrackingOptions,
        ProcessOptions,
        RankOptions,
        DataOptions,
        OffloadOptions,
    )
    for name in group.model_fields
) | {
    "ema_device",
    "ema_validation",
    "max_train_steps",
    "num_train_epochs",
    "pretrained_vae_model_name_or_path",
    "skip_bad_batches",
    "text_encoder_mode",
    "verify_base",
    "write_batch_size",
}
"""Options that a resumed run may change without a notice: validation, checkpoints, skipped steps, length, file
locations. The datasets and the VAE's encoder are compared by their fingerprints instead."""

SPLIT = ("train_batch_size", "gradient_accumulation_steps", "num_processes")
"""Options whose product is the effective batch. A resumed run may change them if the product stays the same."""

CHANGE_THE_CURVE = frozenset(
    {
        "caption_dropout_probability",
        "ema_decay",
        "grad_clip_method",
        "learning_rate",
        "lr_end",
        "lr_scheduler",
        "lr_warmup_steps",
        "max_grad_norm",
    }
)
"""Options that a resumed run may change with a notice, since they change its loss curve from that step on."""

LEFT_TO_THE_RUN: dict[str, Any] = {"dynamo_backend": "auto"}
"""Option values that let the run choose the effective value, which it records. On resume they mean the recorded value;
any other given value replaces it."""

INTRODUCED: dict[str, Any] = {"dynamo_backend": "no"}
"""The value, as in JSON, to assume for an option that is missing from a record because the record is older than the
option: the value at which the option changes nothing. Needed only if the option's default is another value."""

FINGERPRINTED_IF_SET: dict[str, Any] = {
    "masked_loss_floor": 0.0,
    "masked_loss_invert": False,
    "masked_loss_prior": 0.0,
    "masked_loss_probability": 1.0,
    "preservation": "none",
    "preservation_class": None,
    "preservation_trigger": None,
    "preservation_weight": 1.0,
    "reference_attention": "full",
    "reference_dropout_probability": 0.0,
    "optimizer_release_gradients": False,
}
"""Options that are newer than the fingerprints in exported files. A fingerprint includes one only if its value differs
from the value here, so that fingerprints of older files stay valid."""

REMOVED: dict[str, tuple[object, ...]] = {}
"""Removed options, each with the values, besides null, at which it changed nothing. A removed option that a resumed run
might change belongs in `MAY_CHANGE`."""


def recorded_options(config: RunConfig) -> dict[str, Any]:
    """The options to record, as JSON. Only allow-listed options are recorded, and only Hub ids of models."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in OPTION_NAMES if _is_recorded(config, name, values[name])}


def _is_recorded(config: RunConfig, name: str, value: object) -> bool:
    kind = kinds(type(config))[name]
    if kind.is_model:
        # A local model exists, or its path is absolute or begins with a dot.
        return isinstance(value, str) and not Path(value).exists() and value.count("/") == 1 and value[0] not in "./~"
    return bool(kind.choices) or kind.base in (bool, int, float) or name in RECORDED_TEXTS


def adoptable_options(record: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options in a foreign `record` that another run may adopt: no paths, and no options of `MAY_CHANGE`, such as
    those about the machine. Also returns the names of options that no longer exist.
    """
    defaults = RunConfig()
    renamed = {OPTION_ALIASES.get(name, name): value for name, value in record.items()}
    adopted = {
        name: value
        for name, value in renamed.items()
        if name in RunConfig.model_fields and name not in MAY_CHANGE and _is_recorded(defaults, name, value)
    }
    unknown = [name for name in renamed if name not in RunConfig.model_fields and name not in REMOVED]
    return adopted, tuple(sorted(unknown))


def is_left_to_the_run(name: str, value: object) -> bool:
    """Whether `value` means the recorded value, if the run has a record."""
    return name in LEFT_TO_THE_RUN and value == LEFT_TO_THE_RUN[name]


def weight_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a record that determine the weights. Exported files contain their hash, which is the same for the
    same run in every release. Several processes count as gradient accumulation, because one process with as many
    micro-batches sees the same images.
    """
    options = {
        name: value
        for name, value in record.items()
        if name not in MAY_CHANGE and not (name in FINGERPRINTED_IF_SET and value == FINGERPRINTED_IF_SET[name])
    }
    if (processes := record.get("num_processes") or 1) > 1:
        options["gradient_accumulation_steps"] *= processes
    return options


@dataclass(frozen=True)
class BatchSplit:
    """How an optimizer step's images are divided into micro-batches and processes, if no dataset sets a batch size."""

    train_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "BatchSplit":
        """The split in a record. An option that is missing or null counts as 1."""
        return cls(*(record.get(name) or 1 for name in SPLIT))

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def batches_per_step(self) -> int:
        """Micro-batches per optimizer step."""
        return self.gradient_accumulation_steps * self.num_processes

    def accumulating_to(self, effective_batch: int) -> "BatchSplit | None":
        """This split with the gradient accumulation that gives `effective_batch` images per step; None if there is
        none.
        """
        steps, remainder = divmod(effective_batch, self.train_batch_size * self.num_processes)
        return None if remainder else replace(self, gradient_accumulation_steps=steps)

    def accumulating_near(self, effective_batch: int) -> "BatchSplit":
        """This split with the gradient accumulation that comes nearest to `effective_batch` images per step."""
        steps = round(effective_batch / (self.train_batch_size * self.num_processes))
        return replace(self, gradient_accumulation_steps=max(1, steps))

    def changes(self, now: "BatchSplit") -> dict[str, "OptionChange"]:
        """The options of this split that differ in `now`."""
        values = ((name, vars(self)[name], vars(now)[name]) for name in SPLIT)
        return {name: OptionChange(before, after) for name, before, after in values if before != after}


@dataclass(frozen=True)
class OptionChange:
    """An option's value in a record and in the current configuration, as JSON."""

    before: Any
    after: Any


@dataclass(frozen=True)
class RecordComparison:
    """Differences between a configuration and the record of a checkpoint."""

    record_values: dict[str, Any]
    """Recorded values of options that differ from the configuration but that the user did not give, or left to the run.
    The resumed run uses these values."""
    refused_changes: dict[str, OptionChange]
    """Options to which the user gave another value than the record's, although they must not change."""
    unavailable: dict[str, Any]
    """Recorded values of options that no longer exist or no longer accept the value."""
    curve_changes: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `CHANGE_THE_CURVE`."""
    permitted_changes: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `MAY_CHANGE`."""
    split_changes: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `SPLIT` at the same effective batch; in an elastic run, also at another effective batch."""
    adapted_values: dict[str, Any] = field(default_factory=dict)
    """New values of options in `split_changes` that the user did not give, which keep the effective batch. In an
    elastic run this includes a given gradient accumulation, with the value that keeps the effective batch or changes it
    least."""
    restoring_values: dict[str, Any] = field(default_factory=dict)
    """Values that restore the effective batch, if options of `SPLIT` are refused."""


def compare(
    record: Mapping[str, Any],
    config: RunConfig,
    given_options: Collection[str],
    *,
    has_own_sizes: bool = False,
    is_elastic: bool = False,
) -> RecordComparison:
    """Compare `config` with a `record` from `recorded_options`, perhaps of an older release. `given_options` are the
    names that the user gave. New options and changed defaults do not count as changes.

    Args:
        has_own_sizes: a dataset has its own train_batch_size. A step with another number of micro-batches then has
            another number of images, even if the effective batch by the run's train_batch_size is the same.
        is_elastic: the same command restarts with any number of processes, so the gradient accumulation follows from
            the record.
    """
    if is_elastic:
        given_options = {*given_options} - {"gradient_accumulation_steps"}
    recorded = {OPTION_ALIASES.get(name, name): value for name, value in record.items()}
    current, defaults = (json.loads(json.dumps(recorded_options(each))) for each in (config, RunConfig()))
    refused_changes: dict[str, OptionChange] = {}
    curve_changes: dict[str, OptionChange] = {}
    record_values: dict[str, Any] = {}
    unavailable: dict[str, Any] = {}
    for name in sorted({*recorded, *current} - MAY_CHANGE - {*SPLIT}):
        if name not in RunConfig.model_fields:
            if recorded[name] is not None and recorded[name] not in REMOVED.get(name, ()):
                unavailable[name] = recorded[name]
            continue
        # Only Hub ids of models are recorded: model options have no default here, and null means any local model.
        before = recorded.get(name, INTRODUCED.get(name, defaults.get(name)))
        if before != current.get(name):
            if name not in given_options or is_left_to_the_run(name, current.get(name)):
                record_values[name] = before
            elif name not in LEFT_TO_THE_RUN:
                changes = curve_changes if name in CHANGE_THE_CURVE else refused_changes
                changes[name] = OptionChange(before, current.get(name))
    unavailable |= {name: record_values.pop(name) for name in refused(RunConfig, record_values)}
    permitted = {
        name: OptionChange(recorded[name], current[name])
        for name in sorted((MAY_CHANGE - {*SPLIT}) & recorded.keys() & current.keys())
        if recorded[name] != current[name]
    }
    recorded_split = BatchSplit.of(recorded)
    split = _split(recorded_split, config, given_options, is_elastic=is_elastic)
    changed, adapted, restoring = recorded_split.changes(split), {}, {}
    may_split = not has_own_sizes or split.train_batch_size == recorded_split.train_batch_size
    may_change = is_elastic and split.train_batch_size == recorded_split.train_batch_size
    if (split.effective_batch == recorded_split.effective_batch and may_split) or may_change:
        free = {name: vars(split)[name] for name in SPLIT if name not in given_options and name != "num_processes"}
        differing = {name: value for name, value in free.items() if value != vars(config)[name]}
        adapted = {name: value for name, value in differing.items() if name in changed or may_change}
        record_values = dict(
            sorted((record_values | {name: value for name, value in differing.items() if name not in adapted}).items())
        )
    else:
        refused_changes = dict(sorted((refused_changes | changed).items()))
        near = split if may_split else replace(split, train_batch_size=recorded_split.train_batch_size)
        restored = near.accumulating_to(recorded_split.effective_batch) or recorded_split
        restoring = {name: change.after for name, change in split.changes(restored).items()}
        changed = {}
    return RecordComparison(
        record_values, refused_changes, unavailable, curve_changes, permitted, changed, adapted, restoring
    )


def _split(before: BatchSplit, config: RunConfig, given_options: Collection[str], *, is_elastic: bool) -> BatchSplit:
    """The batch split of `config` for resuming a run with the split `before`. A gradient accumulation that is not given
    compensates for changes of the other options; in an elastic run, as nearly as possible. The number of processes
    always comes from `config`.
    """
    size = config.train_batch_size if "train_batch_size" in given_options else before.train_batch_size
    now = BatchSplit(size, config.gradient_accumulation_steps, config.ranks)
    if "gradient_accumulation_steps" in given_options:
        return now
    if is_elastic:
        return now.accumulating_near(before.effective_batch)
    same = replace(now, gradient_accumulation_steps=before.gradient_accumulation_steps)
    return now.accumulating_to(before.effective_batch) or same


def with_recorded(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """`config` with the values in `recorded`: `RecordComparison.record_values`, `adapted_values` or both."""
    values = RunConfig.model_validate(recorded)
    return config.model_copy(update={name: getattr(values, name) for name in recorded})
