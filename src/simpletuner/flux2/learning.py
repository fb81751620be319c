"""Trainable parameters of a transformer by name: get their state, load it, or swap in another one temporarily."""

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import RankShards


class TrainableParameters(abc.ABC):
    """All trainable parameters, by name."""

    foreign_state: ClassVar[str]
    """Description, in the error message, of a state with other names."""

    masters: SteppedParameters | None
    """Parameters that the optimizer steps instead of the weights; None if it steps the weights."""

    @property
    @abc.abstractmethod
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters that the model computes with."""

    @property
    def shards(self) -> RankShards | None:
        """This rank's shards of the parameters; None if every rank holds whole parameters."""
        return self.masters if isinstance(self.masters, RankShards) else None

    @property
    def whole_shapes(self) -> list[tuple[int, ...]]:
        """The unsharded shapes of the parameters."""
        if self.shards is not None:
            return [split.shape for split in self.shards.splits.values()]
        return [tuple(weight.shape) for weight in self.weights.values()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer steps: the masters if there are any, else the weights."""
        yield from (self.weights if self.masters is None else self.masters.parameters).items()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def to(self, device: torch.device) -> None:
        """Move the trainable parameters to `device`. The frozen base does not move."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @property
    def parameter_count(self) -> int:
        return sum(map(math.prod, self.whole_shapes))

    def state(self) -> dict[str, Tensor]:
        """The parameters themselves, detached and not copied. A checkpoint of them resumes exactly."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of `state` into the parameters.

        Raises:
            ValueError: names or shapes differ.
        """
        parameters = dict(self.named_parameters())
        if parameters.keys() != state.keys():
            differing = sorted(parameters.keys() ^ state.keys())
            raise ValueError(f"{self.foreign_state}: {len(differing)} names differ, such as {differing[0]}")
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(state[name])
        if self.masters is not None:
            self.masters.update_weights()

    @contextlib.contextmanager
    def with_weights(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the model compute with `state` inside the context; restore its own values on exit, bit for bit."""
        own_state = {name: tensor.clone() for name, tensor in self.state().items()}
        self.load(state)
        try:
            yield
        except BaseException:
            if self.shards is None:  # shards are not restored: other ranks may not raise, and the run ends
                self.load(own_state)
            raise
        self.load(own_state)
