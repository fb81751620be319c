"""The optimizer, its schedule, the size of a step and the length of the run."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.optimizers import LIBRARIES, OPTIMIZER_ALIASES, OPTIMIZERS, canonical
from simpletuner.config.options.kinds import (
    Count,
    IsJson,
    NotNegative,
    Positive,
    Says,
    Slice,
    UnitInterval,
    Whole,
    list_as_tuple,
)

Argument = Annotated[bool | int | float | str | tuple[int | float, ...] | None, BeforeValidator(list_as_tuple)]
Beta = Annotated[float, Ge(0), Lt(1)]


def _word(text: str) -> bool | int | float | str:
    """A value of `k=v`: a boolean, a number or the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _arguments(value: object) -> object:
    """ "k=v,k=v" as an object; anything else is left for the type to refuse."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        return value
    return {name.strip(): _word(text.strip()) for name, _, text in pairs}


def _known(name: str) -> str:
    found = canonical(name)
    if found is None:
        raise ValueError("no such optimizer")
    return found


def _zero_is_unset(value: int) -> int | None:
    return value or None


class OptimOptions(Slice):
    """Optimization."""

    optimizer: Annotated[
        str,
        AfterValidator(_known),
        Says(
            f"{', '.join(OPTIMIZERS)} or library:name ({', '.join(LIBRARIES)})", near=(*OPTIMIZERS, *OPTIMIZER_ALIASES)
        ),
    ] = "adamw"
    """The optimizer: see [optimizers](optimizers.md). `library:name` is any that the library has, such as
    `pytorch_optimizer:adan`. SimpleTuner's names with a prefix (`bnb-adamw8bit`, `optimi-lion`) mean the same here."""

    learning_rate: Positive = 1e-4
    """The highest learning rate of the schedule. `prodigy` finds the rate itself and wants 1 here."""

    lr_scale: bool = False
    """Multiply `learning_rate` and `lr_end` by the effective batch, train_batch_size × gradient_accumulation_steps ×
    num_processes."""

    lr_scale_sqrt: bool = False
    """Multiply them by the square root of the effective batch instead, whatever `lr_scale` says."""

    optimizer_config: (
        Annotated[
            dict[str, Argument],
            IsJson(),
            BeforeValidator(_arguments),
            Says("k=v,k=v or an object of the optimizer's arguments"),
        ]
        | None
    ) = None
    """More arguments of the optimizer: `k=v,k=v`, an object, or a path to a JSON file. adamw knows `amsgrad`,
    `foreach` and `fused`. One of a library, `library:name`, gets `learning_rate` and these and nothing else."""

    optimizer_beta1: Beta | None = None
    """Memory of the gradient; by default the optimizer's own, 0.9 with adamw."""

    optimizer_beta2: Beta | None = None
    """Memory of the squared gradient; by default the optimizer's own, 0.999 with adamw."""

    adam_weight_decay: NotNegative = 0.01
    """Decoupled weight decay, of every optimizer with a name of its own."""

    adam_epsilon: Positive = 1e-8
    """Added to Adam's denominator."""

    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "sine", "polynomial"
    ] = "constant_with_warmup"
    """How the learning rate moves: warm-up first, then this shape over what is left of the run."""

    lr_warmup_steps: Whole = 0
    """Optimizer steps over which the rate rises from zero."""

    lr_num_cycles: Count = 1
    """Cycles of `cosine_with_restarts` and `sine`."""

    lr_power: Positive = 0.8
    """Exponent of `polynomial`."""

    lr_end: NotNegative = 0.0
    """The rate at which a falling schedule ends."""

    max_grad_norm: NotNegative = 2.0
    """Gradients above this are scaled down to it; 0 leaves them alone."""

    grad_clip_method: Literal["norm", "value"] = "norm"
    """What `max_grad_norm` bounds: the norm over all parameters, or each value."""

    optimizer_release_gradients: bool = False
    """Full training: step each parameter in the backward pass, as soon as its gradient is whole, and free the gradient.
    For adafactor and adamw_bf16, on bf16 weights without masters, which are rounded stochastically. The norm over all
    gradients is known too late to clip by it: `max_grad_norm` is 0, or `grad_clip_method` is value. One pass a step."""

    skip_bad_batches: Whole = 0
    """How many optimizer steps of the run may be skipped because a loss or gradient is not finite. Each is named in a
    notice; it counts as a step and changes neither weights, optimizer state nor moving average. 0 ends the run, saved,
    at the first. fp16's overflows do not count. With `optimizer_release_gradients` a gradient that is not finite is
    found after other weights are stepped: these are kept where the step is skipped, not saved where the run ends."""

    train_batch_size: Count = 1
    """Pictures in one forward pass. A dataset's own value wins."""

    gradient_accumulation_steps: Count = 1
    """Forward passes that share one optimizer step, on each process of [several](many-gpus.md)."""

    max_train_steps: (
        Annotated[int, Ge(0), AfterValidator(_zero_is_unset), Says("a whole number of at least 1")] | None
    ) = None
    """Optimizer steps of the run. Wins over `num_train_epochs`; 0 means not set."""

    num_train_epochs: Whole = 1
    """Passes over the data, where `max_train_steps` is not given."""

    caption_dropout_probability: UnitInterval = 0.1
    """Share of samples trained with an empty caption, through the full template."""

    @property
    def effective_batch(self) -> int:
        """Images of one optimizer step on one process, where no dataset has a batch size of its own."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def rate_scale(self) -> float:
        """What `lr_scale` and `lr_scale_sqrt` multiply the learning rate by."""
        if self.lr_scale_sqrt:
            return math.sqrt(self.effective_batch)
        return float(self.effective_batch) if self.lr_scale else 1.0
