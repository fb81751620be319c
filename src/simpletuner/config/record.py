"""What a run keeps of its configuration (no secrets, no private paths), and what a resumed run may change."""

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
"""Free values without paths and secrets, as numbers and choices always are; all else is left out."""

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
"""Options that a resumed run may change without a notice: what it looks at, saves and skips, how long it is, where
things lie. The datasets themselves are compared by their fingerprint, and so is the VAE's encoder."""

SPLIT = ("train_batch_size", "gradient_accumulation_steps", "num_processes")
"""Options whose product is the effective batch. A resumed run may change them where the product stays."""

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
"""Options that a resumed run may change with a notice: from there on it is trained otherwise."""

LEFT_TO_THE_RUN: dict[str, Any] = {"dynamo_backend": "auto"}
"""Values that leave the choice to the run, whose record says what it chose. On resume they ask for that again; another
value that is given replaces it."""

INTRODUCED: dict[str, Any] = {"dynamo_backend": "no"}
"""What it means, in JSON, that a record lacks an option: the value at which the option changes nothing. Only for
options whose default is another value."""

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
"""Options that are younger than the fingerprints in exported files, which name them only at another value."""

REMOVED: dict[str, tuple[object, ...]] = {}
"""Options that are gone, with the values, besides null, at which each of them changed nothing. One that a resumed run
might change goes into `MAY_CHANGE`."""


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


