"""Convert latents between a grid and a sequence of tokens, and compute the positions of tokens."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.flow.condition import References

PIXELS_PER_TOKEN = 16
"""Side in pixels of the square that one image token covers: 8 from the autoencoder times 2 from `patchify`."""

REFERENCE_STRIDE = 10
"""Distance on the axis t between successive references, and between the target and the first reference."""


def patchify(latents: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b c4 h w"]:
    """Move each 2×2 square of the autoencoder's grid into channels; the channel index is c·4 + row·2 + column."""
    return rearrange(latents, "b c (h row) (w column) -> b (c row column) h w", row=2, column=2)


def unpatchify(latents: Float[Tensor, "b c4 h w"]) -> Float[Tensor, "b c h2 w2"]:
    """The inverse of `patchify`."""
    return rearrange(latents, "b (c row column) h w -> b c (h row) (w column)", row=2, column=2)


def pack_latents(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Flatten the grid to a sequence, row by row."""
    return rearrange(latents, "b c h w -> b (h w) c")


def unpack_latents(tokens: Float[Tensor, "b n c"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `pack_latents`; `height` and `width` are those of the grid, in tokens."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Int64[Tensor, "n 4"]:
    """Positions (t, h, w, l) of the target image's tokens, in the order of `pack_latents`: (0, row, column, 0)."""
    ids = torch.zeros(height, width, 4, dtype=torch.int64, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return rearrange(ids, "h w position -> (h w) position")


def reference_ids(index: int, height: int, width: int, device: torch.device | str = "cpu") -> Int64[Tensor, "n 4"]:
    """Positions (t, h, w, l) of the tokens of reference `index`, from 0: (10 + 10·index, row, column, 0).

    Source: black-forest-labs/flux2, `src/flux2/sampling.py`.
    """
    ids = image_ids(height, width, device)
    ids[:, 0] = REFERENCE_STRIDE * (index + 1)
    return ids


def reference_tokens(images: Sequence[Float[Tensor, "c _h _w"]]) -> References:
    """The references of one sample, from their clean latents, in the same order."""
    tokens = [pack_latents(image[None])[0] for image in images]
    ids = [reference_ids(index, *image.shape[1:]) for index, image in enumerate(images)]
    return References(torch.cat(tokens)[None], torch.cat(ids)[None])


def context_ids(length: int, device: torch.device | str = "cpu") -> Int64[Tensor, "l 4"]:
    """Positions (t, h, w, l) of the text tokens: (0, 0, 0, index)."""
    ids = torch.zeros(length, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids
