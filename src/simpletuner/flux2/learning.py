"""What learns in a transformer, as tensors by name: their state, putting it back, holding another for a while."""

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import Shards


class Learning(abc.ABC):
    """Parameters by name. Nothing else is trained."""

    foreign: ClassVar[str]
    """What a state of other names is called."""

    masters: SteppedParameters | None
    """What the optimizer steps on in place of the weights."""

    @property
    @abc.abstractmethod
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The model's own parameters that learn."""

    @property
    def shards(self) -> Shards | None:
        """This rank's share, where ranks share the parameters out; None where every rank holds all of them."""
        return self.masters if isinstance(self.masters, Shards) else None

    @property
    def whole_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parameters, whole ones where they are sharded."""
        if self.shards is not None:
            return [split.shape for split in self.shards.splits.values()]
        return [tuple(weight.shape) for weight in self.weights.values()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer steps on."""
        yield from (self.weights if self.masters is None else self.masters.parameters).items()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def to(self, device: torch.device) -> None:
        """Move the parameters to `device`; those of the frozen base stay where they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @property
    def parameter_count(self) -> int:
        return sum(map(math.prod, self.whole_shapes))

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
        if self.masters is not None:
            self.masters.settle()

    @contextlib.contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with the values of `state`; afterwards with its own, bit for bit."""
        kept = {name: tensor.clone() for name, tensor in self.state().items()}
        self.load(state)
        try:
            yield
        except BaseException:
            if self.shards is None:  # ranks that share weights out go back together, or not at all: the run ends
                self.load(kept)
            raise
        self.load(kept)
