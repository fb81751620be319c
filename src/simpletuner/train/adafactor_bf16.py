"""Adafactor that steps on bf16 weights with stochastic rounding."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.train.adamw_bf16 import chunk_size, noise_bits, stochastically_rounded


class AdafactorBf16(torch.optim.Optimizer):
    """Torch's Adafactor (arXiv 1804.04235), which has no momentum, for vectors and matrices.

    Arithmetic and state are fp32; the state is a row and a column per matrix, and a full tensor per vector. fp32
    parameters are updated exactly, bf16 ones with stochastic rounding. The random bits of an element depend only on
    (`seed`, step, parameter index, element), so a resumed run rounds like an uninterrupted one. The host never waits
    for the device.

    A parameter is read and written in groups of rows, so temporary memory does not grow with its size.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """Step all parameters that have a gradient."""
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(parameter, group, index)
                index += 1

    @torch.no_grad()
    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], index: int, is_finite: Tensor | None = None
    ) -> None:
        """Update `parameter` of `group` with its gradient. `index`, its position among all parameters, keys the random
        bits. If `is_finite` is given and false, only the step count changes.
        """
        values = parameter if parameter.ndim == 2 else parameter.view(1, -1)
        gradient = parameter.grad.view(values.shape)  # type: ignore[union-attr]
        state = self._state_with_step(parameter)
        step, lr = state["step"], group["lr"]
        eps, least_rms = group["eps"]
        eps = torch.finfo(torch.float32).eps if eps is None else eps

        # First pass: the moments and the RMS of the weights.
        one_minus_beta2 = step ** group["beta2_decay"]
        weight_squares = torch.zeros((), device=parameter.device)
        column_squares = torch.zeros(values.shape[1], device=parameter.device)
        row_squares = torch.zeros(values.shape[0], device=parameter.device)
        for rows in _row_chunks(values):
            gradient_squares = gradient[rows].float().square()
            row_squares[rows] = gradient_squares.sum(1)
            column_squares += gradient_squares.sum(0)
            weight_squares += values[rows].float().square().sum()
        if parameter.ndim == 2:
            means = {"row_var": row_squares / values.shape[1], "col_var": column_squares / values.shape[0]}
        else:
            means = {"variance": column_squares.view_as(parameter)}
        for name, mean in means.items():
            moment = state[name].lerp(mean, one_minus_beta2)
            state[name].copy_(moment if is_finite is None else torch.where(is_finite, moment, state[name]))
        if parameter.ndim == 2:
            row, column = state["row_var"] / state["row_var"].mean().clamp_(min=eps), state["col_var"]
        else:
            row, column = torch.ones(1, device=parameter.device), state["variance"].view(-1)

        def updates(rows: slice) -> Tensor:
            return torch.outer(row[rows], column).clamp_(min=eps * eps).rsqrt_().mul_(gradient[rows])

        # Second pass: the RMS of the update. Third pass: the update.
        update_squares = torch.zeros((), device=parameter.device)
        for rows in _row_chunks(values):
            update_squares += updates(rows).square_().sum()
        count = max(1, parameter.numel())
        rate = (weight_squares / count).sqrt_().clamp_(min=least_rms) * min(lr, 1 / math.sqrt(step))
        rate /= ((update_squares / count).sqrt_() / group["d"]).clamp_(min=1)
        seed = draw_seed(self.seed, "rounding", step, index)
        for rows in _row_chunks(values):
            updated = values[rows].float().mul(1 - lr * group["weight_decay"]).sub_(updates(rows).mul_(rate))
            if parameter.dtype == torch.bfloat16:
                start, stop = rows.start * values.shape[1], rows.stop * values.shape[1]
                updated = stochastically_rounded(
                    updated, noise_bits([(seed, start, stop)], updated.device).view_as(updated)
                )
            if is_finite is not None:
                updated = torch.where(is_finite, updated, values[rows])
            values[rows] = updated

    def _state_with_step(self, parameter: Tensor) -> dict[str, Any]:
        """The state of `parameter`, created if needed, with its step count incremented."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            shapes = {"variance": parameter.shape}
            if parameter.ndim == 2:
                shapes = {"row_var": parameter.shape[:1], "col_var": parameter.shape[1:]}
            state |= {name: torch.zeros(shape, device=parameter.device) for name, shape in shapes.items()}
        state["step"] += 1
        return state


def _row_chunks(values: Tensor) -> Iterator[slice]:
    rows, columns = values.shape
    size = max(1, chunk_size(values) // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
