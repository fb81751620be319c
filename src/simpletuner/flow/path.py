"""The straight path from data to noise and its velocity."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def noised(
    clean: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Latents at `sigma` on the path from data (σ = 0) to noise (σ = 1): (1 − σ)·clean + σ·noise."""
    share = rearrange(sigma, "b -> b 1 1 1")
    return (1 - share) * clean + share * noise


def velocity(clean: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The training target: d(noised)/dσ = noise − clean."""
    return noise - clean
