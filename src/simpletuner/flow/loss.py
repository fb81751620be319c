"""The error of a predicted velocity, one number a sample. The caller averages over samples."""

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
"""(velocity error, sigma) → penalty of each element."""

HuberSchedule = Literal["snr", "exponential", "constant"]


def squared(error: Float[Tensor, "b c h w"], _sigma: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Plain mean squared error."""
    return error.square()


def huber_scale(sigma: Float[Tensor, " b"], c: float, schedule: HuberSchedule) -> Float[Tensor, " b"]:
    """Where the Huber losses turn from quadratic to linear, at each sigma (arXiv 2403.16728, §4).

    constant: c. exponential: c^σ, 1 at the data and c at the noise. snr: (1 − c)/(1 + σ/(1−σ))² + c, where σ/(1−σ)
    is the flow's ratio of noise to data; that is (1 − c)(1 − σ)² + c.
    """
    if schedule == "constant":
        return torch.full_like(sigma, c)
    if schedule == "exponential":
        return c**sigma
    return (1 - c) * (1 - sigma).square() + c


def charbonnier(error: Tensor, scale: Tensor) -> Tensor:
    """2·(√(e² + c²) − c), written so that small errors do not cancel."""
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
    """The loss of each sample: the mean of its penalties, or Σw·p/Σw with a `weight` of each place of its latent.

    A weight of ones gives the plain mean up to rounding. One that is zero everywhere gives a loss that is not a number.
    """
    if weight is None:
        return reduce(penalties, "b c h w -> b", "mean")
    weighted = reduce(rearrange(weight, "b h w -> b 1 h w") * penalties, "b c h w -> b", "sum")
    return weighted / (reduce(weight, "b h w -> b", "sum") * penalties.shape[1])


@dataclass(frozen=True)
class Prior:
    """A second target: the base model's own prediction at the same input, where a mask leaves the image out."""

    target: Float[Tensor, "b c h w"]
    """Without gradient, fp32."""
    weight: Float[Tensor, "b h w"]
    """Weight of each place: 0 inside the mask."""

    def loss(
        self, prediction: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], penalty: Penalty
    ) -> Float[Tensor, " b"]:
        """The mean over all places of weight · penalty, of each sample: it grows with the area that is left out."""
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
    """Loss of each sample, fp32: `penalty` of the velocity error, averaged over its latent (by `weight` if given), and
    that of `prior`.
    """
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
    """Loss of each sample, fp32, with another model's prediction at the same `x` as `target`: the mean penalty."""
    return averaged(penalty(denoise(x, sigma, condition).float() - target, sigma))
