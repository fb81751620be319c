"""Step each parameter inside the backward pass, as soon as its gradient is whole, and free the gradient."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from simpletuner.config.options.optim import OptimOptions
from simpletuner.train import optim


@runtime_checkable
class StepsOneParameter(Protocol):
    """An optimizer that steps parameters one by one, in any order, with the bits of one step on all of them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], place: int, is_finite: Tensor | None = None
    ) -> None:
        """Step one parameter of `group`, the `place`-th of all, on its gradient. Where `is_finite` is false, only the
        count of its steps changes.
        """


class GradientRelease:
    """Hooks on `parameters` that free each gradient once it is whole: torch's post-accumulate-grad hooks, which
    autograd calls once a backward pass for each parameter that has a gradient. Inside `backward`, the optimizer steps
    on the gradient first. In another backward pass, such as a trial, no weight changes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: StepsOneParameter, options: OptimOptions) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._options = options
        members = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
        self._places = {id(parameter): (group, place) for place, (parameter, group) in enumerate(members)}
        self._norms: dict[int, Tensor] | None = None
        self._is_finite = torch.ones((), dtype=torch.bool)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def backward(self, loss: Tensor) -> Tensor:
        """Step on the gradients of `loss`, each parameter that gets one once. From the first gradient on that is not
        finite, no parameter is stepped.

        Returns:
            The norm over all gradients before clipping, a scalar on the device.
        """
        self._norms, self._is_finite = {}, torch.ones((), dtype=torch.bool, device=loss.device)
        try:
            loss.backward()
            # In the order of an ordinary step, so that the sum has its bits.
            norms = [self._norms[id(each)] for each in self._parameters if id(each) in self._norms]
        finally:
            self._norms = None
        return torch.nn.utils.get_total_norm(norms)

    def _take(self, parameter: Tensor) -> None:
        if self._norms is not None:
            norm = optim.clip([parameter], self._options)
            self._norms[id(parameter)] = norm
            self._is_finite = self._is_finite & norm.isfinite()
            self._optimizer.step_parameter(parameter, *self._places[id(parameter)], self._is_finite)
        parameter.grad = None