def reusable(record: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What of a foreign `record` another run may take over, by the rule of `decisive(resolved(config))`: no path and
    nothing that is about a machine. And the names of options that are gone.
    """
    plain = RunConfig()
    renamed = {OPTION_ALIASES.get(name, name): value for name, value in record.items()}
    known = {
        name: value
        for name, value in renamed.items()
        if name in RunConfig.model_fields and name not in MAY_CHANGE and _is_recorded(plain, name, value)
    }
    gone = [name for name in renamed if name not in RunConfig.model_fields and name not in REMOVED]
    return known, tuple(sorted(gone))


def is_left_to_the_run(name: str, value: object) -> bool:
    """Whether `value` of an option asks for what the run's record has, if there is one."""
    return name in LEFT_TO_THE_RUN and value == LEFT_TO_THE_RUN[name]


def decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record decides the weights. An exported file has a hash of it, the same for the same run of each
    release. Several processes count as gradient accumulation: one process sees the same images that way.
    """
    found = {
        name: value
        for name, value in record.items()
        if name not in MAY_CHANGE and not (name in FINGERPRINTED_IF_SET and value == FINGERPRINTED_IF_SET[name])
    }
    if (processes := record.get("num_processes") or 1) > 1:
        found["gradient_accumulation_steps"] *= processes
    return found


@dataclass(frozen=True)
class BatchSplit:
    """How the images of an optimizer step are divided, where no dataset has a batch size of its own."""

    train_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "BatchSplit":
        """That of a record. One that lacks an option, or has null there, was made where it was 1."""
        return cls(*(record.get(name) or 1 for name in SPLIT))

    @property
    def effective_batch(self) -> int:
        """Images of one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.gradient_accumulation_steps * self.num_processes

    def accumulating_to(self, effective_batch: int) -> "BatchSplit | None":
        """The same batch size and processes with another accumulation, so that a step has `effective_batch` images;
        None where no accumulation does that.
        """
        steps, left = divmod(effective_batch, self.train_batch_size * self.num_processes)
        return None if left else replace(self, gradient_accumulation_steps=steps)

    def accumulating_near(self, effective_batch: int) -> "BatchSplit":
        """The same with the accumulation that comes nearest to it."""
        steps = round(effective_batch / (self.train_batch_size * self.num_processes))
        return replace(self, gradient_accumulation_steps=max(1, steps))

    def changes(self, now: "BatchSplit") -> dict[str, "OptionChange"]:
        """Options in which `now` differs."""
        values = ((name, vars(self)[name], vars(now)[name]) for name in SPLIT)
        return {name: OptionChange(before, after) for name, before, after in values if before != after}


@dataclass(frozen=True)
class OptionChange:
    """An option's value in a record and in a configuration, as JSON."""

    before: Any
    now: Any


@dataclass(frozen=True)
class RecordComparison:
    """How a configuration compares with the record of a checkpoint."""

    kept: dict[str, Any]
    """Options that the user did not give, or left to the run, and whose value differs from the record: with the
    record's value."""
    refused: dict[str, OptionChange]
    """Options that were given with another value than the record's, and must keep it."""
    unavailable: dict[str, Any]
    """Options of the record that are gone, or no longer take its value: with that value."""
    steering: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `CHANGE_THE_CURVE`."""
    quiet: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `MAY_CHANGE`."""
    split: dict[str, OptionChange] = field(default_factory=dict)
    """Changed options of `SPLIT`, at the same effective batch; in an elastic run, at another one too."""
    adapted: dict[str, Any] = field(default_factory=dict)
    """Options among these that the user did not give: with the value at which the effective batch stays. In an elastic
    run the accumulation too that was given: with the value at which the effective batch stays, or changes least."""
    restoring: dict[str, Any] = field(default_factory=dict)
    """Values that restore the effective batch where options of `SPLIT` are refused."""


def compare(
    record: Mapping[str, Any],
    config: RunConfig,
    given: Collection[str],
    *,
    has_own_sizes: bool = False,
    is_elastic: bool = False,
) -> RecordComparison:
    """Compare `config`, of which the options in `given` were given by the user, with a `record` made by `resolved`,
    perhaps by an older release: neither a new option nor another default is a change.

    Args:
        has_own_sizes: a dataset has a train_batch_size of its own, so that a step with another number of micro-batches
            has another number of images, whatever the run's train_batch_size.
        is_elastic: the same command is started again with whatever number of processes there is, so that the
            accumulation follows from the record.
    """
    if is_elastic:
        given = {*given} - {"gradient_accumulation_steps"}
    old = {OPTION_ALIASES.get(name, name): value for name, value in record.items()}
    new, defaults = (json.loads(json.dumps(resolved(each))) for each in (config, RunConfig()))
    refused_changes: dict[str, OptionChange] = {}
    steering: dict[str, OptionChange] = {}
    kept: dict[str, Any] = {}
    unavailable: dict[str, Any] = {}
    for name in sorted({*old, *new} - MAY_CHANGE - {*SPLIT}):
        if name not in RunConfig.model_fields:
            if old[name] is not None and old[name] not in REMOVED.get(name, ()):
                unavailable[name] = old[name]
            continue
        # Of a model only a Hub id is recorded: it has no default here, and null stands for all else.
        before = old.get(name, INTRODUCED.get(name, defaults.get(name)))
        if before != new.get(name):
            if name not in given or is_left_to_the_run(name, new.get(name)):
                kept[name] = before
            elif name not in LEFT_TO_THE_RUN:
                changes = steering if name in CHANGE_THE_CURVE else refused_changes
                changes[name] = OptionChange(before, new.get(name))
    unavailable |= {name: kept.pop(name) for name in refused(RunConfig, kept)}
    quiet = {
        name: OptionChange(old[name], new[name])
        for name in sorted((MAY_CHANGE - {*SPLIT}) & old.keys() & new.keys())
        if old[name] != new[name]
    }
    first = BatchSplit.of(old)
    split = _split(first, config, given, is_elastic=is_elastic)
    changed, adapted, restoring = first.changes(split), {}, {}
    may_cut = not has_own_sizes or split.train_batch_size == first.train_batch_size
    may_change = is_elastic and split.train_batch_size == first.train_batch_size
    if (split.effective_batch == first.effective_batch and may_cut) or may_change:
        own = {name: vars(split)[name] for name in SPLIT if name not in given and name != "num_processes"}
        others = {name: value for name, value in own.items() if value != vars(config)[name]}
        adapted = {name: value for name, value in others.items() if name in changed or may_change}
        kept = dict(sorted((kept | {name: value for name, value in others.items() if name not in adapted}).items()))
    else:
        refused_changes = dict(sorted((refused_changes | changed).items()))
        near = split if may_cut else replace(split, train_batch_size=first.train_batch_size)
        restored = near.accumulating_to(first.effective_batch) or first
        restoring = {name: change.now for name, change in split.changes(restored).items()}
        changed = {}
    return RecordComparison(kept, refused_changes, unavailable, steering, quiet, changed, adapted, restoring)


def _split(before: BatchSplit, config: RunConfig, given: Collection[str], *, is_elastic: bool) -> BatchSplit:
    """How `config` divides a step of a run that was divided as `before`: accumulation that is not given makes up for
    other options, in an elastic run as far as it can. How many processes there are is a fact, given or not.
    """
    size = config.train_batch_size if "train_batch_size" in given else before.train_batch_size
    now = BatchSplit(size, config.gradient_accumulation_steps, config.ranks)
    if "gradient_accumulation_steps" in given:
        return now
    if is_elastic:
        return now.accumulating_near(before.effective_batch)
    same = replace(now, gradient_accumulation_steps=before.gradient_accumulation_steps)
    return now.accumulating_to(before.effective_batch) or same


def with_recorded(config: RunConfig, kept: Mapping[str, Any]) -> RunConfig:
    """`config` with the values of `RecordComparison.kept`, or `adapted`."""
    values = RunConfig.model_validate(kept)
    return config.model_copy(update={name: getattr(values, name) for name in kept})
