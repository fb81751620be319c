"""The error of a predicted velocity, one number a sample. The caller averages."""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from simpletuner.flow.path import noised, velocity

Denoise = Callable[
    [Float[Tensor, "b c h w"], Float[Tensor, " b"], Float[Tensor, "b l d"], Float[Tensor, " b"]],
    Float[Tensor, "b c h w"],
]
"""(noised latents, sigma, context, guidance) → velocity."""

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


def flow_loss(
    denoise: Denoise,
    latents: Float[Tensor, "b c h w"],
    context: Float[Tensor, "b l d"],
    *,
    sigma: Float[Tensor, " b"],
    guidance: Float[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    penalty: Penalty = squared,
) -> Float[Tensor, " b"]:
    """Error of the predicted velocity of each sample, averaged over its latent, in fp32. Randomness is the caller's."""
    prediction = denoise(noised(latents, noise, sigma), sigma, context, guidance)
    error = prediction.float() - velocity(latents, noise)
    return reduce(penalty(error, sigma), "b c h w -> b", "mean")
