"""fp32 masters of weights that compute in bf16 or fp16.

bf16 tells numbers apart from one in 256 on: beside a weight of 1 a step of 1e-4 rounds away, and so would every step
after it. Masters collect such steps until the weights can show them (Micikevicius et al., arXiv 1710.03740).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from simpletuner.memory.precision import check_range


@runtime_checkable
class SteppedParameters(Protocol):
    """Parameters on which an optimizer steps in place of a model's own: `Masters`, or the `Shards` of parameters that
    ranks share out.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By the names of the model's."""

    def collect(self) -> None:
        """Take the gradients of the model's parameters over and clear them: after each backward pass."""

    def settle(self) -> None:
        """Let the model compute with their values: after each change of them."""


class Masters:
    """What an optimizer steps on in place of a model's weights. The model computes with the same numbers, rounded to
    the nearest of its own type.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        """Takes the memory of `weights`, fp32, over for the masters and leaves their values as `dtype` in its place.

        Raises:
            ConfigError: fp16 is the `dtype` and cannot hold a weight.
        """
        if any(weight.dtype != torch.float32 for weight in weights.values()):
            raise TypeError("masters are made of fp32 weights")
        self._weights: list[Tensor] = list(weights.values())
        self.parameters = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
        for name, weight in weights.items():
            check_range(weight.data, dtype, name)
            weight.data = weight.data.to(dtype)

    def collect(self) -> None:
        """Add the weights' gradients to the masters', in fp32, and clear them: after each backward pass, so that
        nothing is accumulated in less.
        """
        for weight, master in zip(self._weights, self.parameters.values(), strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def settle(self) -> None:
        """Give the weights the masters' values: after each change of the masters."""
        self.show(self.parameters)

    @torch.no_grad()
    def show(self, values: Mapping[str, Tensor]) -> None:
        """Give the weights other values, by the masters' names, until `settle` is called."""
        torch._foreach_copy_(self._weights, [values[name].to(self._weights[0].device) for name in self.parameters])
