"""From visits to the tensors of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.data.cache.contexts import read_context
from simpletuner.data.cache.latents import read_latent
from simpletuner.data.cache.store import Store
from simpletuner.data.sample import Sample


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket with their prompts, on the CPU."""

    latents: Float[Tensor, "b 128 h w"]
    context: Float[Tensor, "b l d"]
    names: tuple[str, ...]
    """`set/name` of each picture, for messages."""


def caption_of(sample: Sample, seed: int, step: int, slot: int) -> str:
    """The prompt of this visit, drawn among the picture's captions by (seed, "caption", step, slot)."""
    return sample.captions[draw_seed(seed, "caption", step, slot) % len(sample.captions)]


def load_batch(
    samples: Sequence[Sample],
    prompts: Sequence[str],
    *,
    latent_store: Store,
    latent_encoder: str,
    context_store: Store,
    context_encoder: str,
) -> Batch:
    """Read one micro-batch from the caches.

    Args:
        samples: pictures of one set and one bucket.
        prompts: one for each picture, "" where the caption is dropped.
        latent_store, context_store: the caches of that set.
        latent_encoder, context_encoder: the fingerprints they were filled with.

    Raises:
        DataError: a cache file is missing or damaged.
    """
    latents = [read_latent(latent_store, sample, latent_encoder) for sample in samples]
    contexts = [read_context(context_store, prompt, context_encoder).full() for prompt in prompts]
    names = tuple(f"{sample.dataset}/{sample.name}" for sample in samples)
    return Batch(torch.stack(latents), torch.stack(contexts), names)
