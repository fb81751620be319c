"""The transformer as the flow sees it: noised latents in, velocity out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.flow.choice import Choice
from simpletuner.flow.condition import Condition, Denoise
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, unpack_latents
from simpletuner.flux2.transformer import Flux2Transformer


class Denoiser:
    """Packs latents into tokens, gives them their positions, and unpacks the transformer's answer.

    Inputs are cast to the transformer's dtype and the velocity is returned in it. A model without a guidance embedder
    ignores guidance.
    """

    def __init__(self, transformer: Flux2Transformer) -> None:
        self.transformer = transformer

    def __call__(
        self,
        latents: Float[Tensor, "b 128 h w"],
        sigma: Float[Tensor, " b"],
        condition: Condition,
        choices: Sequence[Choice] = (),
    ) -> Float[Tensor, "b 128 h w"]:
        height, width = latents.shape[-2:]
        device = latents.device
        dtype = self.transformer.dtype
        context = condition.context.expanded(dtype)
        tokens = self.transformer(
            pack_latents(latents).to(dtype),
            context,
            sigma,
            condition.guidance if self.transformer.spec.guidance_embeds else None,
            image_ids(height, width, device),
            context_ids(context.shape[1], device),
            [choice.to(device) for choice in choices],
        )
        return unpack_latents(tokens, height, width)

    def routed(self, choices: Sequence[Choice]) -> Denoise:
        """This denoiser with TREAD routing; active only while gradients are enabled, since sampling routes nothing."""

        def denoise(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            return self(latents, sigma, condition, choices if torch.is_grad_enabled() else ())

        return denoise
