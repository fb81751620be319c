"""Scheduled sampling: choose the samples of a step that are rolled out and their lengths, and compute their loss."""

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
"""Lengths are in 1/PARTS of the path."""


@dataclass(frozen=True)
class RolloutInputs:
    """The noisy latents that a batch is trained on, without gradient."""

    x: Float[Tensor, "b c h w"]
    """The latents at each sample's sigma, rolled out or directly noised."""
    unrolled: Float[Tensor, "b c h w"] | None = None
    """The prediction at the directly noised latents, if ReflexFlow needs it."""


@dataclass(frozen=True)
class Rollout:
    """Scheduled sampling, configured by the options."""

    seed: int
    options: RolloutOptions
    idle: Callable[[], None] | None = None
    """If not None, the model is sharded, so all ranks must call it equally often. `idle` takes part in one call without
    gradient that other ranks make.
    """

    @classmethod
    def of(cls, options: RolloutOptions, seed: int, idle: Callable[[], None] | None = None) -> "Rollout | None":
        """The rollout that `options` describe; None if they disable scheduled sampling."""
        return cls(seed, options, idle) if options.scheduled_sampling_max_step_offset else None

    @property
    def solver(self) -> Solver:
        return SOLVERS[self.options.scheduled_sampling_sampler]

    @property
    def steps(self) -> int:
        """Solver steps of a rollout, the same for every length."""
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
        """Model calls without gradient for a batch with a sample that is rolled out."""
        return self._solver_calls + (1 if self.reflex.alpha else 0)

    @property
    def _solver_calls(self) -> int:
        """The part of `calls` that the solver makes."""
        return self.steps * self.solver.calls_per_step

    def probability(self, step: int) -> float:
        """The probability that a sample of `step` draws a length."""
        options = self.options
        if not options.scheduled_sampling_ramp_steps:
            return options.scheduled_sampling_probability
        progress = (step - options.scheduled_sampling_start_step) / options.scheduled_sampling_ramp_steps
        progress = min(max(progress, 0.0), 1.0)
        if options.scheduled_sampling_ramp_shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        first, last = options.scheduled_sampling_prob_start, options.scheduled_sampling_prob_end
        return first + (last - first) * progress

    def lengths(self, step: int, slots: Sequence[int]) -> tuple[int, ...]:
        """The rollout lengths of the samples in `slots` of `step`, in thousandths of the path."""
        return tuple(self._length(step, slot) for slot in slots)

    def _length(self, step: int, slot: int) -> int:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, "rollout", step, slot))
        draw, length_draw = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        if draw >= self.probability(step):
            return 0
        longest = self.options.scheduled_sampling_max_step_offset
        strategy = self.options.scheduled_sampling_strategy
        # The square of a uniform draw has the density 1/(2√u): half of the draws lie in the first quarter.
        length = int((length_draw if strategy == "uniform" else length_draw**2) * (longest + 1))
        return longest - length if strategy == "biased_late" else length

    def starts(self, step: int, slots: Sequence[int], sigma: Float[Tensor, " b"]) -> RolloutStarts | None:
        """The starting points, on the CPU, of the rollouts of the samples in `slots` of `step`, which are trained at
        `sigma`. None if all lengths are 0.
        """
        return starts_of(self.lengths(step, slots), sigma)

    def calls_of(self, batch: Batch) -> int:
        """Model calls without gradient for `batch`."""
        return 0 if batch.rollout is None else self.calls

    def sampled(self, batch: Batch) -> tuple[int, int]:
        """Numbers of samples in the solver's model calls, summed over the calls, and in the unrolled prediction."""
        if batch.rollout is None:
            return 0, 0
        return len(batch.rollout.rolled) * self._solver_calls, len(batch.latents) if self.reflex.alpha else 0

    def inputs(self, denoise: Denoise, batch: Batch, *, sample: Denoise) -> "RolloutInputs":
        """The inputs of `losses`: rolled-out latents for samples with a length above 0, directly noised ones for
        others.

        Args:
            denoise: the denoiser of the pass with gradients, possibly routed. It also makes the unrolled prediction, so
                that the two differ only by their input.
            sample: the denoiser that the solver integrates, as in validation.
        """
        latents, condition, sigma, noise = batch.latents, batch.condition, batch.sigma, batch.noise
        if batch.rollout is None:
            self._join_other_ranks(self.calls if batch.other_ranks_roll_out else 0)
            return RolloutInputs(noised(latents, noise, sigma))
        unrolled = None
        if not len(batch.rollout.rolled):  # all samples with a length are at sigma 1, where no rollout is possible
            self._join_other_ranks(self._solver_calls)
        # Adapter dropout draws from torch's global generator. Restore the generator afterwards, so that the pass with
        # gradients has the same dropout masks as without rollouts, and the unrolled prediction has them too.
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
        """`flow_loss` at `inputs`, with ReflexFlow's terms. It is bit-identical for samples that are not rolled out."""
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

    def _join_other_ranks(self, calls: int) -> None:
        """If the model is sharded, take part in `calls` model calls of other ranks."""
        if self.idle is not None:
            for _ in range(calls):
                self.idle()

    def describe(self) -> str:
        """One line about the configured rollouts and their cost in model calls."""
        options = self.options
        share = f"{options.scheduled_sampling_probability:g}"
        if options.scheduled_sampling_ramp_steps:
            begin = options.scheduled_sampling_start_step
            share = (
                f"from {options.scheduled_sampling_prob_start:g} to {options.scheduled_sampling_prob_end:g} "
                f"between steps {begin} and {begin + options.scheduled_sampling_ramp_steps}"
            )
        solver_calls = self._solver_calls
        calls = (
            f"{solver_calls} and {self.calls - solver_calls} for ReflexFlow"
            if self.calls > solver_calls
            else f"{solver_calls}"
        )
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return (
            f"Scheduled sampling: lengths 0–{options.scheduled_sampling_max_step_offset} of {PARTS} "
            f"({options.scheduled_sampling_strategy}), probability {share}; {steps} of "
            f"{options.scheduled_sampling_sampler}, model calls without gradient for a batch with rollouts: {calls}."
        )


def starts_of(lengths: Sequence[int], sigma: Float[Tensor, " b"]) -> RolloutStarts | None:
    """Starting points of rollouts with `lengths`, in thousandths of the path; None if all lengths are 0."""
    if not any(lengths):
        return None
    return RolloutStarts.at((sigma + torch.tensor(lengths) / PARTS).clamp(max=1), sigma)
