"""Options for the optimizer, the learning rate schedule, the batch size and the length of the run."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.optimizers import LIBRARIES, OPTIMIZER_ALIASES, OPTIMIZERS, canonical
from simpletuner.config.options.kinds import (
    Count,
    Expects,
    IsJson,
    NotNegative,
    Positive,
    Slice,
    UnitInterval,
    Whole,
    list_as_tuple,
    untyped_value,
)

Argument = Annotated[bool | int | float | str | tuple[int | float, ...] | None, BeforeValidator(list_as_tuple)]
Beta = Annotated[float, Ge(0), Lt(1)]


def _arguments(value: object) -> object:
    """Parse "k=v,k=v" to a dict; return other values unchanged, for the type to reject."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        return value
    return {name.strip(): untyped_value(text.strip()) for name, _, text in pairs}


def _canonical_name(name: str) -> str:
    canonical_name = canonical(name)
    if canonical_name is None:
        raise ValueError("no such optimizer")
    return canonical_name


def _zero_is_unset(value: int) -> int | None:
    return value or None


class OptimOptions(Slice):
    """Optimization."""

    optimizer: Annotated[
        str,
        AfterValidator(_canonical_name),
        Expects(
            f"{', '.join(OPTIMIZERS)} or library:name ({', '.join(LIBRARIES)})", near=(*OPTIMIZERS, *OPTIMIZER_ALIASES)
        ),
    ] = "adamw"
    """The optimizer. See [optimizers](optimizers.md). `library:name` takes any optimizer of that library, such as
    `pytorch_optimizer:adan`. SimpleTuner's prefixed names (`bnb-adamw8bit`, `optimi-lion`) mean the same here."""

    learning_rate: Positive = 1e-4
    """The peak learning rate of the schedule. For `prodigy`, which estimates the learning rate itself, set 1."""

    lr_scale: bool = False
    """Multiply `learning_rate` and `lr_end` by the effective batch, train_batch_size × gradient_accumulation_steps ×
    num_processes."""

    lr_scale_sqrt: bool = False
    """Multiply `learning_rate` and `lr_end` by the square root of the effective batch. Overrides `lr_scale`."""

    optimizer_config: (
        Annotated[
            dict[str, Argument],
            IsJson(),
            BeforeValidator(_arguments),
            Expects("k=v,k=v or an object of the optimizer's arguments"),
        ]
        | None
    ) = None
    """More arguments for the optimizer: `k=v,k=v`, an object, or the path of a JSON file. adamw takes `amsgrad`,
    `foreach` and `fused`. A `library:name` optimizer gets only `learning_rate` and these arguments."""

    optimizer_beta1: Beta | None = None
    """Decay rate of the gradient's moving average. By default the optimizer's own, 0.9 with adamw."""

    optimizer_beta2: Beta | None = None
    """Decay rate of the squared gradient's moving average. By default the optimizer's own, 0.999 with adamw."""

    adam_weight_decay: NotNegative = 0.01
    """Decoupled weight decay, for every optimizer except `library:name`."""

    adam_epsilon: Positive = 1e-8
    """Epsilon, the number that Adam adds to its denominator."""

    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "sine", "polynomial"
    ] = "constant_with_warmup"
    """Shape of the learning rate schedule. Warm-up comes first; this shape spans the remaining steps."""

    lr_warmup_steps: Whole = 0
    """Optimizer steps over which the learning rate rises from zero."""

    lr_num_cycles: Count = 1
    """Number of cycles of `cosine_with_restarts` and `sine`."""

    lr_power: Positive = 0.8
    """Exponent of `polynomial`."""

    lr_end: NotNegative = 0.0
    """Final learning rate of a decaying schedule."""

    max_grad_norm: NotNegative = 2.0
    """Clip gradients to this norm or value. 0 turns clipping off."""

    grad_clip_method: Literal["norm", "value"] = "norm"
    """What `max_grad_norm` bounds: the norm over all parameters (`norm`) or each gradient value (`value`)."""

    optimizer_release_gradients: bool = False
    """Full training only: step each parameter in the backward pass, as soon as its gradient is complete, and free the
    gradient. Works with adafactor and adamw_bf16, on bf16 weights without fp32 masters, with stochastic rounding.
    Clipping by norm needs all gradients at once: set `max_grad_norm` to 0 or `grad_clip_method` to value. Needs
    `gradient_accumulation_steps` 1."""

    skip_bad_batches: Whole = 0
    """Number of optimizer steps that the run may skip because a loss or gradient is not finite. A notice names each. A
    skipped step counts as a step and changes neither weights, optimizer state nor moving average. With 0 the run saves
    a checkpoint at the first one and ends. fp16 overflows do not count. With `optimizer_release_gradients` other
    weights have already stepped when a gradient is not finite: a skipped step keeps those updates; a run that ends does
    not save them."""

    train_batch_size: Count = 1
    """Images in one forward pass. A dataset's own value overrides it."""

    gradient_accumulation_steps: Count = 1
    """Forward passes (micro-batches) per optimizer step, on each of [several processes](many-gpus.md)."""

    max_train_steps: (
        Annotated[int, Ge(0), AfterValidator(_zero_is_unset), Expects("a whole number of at least 1")] | None
    ) = None
    """Optimizer steps of the run. Overrides `num_train_epochs`; 0 means not set."""

    num_train_epochs: Whole = 1
    """Epochs: passes over the data. Used where `max_train_steps` is not set."""

    caption_dropout_probability: UnitInterval = 0.1
    """Share of the samples to train with an empty caption, in the full prompt template."""

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step on one process, where no dataset sets its own batch size."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def rate_scale(self) -> float:
        """Factor by which `lr_scale` and `lr_scale_sqrt` multiply the learning rate."""
        if self.lr_scale_sqrt:
            return math.sqrt(self.effective_batch)
        return float(self.effective_batch) if self.lr_scale else 1.0
