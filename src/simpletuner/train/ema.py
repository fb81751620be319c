"""A moving average of the adapter, kept beside it."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from simpletuner.config.options.ema import EmaOptions
from simpletuner.flux2.lora import Adapter


class Ema:
    """The exponential moving average of an adapter's tensors, fp32: at each update `decay` of it stays and the rest
    comes from the adapter. It starts as the adapter is. The adapter itself is only read.
    """

    def __init__(self, adapter: Adapter, options: EmaOptions, device: torch.device) -> None:
        """`device` is the run's; with `ema_device` cpu the average stays off it."""
        self._adapter = adapter
        self._decay = options.ema_decay
        self._every_steps = options.ema_update_interval
        place = torch.device("cpu") if options.ema_device == "cpu" else device
        self._average = {name: tensor.to(place, copy=True) for name, tensor in adapter.state().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take `step` in, if it is one of those that count."""
        if step % self._every_steps:
            return
        for name, live in self._adapter.state().items():
            average = self._average[name]
            if self._decay == 0:
                average.copy_(live)  # lerp would lose the sign of a zero
            else:
                average.lerp_(live.to(average.device), 1 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapter has the average's values; afterwards its own, bit for bit."""
        kept = {name: tensor.clone() for name, tensor in self._adapter.state().items()}
        self._adapter.load(self._average)
        try:
            yield
        finally:
            self._adapter.load(kept)

    def state(self) -> dict[str, Tensor]:
        """The average's tensors themselves, by the adapter's names."""
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: other names than this adapter's.
        """
        if state.keys() != self._average.keys():
            raise ValueError("no moving average of this adapter")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
