"""What the embedded model, or what was trained on it, draws for many scenes at once, and how much of it is right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from simpletuner.config.options.model import ModelOptions
from simpletuner.examples.world import SIDE
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.generate import Decode, Denoise, initial_noise, picture, sample_latents
from simpletuner.flux2.load import load_autoencoder, load_text_encoder, load_transformer
from simpletuner.flux2.source import locate
from simpletuner.flux2.spec import FLAVOURS
from simpletuner.flux2.text import TextEncoder
from simpletuner.flux2.transformer import Flux2Transformer

BATCH = 25
"""Pictures that are drawn at a time: on a CPU a batch takes a third of the time of its pictures one by one."""


@dataclass(frozen=True)
class Candidate:
    """The parts of a model that draws, resident on the CPU."""

    transformer: Flux2Transformer
    decode: Decode
    text_encoder: TextEncoder

    @classmethod
    def load(cls, options: ModelOptions, dtype: torch.dtype = torch.float32) -> "Candidate":
        """The model that `options` name, as `dtype`.

        Raises:
            AccessError: it is not there, or not a FLUX.2.
        """
        source = locate(options, report=lambda text: None)
        encoder = load_text_encoder(
            source, dtype, "cpu", layers=source.text_layers, max_length=source.text_length, fix_regex=False
        )
        decode = load_autoencoder(source, torch.float32, "cpu").decode
        return cls(load_transformer(source, dtype, "cpu"), decode, encoder)

    def draw(self, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
        """A picture of each prompt, 128x128, with the flavour's steps and guidance; the i-th from the noise of
        `seed` + i.
        """
        batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        encoded = [context for batch in self.text_encoder.encode_batches(batches) for context in batch]
        contexts = torch.stack([context.full() for context in encoded])
        return draw(Denoiser(self.transformer), self.decode, contexts, seed)


@torch.no_grad()
def draw(denoise: Denoise, decode: Decode, contexts: Float[Tensor, "n l d"], seed: int) -> list[Image.Image]:
    """A picture of each context, the i-th from the noise of `seed` + i. The transformer is in eval mode."""
    flavour = FLAVOURS["tiny"]
    pictures = []
    for start in range(0, len(contexts), BATCH):
        part = contexts[start : start + BATCH]
        noise = torch.cat([initial_noise(seed + start + i, width=SIDE, height=SIDE) for i in range(len(part))])
        latents = sample_latents(denoise, noise, part, steps=flavour.steps, guidance=flavour.guidance)
        pictures += [picture(pixels) for pixels in decode(latents)]
    return pictures
