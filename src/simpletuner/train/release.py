"""Step each parameter inside the backward pass, as soon as its gradient is accumulated, and free the gradient."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from simpletuner.config.options.optim import OptimOptions
from simpletuner.train import optim


@runtime_checkable
class StepsOneParameter(Protocol):
    """An optimizer that can step parameters one by one, in any order, bit-identical to one step of all of them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], index: int, is_finite: Tensor | None = None
    ) -> None:
        """Update `parameter` of `group` with its gradient. `index`, its position among all parameters, keys random
        bits. If `is_finite` is given and false, only the step count changes.
        """


class GradientRelease:
    """Post-accumulate-grad hooks on `parameters` that free each gradient. Autograd calls such a hook once per backward
    pass for each parameter with a gradient. Inside `backward`, the hook first steps the parameter. In any other
    backward pass, such as a trial, weights do not change.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: StepsOneParameter, options: OptimOptions) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._options = options
        members = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
        self._members = {id(parameter): (group, index) for index, (parameter, group) in enumerate(members)}
        self._norms: dict[int, Tensor] | None = None
        self._is_finite = torch.ones((), dtype=torch.bool)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step_and_free)

    def backward(self, loss: Tensor) -> Tensor:
        """Compute the gradients of `loss` and step each parameter that has one, once. After the first gradient that is
        not finite, no further parameter is stepped.

        Returns:
            The norm over all gradients before clipping, a scalar on the device.
        """
        self._norms, self._is_finite = {}, torch.ones((), dtype=torch.bool, device=loss.device)
        try:
            loss.backward()
            # In the order of an ordinary step, so that the sum is bit-identical.
            norms = [self._norms[id(each)] for each in self._parameters if id(each) in self._norms]
        finally:
            self._norms = None
        return torch.nn.utils.get_total_norm(norms)

    def _step_and_free(self, parameter: Tensor) -> None:
        if self._norms is not None:
            norm = optim.clip([parameter], self._options)
            self._norms[id(parameter)] = norm
            self._is_finite = self._is_finite & norm.isfinite()
            self._optimizer.step_parameter(parameter, *self._members[id(parameter)], self._is_finite)
        parameter.grad = None
