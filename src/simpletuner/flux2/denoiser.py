"""The transformer as the flow sees it: noised latents in, velocity out."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.flow.choice import Choice
from simpletuner.flow.condition import Condition, Denoise
from simpletuner.flux2.rotary import Rotary, rotary
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, unpack_latents
from simpletuner.flux2.transformer import Flux2Transformer

KEPT_POSITIONS = 8
"""Sizes whose positions a denoiser keeps, the latest used ones: with contexts of 512 tokens 2.5 MB of the device at
1024x1024 each."""


class Positions(NamedTuple):
    """The positions of a sample's tokens: as ids, and as the rotary tables of text and image tokens together."""

    image: Int64[Tensor, "n 4"]
    text: Int64[Tensor, "l 4"]
    angles: Rotary


def positions_of(
    axes: tuple[int, ...], theta: float, height: int, width: int, length: int, device: torch.device
) -> Positions:
    """The positions of `height` × `width` image tokens and `length` text tokens, made on `device`.

    Ordinary tensors even under `torch.inference_mode`, so that what sampling has made can be kept for training.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        image, text = image_ids(height, width, device), context_ids(length, device)
        return Positions(image, text, rotary(torch.cat([text, image]), axes, theta))


class Denoiser:
    """Packs latents into tokens, gives them their positions, and unpacks the transformer's answer.

    Inputs are cast to the transformer's dtype and the velocity is returned in it. A model without a guidance embedder
    ignores guidance.
    """

    def __init__(self, transformer: Flux2Transformer) -> None:
        self.transformer = transformer
        make = functools.partial(positions_of, transformer.spec.axes, transformer.spec.theta)
        self.positions = functools.lru_cache(KEPT_POSITIONS)(make)

    def __call__(
        self,
        latents: Float[Tensor, "b 128 h w"],
        sigma: Float[Tensor, " b"],
        condition: Condition,
        choices: Sequence[Choice] = (),
    ) -> Float[Tensor, "b 128 h w"]:
        height, width = latents.shape[-2:]
        dtype = self.transformer.dtype
        context = condition.context.expanded(dtype)
        positions = self.positions(height, width, context.shape[1], latents.device)
        tokens = self.transformer(
            pack_latents(latents).to(dtype),
            context,
            sigma,
            condition.guidance if self.transformer.spec.guidance_embeds else None,
            positions.image,
            positions.text,
            [choice.to(latents.device) for choice in choices],
            positions.angles,
        )
        return unpack_latents(tokens, height, width)

    def routed(self, choices: Sequence[Choice]) -> Denoise:
        """This denoiser with TREAD routing; active only while gradients are enabled, since sampling routes nothing."""

        def denoise(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            return self(latents, sigma, condition, choices if torch.is_grad_enabled() else ())

        return denoise
