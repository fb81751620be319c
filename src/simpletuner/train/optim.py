"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from simpletuner.base.errors import ConfigError
from simpletuner.config.options.optim import OptimOptions

Shape = Callable[[float, OptimOptions], float]
"""Share of the learning rate at a progress in [0, 1): 0 is the end of the warm-up, 1 the end of the run."""

SCHEDULES: dict[str, Shape] = {
    "constant": lambda progress, options: 1.0,
    "constant_with_warmup": lambda progress, options: 1.0,
    "linear": lambda progress, options: 1 - progress,
    "cosine": lambda progress, options: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_with_restarts": lambda progress, options: (
        (1 + math.cos(math.pi * (progress * options.lr_num_cycles % 1))) / 2
    ),
    "sine": lambda progress, options: math.sin(math.pi * (progress * options.lr_num_cycles % 1)),
    "polynomial": lambda progress, options: (1 - progress) ** options.lr_power,
}
FLAT = ("constant", "constant_with_warmup")


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """The rate of `step` (from 1) of `steps`: warm-up first, then the shape over what is left, down to `lr_end`.

    The first of n warm-up steps uses 1/n of the rate and the last all of it. `constant` has no warm-up.
    """
    rate, warmup = options.learning_rate, options.lr_warmup_steps
    if options.lr_scheduler != "constant" and step <= warmup:
        return rate * step / warmup
    if options.lr_scheduler in FLAT:
        return rate
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    share = SCHEDULES[options.lr_scheduler](min(progress, 1.0), options)
    return options.lr_end + (rate - options.lr_end) * share


def adamw(parameters: Sequence[nn.Parameter], options: OptimOptions) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.optimizer_beta1, options.optimizer_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
        "fused": True,  # one kernel for all the small adapter tensors, on the CPU too
    }
    return torch.optim.AdamW(parameters, **(arguments | (options.optimizer_config or {})))


OPTIMISERS: dict[str, Callable[[Sequence[nn.Parameter], OptimOptions], torch.optim.Optimizer]] = {"adamw": adamw}


def build(parameters: Sequence[nn.Parameter], options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser that `options` names, over `parameters`.

    Raises:
        ConfigError: `optimizer_config` has an argument that it does not take.
    """
    try:
        return OPTIMISERS[options.optimizer](parameters, options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError.of(
            f"optimizer_config = {options.optimizer_config}: {options.optimizer} refuses it ({error})",
            "the optimiser's own arguments",
        ) from None


def clip(parameters: Sequence[nn.Parameter], options: OptimOptions) -> torch.Tensor:
    """Bound the gradients as `max_grad_norm` and `grad_clip_method` say; returns their norm before, a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if options.max_grad_norm > 0:
        if options.grad_clip_method == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, options.max_grad_norm, norm)
        else:
            torch.nn.utils.clip_grad_value_(parameters, options.max_grad_norm)
    return norm
