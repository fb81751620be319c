"""Samplers: functions of (velocity, x, sigmas) that integrate from noise to data.

`sigmas` has one column per sample, so samples with different noise levels and step sizes share the model calls. Each
column decreases. `sigmas` is fp64; the state keeps the dtype of x (fp32).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"]], Float[Tensor, "b c h w"]]
"""(x, sigma of each sample) → velocity."""

StepsDone = Callable[[int], None]
"""Called with the number of completed steps."""


def euler(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """Euler's method: follows the velocity at the start of a step. Order 1, one model call per step."""
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        x = x + _wide(next_sigma - sigma, x) * _velocity_at(velocity, x, sigma)
        report(step)
    return x


def heun(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """Heun's method: follows the mean of the velocities at a step's start and at its Euler end point.

    Order 2, two model calls per step. The model is also called at the last sigma, so its velocity must be defined there
    (for example at 0).
    """
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        span = _wide(next_sigma - sigma, x)
        start = _velocity_at(velocity, x, sigma)
        end = _velocity_at(velocity, x + span * start, next_sigma)
        x = x + span / 2 * (start + end)
        report(step)
    return x


def dpm(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """DPM-Solver++ (2M): extrapolates the data prediction in log-SNR. Order 2, one model call per step.

    Source: arXiv 2211.01095, algorithm 2, with α = 1 − σ. The first step has only one prediction and equals Euler's. So
    does a step from σ = 1, where log-SNR is infinite, the step after it, and a step to σ = 0.
    """
    previous: tuple[Tensor, Tensor] | None = None
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        data = _data(velocity, x, sigma)
        x = _toward(data + _trend(previous, data, sigma, next_sigma), x, sigma, next_sigma)
        previous = (data, sigma)
        report(step)
    return x


def unipc(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """UniPC: predicts as `dpm`, then corrects with the data prediction at the predicted point.

    Order 2, one model call per step.

    Source: arXiv 2302.04867, UniPC-2 with B₂(h) = e^h − 1 and data prediction, α = 1 − σ. The model call at a predicted
    point both corrects it and starts the next step. The last point has no call, so it is not corrected.
    """
    previous: tuple[Tensor, Tensor] | None = None
    data = _data(velocity, x, sigmas[0])
    last = len(sigmas) - 1
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        predicted = _toward(data + _trend(previous, data, sigma, next_sigma), x, sigma, next_sigma)
        if step < last:
            next_data = _data(velocity, predicted, next_sigma)
            x = _toward(data + _correction(previous, data, next_data, sigma, next_sigma), x, sigma, next_sigma)
            previous, data = (data, sigma), next_data
        else:
            x = predicted
        report(step)
    return x


def _velocity_at(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    return velocity(x, sigma.to(x.dtype)).to(x.dtype)


def _data(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    """The data prediction at x: x − σ·v."""
    return x - _wide(sigma, x) * _velocity_at(velocity, x, sigma)


def _toward(data: Tensor, x: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Move x at `sigma` straight toward `data`, to `next_sigma`.

    This is the exponential step of both solvers, σ_t/σ_s·x − α_t·(e^-h − 1)·data: with α = 1 − σ the second factor is
    1 − σ_t/σ_s.
    """
    ratio = _wide(next_sigma / sigma, x)
    return ratio * x + (1 - ratio) * data


def _log_snr(sigma: Tensor) -> Tensor:
    """λ = log((1 − σ)/σ)."""
    return torch.log1p(-sigma) - torch.log(sigma)


def _trend(previous: tuple[Tensor, Tensor] | None, data: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The mean change of the data prediction over a step, extrapolated from `previous`, an earlier (data, sigma)."""
    if previous is None:
        return torch.zeros_like(data)
    earlier_data, earlier_sigma = previous
    share = (_log_snr(next_sigma) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(earlier_sigma)) / 2
    return _wide(torch.where(share.isfinite(), share, 0), data) * (data - earlier_data)


def _correction(
    previous: tuple[Tensor, Tensor] | None, data: Tensor, next_data: Tensor, sigma: Tensor, next_sigma: Tensor
) -> Tensor:
    """Like `_trend`, but with `next_data`, the data prediction at the step's end, and UniC's weights."""
    if previous is None:
        return (next_data - data) / 2
    earlier_data, earlier_sigma = previous
    h = _log_snr(next_sigma) - _log_snr(sigma)
    ratio = (_log_snr(earlier_sigma) - _log_snr(sigma)) / h
    b_h = torch.expm1(-h)
    phi_2 = b_h / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    # The weights ρ solve ρ₁ + ρ₂ = φ₂/B, r·ρ₁ + ρ₂ = 2φ₃/B.
    earlier_weight = (phi_2 - 2 * phi_3) / b_h / (1 - ratio)
    next_weight = phi_2 / b_h - earlier_weight
    return _wide(earlier_weight / ratio, data) * (earlier_data - data) + _wide(next_weight, data) * (next_data - data)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per sample for multiplication with a batch like `like`."""
    return rearrange(values, "b -> b 1 1 1").to(like.dtype)
