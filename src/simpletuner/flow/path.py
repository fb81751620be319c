"""The straight path from data to noise, and its velocity."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def noised(
    latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The point at `sigma` on the way: (1 − σ)·latents + σ·noise. 0 is data, 1 is noise."""
    share = rearrange(sigma, "b -> b 1 1 1")
    return (1 - share) * latents + share * noise


def velocity(latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """What the model learns to predict: d(noised)/dσ = noise − latents."""
    return noise - latents
