"""Batches: the samples' tensors that a step needs, with the random draws made for them."""

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
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.rollout import RolloutStarts


@dataclass(frozen=True)
class Batch:
    """A micro-batch: samples of one bucket for one forward pass. It is built on the CPU, in fp32."""

    latents: Float[Tensor, "b 128 h w"]
    condition: Condition
    sigma: Float[Tensor, " b"]
    noise: Float[Tensor, "b 128 h w"]
    names: tuple[str, ...]
    """`dataset/name` of each sample, for messages."""
    weights: Float[Tensor, " b"]
    """Factor applied to each sample's averaged loss."""
    slots: range
    """Positions of the samples in the global batch. With the step, they are the key of draws made inside the model."""
    rollout: RolloutStarts | None = None
    """Start points of the samples' rollouts; None if no sample is rolled out."""
    other_ranks_roll_out: bool = False
    """With several ranks: whether any rank's batch at the same position of the step is rolled out."""
    choices: tuple[TokenChoice, ...] = ()
    """The image tokens that TREAD's routes keep in the forward pass with gradients."""
    masks: Float[Tensor, "b h w"] | None = None
    """Loss weight of each latent position; None weighs all positions equally."""
    outside_masks: Float[Tensor, "b h w"] | None = None
    """Weight, at each latent position, of the distance to the base model's prediction: 1 − mask, before the floor. None
    if that distance is not part of the loss.
    """
    is_regularization: bool = False
    """Whether the target is the base model's prediction."""
    other_ranks_distill: bool = False
    """With several ranks: whether any rank's batch at the same position of the step has that target."""
    preserved: TextContext | None = None
    """Contexts whose predictions the loss also keeps close to the base model's; None if no sample has one."""
    preserved_weights: Float[Tensor, " b"] | None = None
    """Weight of that part of the loss for each sample: 0 for a sample without such a context."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Copy of the batch with `change` applied to each tensor."""
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
            outside_masks=None if self.outside_masks is None else change(self.outside_masks),
            preserved=None if self.preserved is None else self.preserved.mapped(change),
            preserved_weights=None if self.preserved_weights is None else change(self.preserved_weights),
        )

    def pin_memory(self) -> "Batch":
        """Copy of the batch in pinned memory, from which an accelerator copies without blocking."""
        return self.mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """Copy of the batch on `device`. Padding rows of the contexts are copied once and expanded on the device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step, and the epoch of the first."""

    step: int
    epoch: int
    batches: tuple[Batch, ...]
    """Micro-batches of this process."""
    size: int
    """Number of samples over all processes."""
    all_names: tuple[str, ...] | None = None
    """`dataset/name` of each sample of all processes, by slot; None if this process has all samples."""

    @property
    def names(self) -> tuple[str, ...]:
        """`dataset/name` of each sample, by slot."""
        if self.all_names is not None:
            return self.all_names
        return tuple(name for batch in self.batches for name in batch.names)

    def pin_memory(self) -> "GlobalBatch":
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))


def caption_of(sample: Sample, seed: int, step: int, slot: int) -> str:
    """The prompt of a sample in a step: one of its captions, drawn by (seed, "caption", step, slot)."""
    return sample.captions[draw_seed(seed, "caption", step, slot) % len(sample.captions)]


def read_latents(store: Store, crops: Sequence[Crop], encoder: str) -> Float[Tensor, "b 128 h w"]:
    """Read the cached latents of `crops`, which belong to one dataset and have one size.

    Raises:
        DataError: a cache file is missing or damaged.
    """
    return torch.stack([read_latent(store, crop, encoder) for crop in crops])


def read_contexts(store: Store, prompts: Sequence[str], codec: ContextCodec) -> TextContext:
    """Read the cached contexts of `prompts`; "" is the prompt of a dropped caption.

    Raises:
        DataError: a cache file is missing or damaged.
    """
    return TextContext.stacked([read_context(store, prompt, codec) for prompt in prompts])
