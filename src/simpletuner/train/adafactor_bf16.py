"""Adafactor that steps on bf16 weights with stochastic rounding."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.train.adamw_bf16 import chunk_size, noise_bits, rounded


class AdafactorBf16(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235) without momentum, as torch has it, on vectors and matrices.

    The arithmetic and the state, a row and a column of a matrix and all of a vector, are fp32. fp32 parameters are
    stepped exactly, bf16 ones are rounded stochastically. The draw of an element is a function of (`seed`, step,
    parameter's place, element), so a resumed run rounds as an uninterrupted one does. Nothing waits for the device.

    A parameter is read and written some rows at a time, so the temporary memory does not grow with its size.
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
        """One step on the gradients that are there."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(parameter, group, place)
                place += 1

    @torch.no_grad()
    def step_parameter(
        self, parameter: Tensor, group: dict[str, Any], place: int, is_finite: Tensor | None = None
    ) -> None:
        """Step one parameter of `group`, the `place`-th of all, on its gradient. Where `is_finite` is false, only the
        count of its steps changes.
        """
        values = parameter if parameter.ndim == 2 else parameter.view(1, -1)
        gradient = parameter.grad.view(values.shape)  # type: ignore[union-attr]
        state = self._counted(parameter)
        step, lr = state["step"], group["lr"]
        eps, least_scale = group["eps"]
        eps = torch.finfo(torch.float32).eps if eps is None else eps

        # The moments, and how large the weights are.
        share = step ** group["beta2_decay"]
        squares = torch.zeros((), device=parameter.device)
        column_squares = torch.zeros(values.shape[1], device=parameter.device)
        row_squares = torch.zeros(values.shape[0], device=parameter.device)
        for rows in _row_chunks(values):
            part = gradient[rows].float().square()
            row_squares[rows] = part.sum(1)
            column_squares += part.sum(0)
            squares += values[rows].float().square().sum()
        if parameter.ndim == 2:
            means = {"row_var": row_squares / values.shape[1], "col_var": column_squares / values.shape[0]}
        else:
            means = {"variance": column_squares.view_as(parameter)}
        for name, mean in means.items():
            moment = state[name].lerp(mean, share)
            state[name].copy_(moment if is_finite is None else torch.where(is_finite, moment, state[name]))
        if parameter.ndim == 2:
            row, column = state["row_var"] / state["row_var"].mean().clamp_(min=eps), state["col_var"]
        else:
            row, column = torch.ones(1, device=parameter.device), state["variance"].view(-1)

        def updates(rows: slice) -> Tensor:
            return torch.outer(row[rows], column).clamp_(min=eps * eps).rsqrt_().mul_(gradient[rows])

        # How large the update is, and then the update.
        update_squares = torch.zeros((), device=parameter.device)
        for rows in _row_chunks(values):
            update_squares += updates(rows).square_().sum()
        count = max(1, parameter.numel())
        rate = (squares / count).sqrt_().clamp_(min=least_scale) * min(lr, 1 / math.sqrt(step))
        rate /= ((update_squares / count).sqrt_() / group["d"]).clamp_(min=1)
        seed = draw_seed(self.seed, "rounding", step, place)
        for rows in _row_chunks(values):
            updated = values[rows].float().mul(1 - lr * group["weight_decay"]).sub_(updates(rows).mul_(rate))
            if parameter.dtype == torch.bfloat16:
                start, stop = rows.start * values.shape[1], rows.stop * values.shape[1]
                updated = rounded(updated, noise_bits([(seed, start, stop)], updated.device).view_as(updated))
            if is_finite is not None:
                updated = torch.where(is_finite, updated, values[rows])
            values[rows] = updated

    def _counted(self, parameter: Tensor) -> dict[str, Any]:
        """The state of `parameter`, with a step counted."""
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
