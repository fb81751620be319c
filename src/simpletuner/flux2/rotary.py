"""Rotary positions: how far each pair of a head's channels is turned at each position."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

Rotary = tuple[Float[Tensor, "*tables positions half"], Float[Tensor, "*tables positions half"]]
"""Cosines and sines of the angle of each pair of channels, for each position; `half` is half a head's width."""


def rotary(position_ids: Int[Tensor, "*b n axes"], axes: tuple[int, ...], theta: float) -> Rotary:
    """Rotary angles of each position: axis by axis, `axes[i] / 2` frequencies theta^(-2k/axes[i]).

    Angles are made in fp64: at position 511 fp32 would be off by 2e-5.
    """
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=position_ids.device) / width
        angles.append(position_ids[..., axis, None].double() * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Float[Tensor, "b n heads d2"], angles: Rotary) -> Float[Tensor, "b n heads d2"]:
    """Turn each pair of neighboring channels by its angle, in fp32, and cast back."""
    cos, sin = (table[..., None, :] for table in angles)
    even, odd = rearrange(x.float(), "b n heads (d pair) -> pair b n heads d", pair=2)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
