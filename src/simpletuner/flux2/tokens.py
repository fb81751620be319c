"""Latents as a grid and as a sequence of tokens, and where each token is."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.flow.condition import References

PIXELS_PER_TOKEN = 16
"""Side of the square of pixels that one image token stands for: 8 by the autoencoder, 2 by `patchify`."""

REFERENCE_STRIDE = 10
"""How far apart references are on the axis t, and the first from the target."""


def patchify(moments: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b c4 h w"]:
    """Each 2×2 square of the autoencoder's grid as channels: channel index is c·4 + row·2 + column."""
    return rearrange(moments, "b c (h row) (w column) -> b (c row column) h w", row=2, column=2)


def unpatchify(latents: Float[Tensor, "b c4 h w"]) -> Float[Tensor, "b c h2 w2"]:
    """The inverse of `patchify`."""
    return rearrange(latents, "b (c row column) h w -> b c (h row) (w column)", row=2, column=2)


def pack_latents(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """The grid as a sequence, row after row."""
    return rearrange(latents, "b c h w -> b (h w) c")


def unpack_latents(tokens: Float[Tensor, "b n c"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `pack_latents`; `height` and `width` of the grid, in tokens."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Int64[Tensor, "n 4"]:
    """Positions (t, h, w, l) of the target picture's tokens, in the order of `pack_latents`: (0, row, column, 0)."""
    ids = torch.zeros(height, width, 4, dtype=torch.int64, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return rearrange(ids, "h w position -> (h w) position")


def reference_ids(index: int, height: int, width: int, device: torch.device | str = "cpu") -> Int64[Tensor, "n 4"]:
    """Positions (t, h, w, l) of the tokens of a reference, the first of which has index 0: (10 + 10·index, row, column,
    0).

    Source: black-forest-labs/flux2, `src/flux2/sampling.py`.
    """
    ids = image_ids(height, width, device)
    ids[:, 0] = REFERENCE_STRIDE * (index + 1)
    return ids


def reference_tokens(images: Sequence[Float[Tensor, "c _h _w"]]) -> References:
    """The references of one sample, from the clean latents of each, in their order."""
    tokens = [pack_latents(image[None])[0] for image in images]
    ids = [reference_ids(index, *image.shape[1:]) for index, image in enumerate(images)]
    return References(torch.cat(tokens)[None], torch.cat(ids)[None])


def context_ids(length: int, device: torch.device | str = "cpu") -> Int64[Tensor, "l 4"]:
    """Positions (t, h, w, l) of the text's tokens: (0, 0, 0, index)."""
    ids = torch.zeros(length, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids
