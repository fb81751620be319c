"""Rotary position embedding: tables of each position's angles, and the rotation of queries and keys."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

Rotary = tuple[Float[Tensor, "*tables positions half"], Float[Tensor, "*tables positions half"]]
"""Cosines and sines of the rotation angles, for each position and channel pair; `half` is half a head's width."""


def rotary(position_ids: Int[Tensor, "*b n axes"], axes: tuple[int, ...], theta: float) -> Rotary:
    """Rotary tables of each position: for each axis in order, `axes[i] / 2` frequencies theta^(-2k/axes[i]).

    Angles are computed in fp64: at position 511 fp32 would be off by 2e-5.
    """
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=position_ids.device) / width
        angles.append(position_ids[..., axis, None].double() * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Float[Tensor, "b n heads d2"], angles: Rotary) -> Float[Tensor, "b n heads d2"]:
    """Rotate each pair of adjacent channels by its angle, in fp32, and cast the result back to the dtype of `x`."""
    cos, sin = (table[..., None, :] for table in angles)
    even, odd = rearrange(x.float(), "b n heads (d pair) -> pair b n heads d", pair=2)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
