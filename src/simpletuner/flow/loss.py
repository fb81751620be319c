"""Losses of a predicted velocity, one number per sample. The caller averages over samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from simpletuner.flow.condition import Condition, Denoise
from simpletuner.flow.path import noised, velocity

Penalty = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"]], Float[Tensor, "b c h w"]]
"""(velocity error, sigma) → penalty per element."""

HuberSchedule = Literal["snr", "exponential", "constant"]


def squared(error: Float[Tensor, "b c h w"], _sigma: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """The squared error."""
    return error.square()


def huber_scale(sigma: Float[Tensor, " b"], c: float, schedule: HuberSchedule) -> Float[Tensor, " b"]:
    """The error size at which the Huber losses change from quadratic to linear, for each sigma (arXiv 2403.16728, §4).

    constant: c. exponential: c^σ, which is 1 for data and c for noise. snr: (1 − c)/(1 + σ/(1−σ))² + c, where σ/(1−σ)
    is the flow's ratio of noise to data; that is (1 − c)(1 − σ)² + c.
    """
    if schedule == "constant":
        return torch.full_like(sigma, c)
    if schedule == "exponential":
        return c**sigma
    return (1 - c) * (1 - sigma).square() + c


def charbonnier(error: Tensor, scale: Tensor) -> Tensor:
    """2·(√(e² + c²) − c) for error e and scale c, in a form without cancellation for small errors."""
    return 2 * error.square() / ((error.square() + scale.square()).sqrt() + scale)


def huber(c: float, schedule: HuberSchedule) -> Penalty:
    """Pseudo-Huber, 2c·(√(e² + c²) − c): e² for small errors, 2c·|e| for large ones."""

    def penalty(error: Tensor, sigma: Tensor) -> Tensor:
        scale = rearrange(huber_scale(sigma, c, schedule), "b -> b 1 1 1")
        return scale * charbonnier(error, scale)

    return penalty


def smooth_l1(c: float, schedule: HuberSchedule) -> Penalty:
    """2·(√(e² + c²) − c): e²/c for small errors, 2·|e| for large ones."""

    def penalty(error: Tensor, sigma: Tensor) -> Tensor:
        scale = rearrange(huber_scale(sigma, c, schedule), "b -> b 1 1 1")
        return charbonnier(error, scale)

    return penalty


def averaged(penalties: Float[Tensor, "b c h w"], weight: Float[Tensor, "b h w"] | None = None) -> Float[Tensor, " b"]:
    """The loss of each sample: the mean of its penalties, or Σw·p/Σw with a `weight` for each position of its latent.

    A weight of ones gives the plain mean up to rounding. A weight of zeros gives NaN.
    """
    if weight is None:
        return reduce(penalties, "b c h w -> b", "mean")
    weighted = reduce(rearrange(weight, "b h w -> b 1 h w") * penalties, "b c h w -> b", "sum")
    return weighted / (reduce(weight, "b h w -> b", "sum") * penalties.shape[1])


@dataclass(frozen=True)
class Prior:
    """A second target outside a mask: the base model's own prediction at the same input."""

    target: Float[Tensor, "b c h w"]
    """The base model's prediction, fp32, without gradient."""
    weight: Float[Tensor, "b h w"]
    """Weight of each position: 0 inside the mask."""

    def loss(
        self, prediction: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], penalty: Penalty
    ) -> Float[Tensor, " b"]:
        """Mean of weight · penalty over all positions, for each sample. It grows with the area outside the mask."""
        penalties = penalty(prediction - self.target, sigma)
        return reduce(rearrange(self.weight, "b h w -> b 1 h w") * penalties, "b c h w -> b", "mean")


def flow_loss(
    denoise: Denoise,
    clean: Float[Tensor, "b c h w"],
    condition: Condition,
    *,
    sigma: Float[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    penalty: Penalty = squared,
    weight: Float[Tensor, "b h w"] | None = None,
    prior: Prior | None = None,
) -> Float[Tensor, " b"]:
    """Loss of each sample, fp32: mean `penalty` of the velocity error, weighted by `weight`, plus `prior.loss`."""
    prediction = denoise(noised(clean, noise, sigma), sigma, condition).float()
    losses = averaged(penalty(prediction - velocity(clean, noise), sigma), weight)
    return losses if prior is None else losses + prior.loss(prediction, sigma, penalty)


def distillation_loss(
    denoise: Denoise,
    x: Float[Tensor, "b c h w"],
    condition: Condition,
    *,
    sigma: Float[Tensor, " b"],
    target: Float[Tensor, "b c h w"],
    penalty: Penalty = squared,
) -> Float[Tensor, " b"]:
    """Loss of each sample, fp32: the mean penalty against `target`, another model's prediction at the same `x`."""
    return averaged(penalty(denoise(x, sigma, condition).float() - target, sigma))
