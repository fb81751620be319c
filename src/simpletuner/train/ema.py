"""A moving average of what is trained, kept beside it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from simpletuner.config.options.ema import EmaOptions
from simpletuner.train.trained import Trainable


class Ema:
    """The exponential moving average of the trained tensors, fp32: at each update `decay` of it stays and the rest
    comes from what is trained. It starts as that is. What is trained is only read.
    """

    def __init__(self, trained: Trainable, options: EmaOptions, device: torch.device) -> None:
        """`device` is where the average lies. On another one than what is trained, each update waits for a copy."""
        self._trained = trained
        self._decay = options.ema_decay
        self._every_steps = options.ema_update_interval
        self._average = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in trained.state().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take `step` in, if it is one of those that count."""
        if step % self._every_steps:
            return
        averages = list(self._average.values())
        state = self._trained.state()
        lives = [state[name].to(average.device, torch.float32) for name, average in self._average.items()]
        if self._decay == 0:
            torch._foreach_copy_(averages, lives)  # lerp would lose the sign of a zero
        else:
            torch._foreach_lerp_(averages, lives, 1 - self._decay)

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the average; afterwards with its own values, bit for bit."""
        return self._trained.holding(self._average)

    def state(self) -> dict[str, Tensor]:
        """The average's tensors themselves, by the trained ones' names."""
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: other names than those of what is trained.
        """
        if state.keys() != self._average.keys():
            raise ValueError("no moving average of what is trained")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
