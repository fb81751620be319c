"""fp32 masters of weights that compute in bf16 or fp16.

bf16 has a relative precision of 1 in 256: a step of 1e-4 on a weight of 1 is rounded away, and so is every later one.
Masters accumulate such steps until they change the weights (Micikevicius et al., arXiv 1710.03740).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from simpletuner.memory.precision import check_range


@runtime_checkable
class SteppedParameters(Protocol):
    """Parameters that an optimizer steps in place of the model's own: `Masters`, or the `RankShards` of one rank."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The stepped parameters, by the names of the model's parameters."""

    def take_gradients(self) -> None:
        """Take over the gradients of the model's parameters and clear them. Call it after each backward pass."""

    def update_weights(self) -> None:
        """Make the model compute with these values. Call it after each change of them."""


class Masters:
    """fp32 parameters that the optimizer steps in place of the model's weights.

    The model computes with the same numbers, rounded to nearest in its own dtype.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        """Make masters from the memory of fp32 `weights`, and replace the weights' data with a copy in `dtype`.

        Raises:
            ConfigError: `dtype` is fp16 and cannot hold a weight.
        """
        if any(weight.dtype != torch.float32 for weight in weights.values()):
            raise TypeError("masters are made from fp32 weights")
        self._weights: list[Tensor] = list(weights.values())
        self.parameters = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
        for name, weight in weights.items():
            check_range(weight.data, dtype, name)
            weight.data = weight.data.to(dtype)

    def take_gradients(self) -> None:
        """Add the weights' gradients to the masters' in fp32, and clear them.

        Call it after each backward pass, so that no gradients are accumulated in a lower precision.
        """
        for weight, master in zip(self._weights, self.parameters.values(), strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def update_weights(self) -> None:
        """Set the weights to the masters' values. Call it after each change of the masters."""
        self.show(self.parameters)

    @torch.no_grad()
    def show(self, values: Mapping[str, Tensor]) -> None:
        """Set the weights to other values, by the masters' names, until `update_weights` is called."""
        torch._foreach_copy_(self._weights, [values[name].to(self._weights[0].device) for name in self.parameters])
