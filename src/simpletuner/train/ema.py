"""An exponential moving average of the trainable parameters."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from simpletuner.config.options.ema import EmaOptions
from simpletuner.train.trained import Trainable


class Ema:
    """The exponential moving average of the trained tensors, fp32: each update computes
    average ← decay · average + (1 − decay) · trained. It starts as a copy of the trained tensors, which it only reads.
    """

    def __init__(self, trained: Trainable, options: EmaOptions, device: torch.device) -> None:
        """`device` stores the average. If the trained tensors are on another device, each update waits for a copy."""
        self._trained = trained
        self._decay = options.ema_decay
        self._every_steps = options.ema_update_interval
        self._average = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in trained.state().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average, if `step` is a multiple of `ema_update_interval`."""
        if step % self._every_steps:
            return
        averages = list(self._average.values())
        state = self._trained.state()
        trained_tensors = [state[name].to(average.device, torch.float32) for name, average in self._average.items()]
        if self._decay == 0:
            torch._foreach_copy_(averages, trained_tensors)  # lerp would lose the sign of zeros
        else:
            torch._foreach_lerp_(averages, trained_tensors, 1 - self._decay)

    def applied(self) -> AbstractContextManager[None]:
        """A context in which the model computes with the average. On exit its own weights are restored bit for bit."""
        return self._trained.with_weights(self._average)

    def state(self) -> dict[str, Tensor]:
        """The tensors of the average, not copied, by the names of the trained ones."""
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy in tensors that `state` returned.

        Raises:
            ValueError: the names differ from those of the trained tensors.
        """
        if state.keys() != self._average.keys():
            raise ValueError("not a moving average of these trainable parameters")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
