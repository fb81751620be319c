"""What learns in a transformer, as tensors by name: their state, putting it back, holding another for a while."""

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from simpletuner.memory.row_shards import RowShards


class Learning(abc.ABC):
    """Parameters by name. Nothing else is trained."""

    foreign: ClassVar[str]
    """What a state of other names is called."""

    @property
    def shards(self) -> RowShards | None:
        """None: every rank holds all of it."""
        return None

    @abc.abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser steps on."""

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def to(self, device: torch.device) -> None:
        """Move the parameters to `device`; those of the frozen base stay where they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def state(self) -> dict[str, Tensor]:
        """The live tensors themselves (detached, not copied): what a checkpoint needs to go on exactly."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: other names or shapes than these.
        """
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(f"{self.foreign}: {len(odd)} names differ, such as {odd[0]}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(state[name])

    @contextlib.contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with the values of `state`; afterwards with its own, bit for bit."""
        kept = {name: tensor.clone() for name, tensor in self.state().items()}
        self.load(state)
        try:
            yield
        finally:
            self.load(kept)
