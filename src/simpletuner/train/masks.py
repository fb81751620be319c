"""Masks of the loss: whose mask is used at a step, and what the options make of its weights."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.config.options.conditioning import ConditioningOptions

CachedMask = Float[Tensor, "h w"]
"""The gray of a mask at each latent, 0 black to 1 white, as it is cached."""


@dataclass(frozen=True)
class MaskEffects:
    """What the masks of a batch change: loss weights, the prior's weights, and the tokens that TREAD keeps. Each is
    None where it would change nothing.
    """

    weights: Float[Tensor, "b h w"] | None = None
    """Weight of each place in its sample's loss; None where all are 1: a mask of ones gives the bits of none."""
    outside: Float[Tensor, "b h w"] | None = None
    """1 − mask, before the floor: the weight of `masked_loss_prior` at each place."""
    force_keep: Bool[Tensor, "b tokens"] | None = None
    """The tokens under a mask, which TREAD keeps."""


@dataclass(frozen=True)
class Masking:
    """Masked training as the options describe it."""

    options: ConditioningOptions
    seed: int

    def used(self, masks: Sequence[CachedMask | None], step: int, slots: Sequence[int]) -> list[CachedMask | None]:
        """`masks` of the samples in `slots` of `step`, None where `masked_loss_probability` leaves one out."""
        return [
            mask if self._draw(step, slot) < self.options.masked_loss_probability else None
            for mask, slot in zip(masks, slots, strict=True)
        ]

    def _draw(self, step: int, slot: int) -> float:
        return random.Random(draw_seed(self.seed, "mask", step, slot)).random()

    def effects(self, masks: Sequence[CachedMask | None], shape: tuple[int, int]) -> MaskEffects:
        """What `masks`, one a sample or None, act on in latents of `shape` (h, w)."""
        ones = torch.ones(shape)
        inside = torch.stack([ones if mask is None else self.inside(mask) for mask in masks])
        if inside.eq(1).all():
            return MaskEffects()
        weights = self.weights(inside)
        force_keep = None
        if self.forces_tokens:
            force_keep = rearrange(torch.stack([forced_places(each) for each in inside]), "b h w -> b (h w)")
        return MaskEffects(
            weights=None if weights.eq(1).all() else weights,
            outside=1 - inside if self.options.masked_loss_prior else None,
            force_keep=force_keep,
        )

    @property
    def forces_tokens(self) -> bool:
        """Whether TREAD keeps the tokens under masks: where masks are used, and weigh some places less than others."""
        return self.options.masked_loss_probability > 0 and self.options.masked_loss_floor < 1

    def inside(self, mask: CachedMask) -> Float[Tensor, "h w"]:
        """How far each place is under the mask, 0 to 1."""
        return 1 - mask if self.options.masked_loss_invert else mask

    def weights(self, inside: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
        """The weight of each place: [0, 1] is mapped to [floor, 1]. A place of 1 stays 1, bit for bit, and without a
        floor every place stays as it is.
        """
        return torch.lerp(inside, torch.ones_like(inside), self.options.masked_loss_floor)


def forced_places(inside: Float[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
    """The places that TREAD keeps for a mask: those under it; none where it covers all, as for an image without."""
    return (inside > 0) & ~inside.eq(1).all()
