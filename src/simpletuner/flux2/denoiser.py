"""`Denoiser`: the transformer as a function from noised latents to velocity."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition, Denoise, References, TextContext
from simpletuner.flux2.rotary import Rotary, rotary
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, unpack_latents
from simpletuner.flux2.transformer import Flux2Transformer, ReferenceAttention

CACHED_POSITIONS = 8
"""Number of image sizes whose positions a denoiser caches (least recently used are dropped). At 1024x1024 with contexts
of 512 tokens, each takes 2.5 MB of device memory."""


class TokenPositions(NamedTuple):
    """Positions of tokens, for the whole batch or per sample: ids, and rotary tables of text and image tokens."""

    image: Int64[Tensor, "*b n 4"]
    text: Int64[Tensor, "*b l 4"]
    angles: Rotary


def positions_of(
    axes: tuple[int, ...], theta: float, height: int, width: int, length: int, device: torch.device
) -> TokenPositions:
    """The positions of `height` × `width` image tokens and `length` text tokens, on `device`.

    They are ordinary tensors even under `torch.inference_mode`, so that training can reuse tables cached by sampling.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        image, text = image_ids(height, width, device), context_ids(length, device)
        return TokenPositions(image, text, rotary(torch.cat([text, image]), axes, theta))


class Denoiser:
    """Predicts the velocity of latents: packs them into tokens with positions, and unpacks the transformer's output.

    Inputs are cast to the transformer's dtype, which is also that of the velocity. A model without a guidance embedder
    ignores guidance. The velocity covers the latents only; references have none.

    Args:
        reference_attention: which tokens the reference tokens attend to. Sampling must use the value of training.
        forward: called in place of the transformer, with the same arguments; by default the transformer.
    """

    def __init__(
        self,
        transformer: Flux2Transformer,
        reference_attention: ReferenceView = "full",
        forward: Callable[..., Tensor] | None = None,
    ) -> None:
        self.transformer = transformer
        self.forward = transformer if forward is None else forward
        self.reference_attention = reference_attention
        positions_for = functools.partial(positions_of, transformer.spec.axes, transformer.spec.theta)
        self.positions = functools.lru_cache(CACHED_POSITIONS)(positions_for)

    def __call__(
        self,
        latents: Float[Tensor, "b 128 h w"],
        sigma: Float[Tensor, " b"],
        condition: Condition,
        choices: Sequence[TokenChoice] = (),
    ) -> Float[Tensor, "b 128 h w"]:
        height, width = latents.shape[-2:]
        dtype = self.transformer.dtype
        context = condition.context.expanded(dtype)
        positions = self.positions(height, width, context.shape[1], latents.device)
        tokens = pack_latents(latents).to(dtype)
        choices = [choice.to(latents.device) for choice in choices]
        attention = None
        if condition.references is not None:
            attention = self._attention(condition.references)
            choices = [_keeping_references(choice, tokens.shape[1], attention.length) for choice in choices]
            positions = self._with_references(positions, condition.references)
            tokens = torch.cat([tokens, condition.references.tokens.to(dtype)], dim=1)
        velocity = self.forward(
            tokens,
            context,
            sigma,
            condition.guidance if self.transformer.spec.guidance_embeds else None,
            positions.image,
            positions.text,
            choices,
            positions.angles,
            attention,
        )
        return unpack_latents(velocity, height, width)

    def _attention(self, references: References) -> ReferenceAttention:
        is_own = self.reference_attention == "own"
        return ReferenceAttention(references.tokens.shape[1], references.is_token, is_own)

    @torch.no_grad()
    def _with_references(self, positions: TokenPositions, references: References) -> TokenPositions:
        """`positions` as one table per sample, with those of its references appended."""
        spec, samples = self.transformer.spec, len(references.ids)
        tables = zip(positions.angles, rotary(references.ids, spec.axes, spec.theta), strict=True)
        cos, sin = (
            torch.cat([image_table.expand(samples, -1, -1), reference_table], dim=1)
            for image_table, reference_table in tables
        )
        image = torch.cat([positions.image.expand(samples, -1, -1), references.ids], dim=1)
        return TokenPositions(image, positions.text.expand(samples, -1, -1), (cos, sin))

    @torch.no_grad()
    def idle(self, device: torch.device) -> None:
        """Join the all-gathers of a sharded transformer while other ranks run a pass without gradients.

        This rank's pass has one text and one image token. The random state, used by dropout for example, is restored.
        """
        spec = self.transformer.spec
        context = TextContext.dense(torch.zeros(1, 1, spec.context_dim, device=device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self(
                torch.zeros(1, spec.in_channels, 1, 1, device=device),
                torch.zeros(1, device=device),
                Condition.at(context, 1.0),
            )

    def routed(self, choices: Sequence[TokenChoice]) -> Denoise:
        """This denoiser with TREAD routing, for training. Sampling calls the denoiser itself, without routing."""
        return functools.partial(self, choices=choices)


def _keeping_references(choice: TokenChoice, target: int, references: int) -> TokenChoice:
    """`choice`, made for `target` image tokens, extended to keep the `references` tokens that follow them."""
    indices = torch.arange(target, target + references, device=choice.kept_tokens.device)
    return replace(
        choice, kept_tokens=torch.cat([choice.kept_tokens, indices.expand(len(choice.kept_tokens), -1)], dim=1)
    )
