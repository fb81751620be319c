"""Loss masks: which samples of a step use their mask, and the loss weights that the options derive from it."""

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
"""The gray value of a mask at each latent, from 0 (black) to 1 (white), as cached."""


@dataclass(frozen=True)
class MaskEffects:
    """Effects of a batch's masks: loss weights, prior weights, and tokens that TREAD keeps. An effect that would change
    nothing is None.
    """

    weights: Float[Tensor, "b h w"] | None = None
    """Weight of each latent position in its sample's loss; None if all are 1, so that a mask of ones is bit-identical
    to no mask.
    """
    outside: Float[Tensor, "b h w"] | None = None
    """1 − mask, before the floor: the weight of `masked_loss_prior` at each position."""
    force_keep: Bool[Tensor, "b tokens"] | None = None
    """Tokens under a mask, which TREAD always keeps."""


@dataclass(frozen=True)
class Masking:
    """Masked training, configured by the options."""

    options: ConditioningOptions
    seed: int

    def used(self, masks: Sequence[CachedMask | None], step: int, slots: Sequence[int]) -> list[CachedMask | None]:
        """`masks` of the samples in `slots` of `step`, None for those that `masked_loss_probability` drops."""
        return [
            mask if self._draw(step, slot) < self.options.masked_loss_probability else None
            for mask, slot in zip(masks, slots, strict=True)
        ]

    def _draw(self, step: int, slot: int) -> float:
        return random.Random(draw_seed(self.seed, "mask", step, slot)).random()

    def effects(self, masks: Sequence[CachedMask | None], shape: tuple[int, int]) -> MaskEffects:
        """The effects of `masks`, a mask or None per sample, on latents of `shape` (h, w)."""
        ones = torch.ones(shape)
        inside = torch.stack([ones if mask is None else self.inside(mask) for mask in masks])
        if inside.eq(1).all():
            return MaskEffects()
        weights = self.weights(inside)
        force_keep = None
        if self.forces_tokens:
            force_keep = rearrange(torch.stack([kept_positions(each) for each in inside]), "b h w -> b (h w)")
        return MaskEffects(
            weights=None if weights.eq(1).all() else weights,
            outside=1 - inside if self.options.masked_loss_prior else None,
            force_keep=force_keep,
        )

    @property
    def forces_tokens(self) -> bool:
        """Whether TREAD keeps the tokens under masks: masks are used and give positions different weights."""
        return self.options.masked_loss_probability > 0 and self.options.masked_loss_floor < 1

    def inside(self, mask: CachedMask) -> Float[Tensor, "h w"]:
        """How much each position is under the mask, from 0 to 1."""
        return 1 - mask if self.options.masked_loss_invert else mask

    def weights(self, inside: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
        """The loss weight of each position: maps [0, 1] to [floor, 1]. Ones stay exactly 1, and without a floor all
        values stay bit-identical.
        """
        return torch.lerp(inside, torch.ones_like(inside), self.options.masked_loss_floor)


def kept_positions(inside: Float[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
    """The positions under a mask, which TREAD keeps; none if the mask is 1 everywhere, which is the same as no mask."""
    return (inside > 0) & ~inside.eq(1).all()
