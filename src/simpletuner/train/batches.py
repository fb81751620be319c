"""Build the global batch of a step from the caches: samples, captions and random draws."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.config.datasets import ImageSet
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch, caption_of
from simpletuner.data.order import MicroBatch, Order
from simpletuner.data.preserved import BLANK, PreservedPrompts
from simpletuner.data.sample import Sample
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import reference_tokens
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory.world import World
from simpletuner.train.caches import UNCONDITIONAL_CAPTION, PreparedData
from simpletuner.train.masks import MaskEffects, Masking
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective

HELD_OUT_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Sigmas of the held-out loss, evenly spaced. They are fixed, so that losses compare between steps and runs."""
HELD_OUT_SEED = 0
"""Seed of the held-out noise, independent of the run's seed, so that losses of runs with different seeds compare."""


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batches from the caches. The result depends on the step alone, so a resumed run trains on the same
    batches.
    """

    config: RunConfig
    prepared: PreparedData
    order: Order
    objective: Objective
    rollout: Rollout | None
    batches_per_step: int
    """Micro-batches per global batch, over all processes."""
    world: World
    routes: Sequence[Route] = ()
    """The routes of TREAD."""

    def __call__(self, step: int) -> GlobalBatch:
        """The global batch of `step`, counted from 1, with the micro-batches that this process trains on.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        batches: list[Batch] = []
        names: list[str] = []
        slot_ranges: list[range] = []
        is_distilled: list[bool] = []
        first = (step - 1) * self.batches_per_step
        for index in range(self.batches_per_step):
            _, micro_batch = self.order.micro_batch(first + index)
            if index % self.world.size == self.world.rank:
                batches.append(self.batch(micro_batch, step, len(names)))
            slot_ranges.append(range(len(names), len(names) + len(micro_batch.visits)))
            is_distilled.append(self._set_of(micro_batch).is_regularisation_data)
            names += names_of(self._samples(micro_batch))
        if not self.world.is_alone:
            # The ranks train on the micro-batches of a round at the same time.
            rounds = [range(start, start + self.world.size) for start in range(0, len(slot_ranges), self.world.size)]
            batches = [
                replace(
                    batch,
                    other_ranks_roll_out=any(
                        self._has_rollouts(step, slot_ranges[index])
                        for index in round_indices
                        if not is_distilled[index]
                    ),
                    other_ranks_distill=any(is_distilled[index] for index in round_indices),
                )
                for batch, round_indices in zip(batches, rounds, strict=True)
            ]
        epoch, _ = self.order.micro_batch(first)
        return GlobalBatch(step, epoch, tuple(batches), len(names), tuple(names))

    def trial(self, micro_batch: MicroBatch) -> GlobalBatch:
        """A global batch of only `micro_batch`, as step 0, which belongs to no epoch."""
        batch = self.batch(micro_batch, 0, 0)
        return GlobalBatch(0, 0, (batch,), len(batch.names))

    def batch(self, micro_batch: MicroBatch, step: int, first_slot: int) -> Batch:
        """The batch of `micro_batch`. Captions and draws are keyed by `step` and the samples' slots in the global
        batch.
        """
        image_set = self._set_of(micro_batch)
        samples = self._samples(micro_batch)
        slots = range(first_slot, first_slot + len(samples))
        prompts = [self._prompt(sample, step, slot) for sample, slot in zip(samples, slots, strict=True)]
        latents = self.prepared.latents(image_set, samples)
        channels, height, width = latents.shape[1:]
        mask_effects = self._mask_effects(image_set, samples, step, slots, (height, width))
        draws = self.objective.draw(step, slots, (channels, height, width), image_set.timestep_sampling_offset)
        is_regularization = image_set.is_regularisation_data
        rollout = None if is_regularization else self.rollout
        preserved, preserved_weights = self._preserved(image_set, prompts)
        return Batch(
            latents=latents,
            condition=Condition(
                self.prepared.contexts(prompts, image_set),
                draws.guidance,
                self._references(
                    [
                        self._with_reference_dropout(sample, step, slot)
                        for sample, slot in zip(samples, slots, strict=True)
                    ]
                ),
            ),
            sigma=draws.sigma,
            noise=draws.noise,
            names=names_of(samples),
            weights=torch.full((len(samples),), image_set.loss_weight),
            slots=slots,
            rollout=None if rollout is None else rollout.starts(step, slots, draws.sigma),
            is_regularization=is_regularization,
            preserved=preserved,
            preserved_weights=preserved_weights,
            choices=draw_choices(self.routes, self.config.seed, step, slots, height * width, mask_effects.force_keep),
            masks=mask_effects.weights,
            outside_masks=mask_effects.outside,
        )

    def _mask_effects(
        self, image_set: ImageSet, samples: Sequence[Sample], step: int, slots: range, shape: tuple[int, int]
    ) -> MaskEffects:
        if image_set.is_regularisation_data:  # the base model's prediction is the target everywhere
            return MaskEffects()
        masking = Masking(self.config, self.config.seed)
        return masking.effects(masking.used(self.prepared.masks(samples), step, slots), shape)

    def _preserved(
        self, image_set: ImageSet, prompts: Sequence[str]
    ) -> tuple[TextContext, Float[Tensor, " b"]] | tuple[None, None]:
        """The contexts for which the option `preservation` keeps the base model's predictions, one for each of
        `prompts`, and each sample's weight. A sample without such a context gets that of the empty prompt and weight 0.
        (None, None) if no sample has one.
        """
        preserved = [PreservedPrompts(self.config).of(image_set, prompt) for prompt in prompts]
        if all(prompt is None for prompt in preserved):
            return None, None
        weights = [0.0 if prompt is None else self.config.preservation_weight for prompt in preserved]
        return self.prepared.contexts([prompt or BLANK for prompt in preserved], image_set), torch.tensor(weights)

    def _has_rollouts(self, step: int, slots: range) -> bool:
        return self.rollout is not None and any(self.rollout.lengths(step, slots))

    def _set_of(self, micro_batch: MicroBatch) -> ImageSet:
        return self.prepared.train[micro_batch.visits[0].set_index].image_set

    def _samples(self, micro_batch: MicroBatch) -> list[Sample]:
        manifest = self.prepared.train[micro_batch.visits[0].set_index]
        return [manifest.samples[visit.sample_index] for visit in micro_batch.visits]

    def held_out(self, image_set: ImageSet, sample: Sample) -> dict[float, Batch]:
        """A held-out sample with its first caption and fixed noise: by sigma, a batch for each of `HELD_OUT_SIGMAS`."""
        latents = self.prepared.latents(image_set, [sample])
        names = names_of([sample])
        height, width = latents.shape[2:]
        mask_effects = Masking(self.config, self.config.seed).effects(self.prepared.masks([sample]), (height, width))
        low, high = self.objective.guidance
        context = self.prepared.contexts([sample.captions[0]], image_set)
        condition = Condition.at(context, (low + high) / 2, self._references([sample]))
        batches = {}
        for sigma in HELD_OUT_SIGMAS:
            seed = draw_seed(HELD_OUT_SEED, "eval", names[0], str(sigma))
            batches[sigma] = Batch(
                latents=latents,
                condition=condition,
                sigma=torch.tensor([sigma]),
                noise=torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)),
                names=names,
                weights=torch.ones(1),
                slots=range(1),
                masks=mask_effects.weights,
            )
        return batches

    def _references(self, samples: Sequence[Sample]) -> References | None:
        """The references of `samples`, padded to the longest; None if no sample has any."""
        tokens = [reference_tokens(images) if images else None for images in self.prepared.references(samples)]
        return References.stacked(tokens, [1] * len(tokens))

    def _with_reference_dropout(self, sample: Sample, step: int, slot: int) -> Sample:
        """`sample`, without its references if they are dropped for this step and slot. A trial, step 0, drops none."""
        probability = self.config.reference_dropout_probability
        if not sample.references or not probability or step == 0:
            return sample
        draw = random.Random(draw_seed(self.config.seed, "reference_dropout", step, slot)).random()
        return replace(sample, references=()) if draw < probability else sample

    def _prompt(self, sample: Sample, step: int, slot: int) -> str:
        draw = random.Random(draw_seed(self.config.seed, "dropout", step, slot)).random()
        if draw < self.config.caption_dropout_probability:
            return UNCONDITIONAL_CAPTION
        return caption_of(sample, self.config.seed, step, slot)


def names_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """`dataset/name` of each sample."""
    return tuple(f"{sample.dataset}/{sample.name}" for sample in samples)
