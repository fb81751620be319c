"""Which samples of a step are rolled out, how far, and their loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.data.batch import Batch
from simpletuner.flow.condition import Denoise
from simpletuner.flow.loss import Penalty, Prior, flow_loss
from simpletuner.flow.path import noised
from simpletuner.flow.rollout import SOLVERS, Reflex, RolloutStarts, Solver, rolled_out, rollout_loss

PARTS = 1000
"""A length of 1 is this part of the path."""


@dataclass(frozen=True)
class RolloutInputs:
    """The noisy latents that a batch is trained on. Without gradient."""

    x: Float[Tensor, "b c h w"]
    """The latents at each sample's sigma: rolled out, or plainly noised."""
    unrolled: Float[Tensor, "b c h w"] | None = None
    """The prediction at the plainly noised latents, where ReflexFlow asks for it."""


@dataclass(frozen=True)
class Rollout:
    """Scheduled sampling as the options describe it."""

    seed: int
    options: RolloutOptions
    idle: Callable[[], None] | None = None
    """Where given, the model is sharded: all ranks must call it equally often. This takes part in one call without
    gradient that other ranks make.
    """

    @classmethod
    def of(cls, options: RolloutOptions, seed: int, idle: Callable[[], None] | None = None) -> "Rollout | None":
        """None where the options ask for none."""
        return cls(seed, options, idle) if options.scheduled_sampling_max_step_offset else None

    @property
    def solver(self) -> Solver:
        return SOLVERS[self.options.scheduled_sampling_sampler]

    @property
    def steps(self) -> int:
        """Solver steps of a rollout, whatever its length."""
        return self.solver.steps(self.options.scheduled_sampling_max_step_offset / PARTS)

    @property
    def reflex(self) -> Reflex:
        options = self.options
        if not options.has_reflexflow:
            return Reflex()
        return Reflex(
            alpha=options.scheduled_sampling_reflexflow_alpha,
            beta1=options.scheduled_sampling_reflexflow_beta1,
            beta2=options.scheduled_sampling_reflexflow_beta2,
        )

    @property
    def calls(self) -> int:
        """Model calls without gradient for a batch in which a sample is rolled out."""
        return self._walked + (1 if self.reflex.alpha else 0)

    @property
    def _walked(self) -> int:
        """Those of them that integrate."""
        return self.steps * self.solver.calls_a_step

    def probability(self, step: int) -> float:
        """Share of the samples of `step` that draw a length."""
        options = self.options
        if not options.scheduled_sampling_ramp_steps:
            return options.scheduled_sampling_probability
        done = (step - options.scheduled_sampling_start_step) / options.scheduled_sampling_ramp_steps
        done = min(max(done, 0.0), 1.0)
        if options.scheduled_sampling_ramp_shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        first, last = options.scheduled_sampling_prob_start, options.scheduled_sampling_prob_end
        return first + (last - first) * done

    def lengths(self, step: int, slots: Sequence[int]) -> tuple[int, ...]:
        """How far the samples in `slots` of `step` are rolled out, in thousandths of the path."""
        return tuple(self._length(step, slot) for slot in slots)

    def _length(self, step: int, slot: int) -> int:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, "rollout", step, slot))
        whether, far = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        if whether >= self.probability(step):
            return 0
        longest = self.options.scheduled_sampling_max_step_offset
        strategy = self.options.scheduled_sampling_strategy
        # The square of an even draw has the density 1/(2√u): half of the draws lie in the first quarter.
        length = int((far if strategy == "uniform" else far**2) * (longest + 1))
        return longest - length if strategy == "biased_late" else length

    def starts(self, step: int, slots: Sequence[int], sigma: Float[Tensor, " b"]) -> RolloutStarts | None:
        """Where the samples in `slots` of `step`, to be trained at `sigma`, are rolled out from. None where all have
        the length 0. On the CPU.
        """
        return starts_of(self.lengths(step, slots), sigma)

    def calls_of(self, batch: Batch) -> int:
        """Model calls without gradient for `batch`."""
        return 0 if batch.rollout is None else self.calls

    def sampled(self, batch: Batch) -> tuple[int, int]:
        """Samples in those of the calls that integrate, one that is in several counted several times; and in the one
        that makes the unrolled prediction.
        """
        if batch.rollout is None:
            return 0, 0
        return len(batch.rollout.rolled) * self._walked, len(batch.latents) if self.reflex.alpha else 0

    def inputs(self, denoise: Denoise, batch: Batch, *, sample: Denoise) -> "RolloutInputs":
        """The inputs of `losses`: rolled-out latents where a sample's length is not 0, plainly noised ones elsewhere.

        Args:
            denoise: the denoiser of the pass with gradients, which may be routed. It makes the unrolled prediction, so
                that this differs from the trained one by the input alone.
            sample: the denoiser that is integrated: as validation samples with it.
        """
        latents, condition, sigma, noise = batch.latents, batch.condition, batch.sigma, batch.noise
        if batch.rollout is None:
            self._take_part(self.calls if batch.rolls_elsewhere else 0)
            return RolloutInputs(noised(latents, noise, sigma))
        unrolled = None
        if not len(batch.rollout.rolled):  # lengths, but no room: at sigma 1 there is nothing noisier
            self._take_part(self._walked)
        # The adapter's dropout draws from torch's global generator. Restored afterwards, it gives the pass with
        # gradients the masks that it has without rollouts, and the unrolled prediction the same ones, so that the two
        # can be compared.
        accelerators = [latents.device] if latents.device.type == "cuda" else []
        with torch.random.fork_rng(accelerators), torch.no_grad():
            x = rolled_out(
                sample,
                latents,
                condition,
                sigma=sigma,
                noise=noise,
                starts=batch.rollout,
                solver=self.solver,
                steps=self.steps,
            )
        if self.reflex.alpha:
            with torch.random.fork_rng(accelerators), torch.no_grad():
                unrolled = denoise(noised(latents, noise, sigma), sigma, condition)
        return RolloutInputs(x, unrolled)

    def losses(
        self,
        denoise: Denoise,
        batch: Batch,
        inputs: "RolloutInputs",
        *,
        penalty: Penalty,
        prior: Prior | None = None,
    ) -> Float[Tensor, " b"]:
        """`flow_loss` at `inputs`, with ReflexFlow's terms. Samples that are not rolled out keep their bits."""
        latents, condition, sigma, noise = batch.latents, batch.condition, batch.sigma, batch.noise
        if batch.rollout is None:
            return flow_loss(
                denoise,
                latents,
                condition,
                sigma=sigma,
                noise=noise,
                penalty=penalty,
                weight=batch.masks,
                prior=prior,
            )
        return rollout_loss(
            denoise,
            inputs.x,
            latents,
            condition,
            sigma=sigma,
            noise=noise,
            is_rolled=batch.rollout.sigma > sigma,
            unrolled=inputs.unrolled,
            reflex=self.reflex,
            penalty=penalty,
            weight=batch.masks,
            prior=prior,
        )

    def _take_part(self, calls: int) -> None:
        """Take part in `calls` calls of other ranks, where the model needs that."""
        if self.idle is not None:
            for _ in range(calls):
                self.idle()

    def describe(self) -> str:
        """What is about to happen and what it costs, in one line."""
        options = self.options
        share = f"{options.scheduled_sampling_probability:g}"
        if options.scheduled_sampling_ramp_steps:
            begin = options.scheduled_sampling_start_step
            share = (
                f"from {options.scheduled_sampling_prob_start:g} to {options.scheduled_sampling_prob_end:g} "
                f"between steps {begin} and {begin + options.scheduled_sampling_ramp_steps}"
            )
        walked = self._walked
        calls = f"{walked} and {self.calls - walked} for ReflexFlow" if self.calls > walked else f"{walked}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return (
            f"Scheduled sampling: lengths 0–{options.scheduled_sampling_max_step_offset} of {PARTS} "
            f"({options.scheduled_sampling_strategy}), probability {share}; {steps} of "
            f"{options.scheduled_sampling_sampler}, model calls without gradient for a batch with rollouts: {calls}."
        )


def starts_of(lengths: Sequence[int], sigma: Float[Tensor, " b"]) -> RolloutStarts | None:
    """Where samples of these lengths (in thousandths of the path) start; None where all lengths are 0."""
    if not any(lengths):
        return None
    return RolloutStarts.at((sigma + torch.tensor(lengths) / PARTS).clamp(max=1), sigma)
