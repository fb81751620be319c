"""The optimiser, its schedule, the size of a step and the length of the run."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Count, IsJson, NotNegative, Positive, Says, Share, Slice, Whole

Argument = bool | int | float | str
Beta = Annotated[float, Ge(0), Lt(1)]


def _word(text: str) -> Argument:
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


def _torch_is_implied(value: object) -> object:
    return "adamw" if value == "torch-adamw" else value


def _zero_is_unset(value: int) -> int | None:
    return value or None


class OptimOptions(Slice):
    """Optimisation."""

    optimizer: Annotated[Literal["adamw"], BeforeValidator(_torch_is_implied)] = "adamw"
    """The optimiser, PyTorch's own (also `torch-adamw`)."""

    learning_rate: Positive = 1e-4
    """The highest learning rate of the schedule."""

    optimizer_config: (
        Annotated[
            dict[str, Argument],
            IsJson(),
            BeforeValidator(_arguments),
            Says("k=v,k=v or an object of the optimiser's arguments"),
        ]
        | None
    ) = None
    """More arguments of the optimiser: `k=v,k=v`, an object, or a path to a JSON file. adamw knows `amsgrad`,
    `foreach` and `fused`."""

    optimizer_beta1: Beta = 0.9
    """Adam's memory of the gradient."""

    optimizer_beta2: Beta = 0.999
    """Adam's memory of the squared gradient."""

    adam_weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""

    adam_epsilon: Positive = 1e-8
    """Added to Adam's denominator."""

    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "sine", "polynomial"
    ] = "constant_with_warmup"
    """How the learning rate moves: warm-up first, then this shape over what is left of the run."""

    lr_warmup_steps: Whole = 0
    """Optimiser steps over which the rate rises from zero."""

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

    train_batch_size: Count = 1
    """Pictures in one forward pass. A dataset's own value wins."""

    gradient_accumulation_steps: Count = 1
    """Forward passes that share one optimiser step."""

    max_train_steps: (
        Annotated[int, Ge(0), AfterValidator(_zero_is_unset), Says("a whole number of at least 1")] | None
    ) = None
    """Optimiser steps of the run. Wins over `num_train_epochs`; 0 means not set."""

    num_train_epochs: Whole = 1
    """Passes over the data, where `max_train_steps` is not given."""

    caption_dropout_probability: Share = 0.1
    """Share of samples trained with an empty caption, through the full template."""
