"""The transformer as the flow sees it: noised latents in, velocity out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.flow.loss import Denoise
from simpletuner.flux2.tokens import context_ids, image_ids, pack, unpack
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import Choice


class Denoiser:
    """Packs latents into tokens, gives them their positions, and unpacks the transformer's answer.

    Inputs are cast to the transformer's own type, the answer comes back in it. A model without a guidance
    embedder is not given guidance.
    """

    def __init__(self, transformer: Flux2Transformer) -> None:
        self.transformer = transformer

    def __call__(
        self,
        latents: Float[Tensor, "b 128 h w"],
        sigma: Float[Tensor, " b"],
        context: Float[Tensor, "b l d"],
        guidance: Float[Tensor, " b"],
        choices: Sequence[Choice] = (),
    ) -> Float[Tensor, "b 128 h w"]:
        height, width = latents.shape[-2:]
        device = latents.device
        dtype = self.transformer.dtype
        tokens = self.transformer(
            pack(latents).to(dtype),
            context.to(dtype),
            sigma,
            guidance if self.transformer.spec.guidance_embeds else None,
            image_ids(height, width).to(device),
            context_ids(context.shape[1]).to(device),
            [choice.to(device) for choice in choices],
        )
        return unpack(tokens, height, width)

    def routed(self, choices: Sequence[Choice]) -> Denoise:
        """Itself with `choices`, where something is learnt. What runs without gradients looks at what sampling would
        do, and sampling processes all tokens.
        """

        def denoise(latents: Tensor, sigma: Tensor, context: Tensor, guidance: Tensor) -> Tensor:
            return self(latents, sigma, context, guidance, choices if torch.is_grad_enabled() else ())

        return denoise
