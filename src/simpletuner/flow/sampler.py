"""From noise to data: a sampler is a function of (velocity, x, sigmas).

`sigmas` has a column for each sample, so samples with different noise levels and different step sizes share their
model calls. It falls along its rows and is kept in fp64; the state is kept in x's type (fp32).
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
"""Called with the number of steps done."""


def euler(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """Straight along the velocity. Order 1, one model call a step."""
    for step, (here, there) in enumerate(pairwise(sigmas), start=1):
        x = x + _wide(there - here, x) * _asked(velocity, x, here)
        report(step)
    return x


def heun(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """Along the mean of the velocities at a step's start and at its Euler end. Order 2, two model calls a step.

    The second call is made at the last sigma too: a model that has no velocity there (at 0, say) cannot be used.
    """
    for step, (here, there) in enumerate(pairwise(sigmas), start=1):
        span = _wide(there - here, x)
        start = _asked(velocity, x, here)
        end = _asked(velocity, x + span * start, there)
        x = x + span / 2 * (start + end)
        report(step)
    return x


def dpm(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """DPM-Solver++ (2M): the data prediction, extrapolated in log-SNR. Order 2, one model call a step.

    Source: arXiv 2211.01095, algorithm 2, with α = 1 − σ. The first step knows one prediction and is Euler's. So is
    a step from 1, whose log-SNR is infinite, and the one after it, and a step to 0.
    """
    before: tuple[Tensor, Tensor] | None = None
    for step, (here, there) in enumerate(pairwise(sigmas), start=1):
        data = _data(velocity, x, here)
        x = _toward(data + _trend(before, data, here, there), x, here, there)
        before = (data, here)
        report(step)
    return x


def unipc(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, "points b"],
    report: StepsDone = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """UniPC of order 2: predicts as `dpm` does, then corrects with the prediction made there. One model call a step.

    Source: arXiv 2302.04867, UniPC-2 with B₂(h) = e^h − 1 and data prediction, α = 1 − σ. The call at a predicted point
    corrects it and begins the next step, so the last point, where none is made, stays as predicted.
    """
    before: tuple[Tensor, Tensor] | None = None
    data = _data(velocity, x, sigmas[0])
    last = len(sigmas) - 1
    for step, (here, there) in enumerate(pairwise(sigmas), start=1):
        guess = _toward(data + _trend(before, data, here, there), x, here, there)
        if step < last:
            ahead = _data(velocity, guess, there)
            x = _toward(data + _correction(before, data, ahead, here, there), x, here, there)
            before, data = (data, here), ahead
        else:
            x = guess
        report(step)
    return x


def _asked(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    return velocity(x, sigma.to(x.dtype)).to(x.dtype)


def _data(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    """The data that the velocity points at from x: x − σ·v."""
    return x - _wide(sigma, x) * _asked(velocity, x, sigma)


def _toward(data: Tensor, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """From x at `here` straight toward `data`, as far as `there`. Both solvers' exponential step is this one:
    σ_t/σ_s·x − α_t·(e^-h − 1)·data, where α = 1 − σ makes the second factor 1 − σ_t/σ_s."""
    kept = _wide(there / here, x)
    return kept * x + (1 - kept) * data


def _log_snr(sigma: Tensor) -> Tensor:
    """λ = log((1 − σ)/σ)."""
    return torch.log1p(-sigma) - torch.log(sigma)


def _trend(before: tuple[Tensor, Tensor] | None, data: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """What the data prediction gains on average over a step, extrapolated from the one `before`: (data, sigma)."""
    if before is None:
        return torch.zeros_like(data)
    earlier, where = before
    share = (_log_snr(there) - _log_snr(here)) / (_log_snr(here) - _log_snr(where)) / 2
    return _wide(torch.where(share.isfinite(), share, 0), data) * (data - earlier)


def _correction(
    before: tuple[Tensor, Tensor] | None, data: Tensor, ahead: Tensor, here: Tensor, there: Tensor
) -> Tensor:
    """The same average once `ahead`, the data prediction at the step's end, is known: UniC's weights."""
    if before is None:
        return (ahead - data) / 2
    earlier, where = before
    h = _log_snr(there) - _log_snr(here)
    ratio = (_log_snr(where) - _log_snr(here)) / h
    b_h = torch.expm1(-h)
    phi_2 = b_h / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    # The weights ρ solve ρ₁ + ρ₂ = φ₂/B, r·ρ₁ + ρ₂ = 2φ₃/B.
    past = (phi_2 - 2 * phi_3) / b_h / (1 - ratio)
    coming = phi_2 / b_h - past
    return _wide(past / ratio, data) * (earlier - data) + _wide(coming, data) * (ahead - data)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, to be multiplied with a tensor of samples."""
    return rearrange(values, "b -> b 1 1 1").to(like.dtype)
