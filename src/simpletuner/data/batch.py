"""Batches: everything that a step needs to know of its samples, and the random draws made for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.data.cache.contexts import ContextCodec, read_context
from simpletuner.data.cache.latents import read_latent
from simpletuner.data.cache.store import Store
from simpletuner.data.sample import Crop, Sample
from simpletuner.flow.choice import Choice
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.rollout import RolloutStarts


@dataclass(frozen=True)
class Batch:
    """A micro-batch: samples of one bucket that go through the model together. It is built on the CPU, in fp32."""

    latents: Float[Tensor, "b 128 h w"]
    condition: Condition
    sigma: Float[Tensor, " b"]
    noise: Float[Tensor, "b 128 h w"]
    names: tuple[str, ...]
    """`set/name` of each sample, for messages."""
    weights: Float[Tensor, " b"]
    """Factor of each sample's loss, outside of its average."""
    slots: range
    """Places of the samples in the global batch; with the step they key the draws made inside the model."""
    rollout: RolloutStarts | None = None
    """Where the samples are rolled out from; None where none is."""
    rolls_elsewhere: bool = False
    """Whether any of the batches that the ranks train at the same time is rolled out, where there are several ranks."""
    choices: tuple[Choice, ...] = ()
    """What TREAD's routes keep of the image tokens in the pass with gradients."""
    masks: Float[Tensor, "b h w"] | None = None
    """Weight of each place of the latents in its sample's loss; None weighs all alike."""
    outside: Float[Tensor, "b h w"] | None = None
    """Weight, at each place, of the distance to the base model's own prediction: 1 − mask, before the floor. None where
    there is none.
    """
    is_regularization: bool = False
    """Whether the target is the base model's own prediction."""
    distills_elsewhere: bool = False
    """Whether that is so of any of the batches that the ranks train at the same time, where there are several ranks."""
    preserved: TextContext | None = None
    """Contexts whose predictions are held at the base model's; None where no sample of the batch takes part."""
    preserved_weights: Float[Tensor, " b"] | None = None
    """Weight of that loss for each sample: 0 where it takes no part."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `change` applied to each tensor."""
        return replace(
            self,
            latents=change(self.latents),
            condition=self.condition.mapped(change),
            sigma=change(self.sigma),
            noise=change(self.noise),
            weights=change(self.weights),
            rollout=None if self.rollout is None else self.rollout.mapped(change),
            choices=tuple(choice.mapped(change) for choice in self.choices),
            masks=None if self.masks is None else change(self.masks),
            outside=None if self.outside is None else change(self.outside),
            preserved=None if self.preserved is None else self.preserved.mapped(change),
            preserved_weights=None if self.preserved_weights is None else change(self.preserved_weights),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, from which an accelerator copies without blocking."""
        return self.mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`. Padding rows of the contexts are copied once and expanded there."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches that share one optimizer step, and the epoch of the first."""

    step: int
    epoch: int
    batches: tuple[Batch, ...]
    """Those of this process."""
    size: int
    """Samples, over all processes."""
    all_names: tuple[str, ...] | None = None
    """`set/name` of each of these, by its slot; None where this process has all of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """`set/name` of each sample, by its slot."""
        if self.all_names is not None:
            return self.all_names
        return tuple(name for batch in self.batches for name in batch.names)

    def pin_memory(self) -> "GlobalBatch":
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))


def caption_of(sample: Sample, seed: int, step: int, slot: int) -> str:
    """The prompt of this visit, drawn among the sample's captions by (seed, "caption", step, slot)."""
    return sample.captions[draw_seed(seed, "caption", step, slot) % len(sample.captions)]


def read_latents(store: Store, crops: Sequence[Crop], encoder: str) -> Float[Tensor, "b 128 h w"]:
    """The cached latents of crops of one set and one size.

    Raises:
        DataError: a cache file is missing or damaged.
    """
    return torch.stack([read_latent(store, crop, encoder) for crop in crops])


def read_contexts(store: Store, prompts: Sequence[str], codec: ContextCodec) -> TextContext:
    """The cached contexts of `prompts`, "" where the caption is dropped.

    Raises:
        DataError: a cache file is missing or damaged.
    """
    return TextContext.stacked([read_context(store, prompt, codec) for prompt in prompts])
