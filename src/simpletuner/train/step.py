"""One optimiser step: draw, noise, predict, compare, backward, clip, update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import Purpose, draw_seed
from simpletuner.base.errors import DataError
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.collate import Batch
from simpletuner.flow.loss import Denoise, Penalty, flow_loss, huber, smooth_l1, squared
from simpletuner.flow.sigma import in_stratum
from simpletuner.memory.masters import Masters
from simpletuner.train import optim
from simpletuner.train.rollout import Rollout
from simpletuner.train.strata import Strata
from simpletuner.train.timesteps import Timesteps


@dataclass(frozen=True)
class Draws:
    """What chance decides for the samples of one batch. On the CPU, fp32."""

    sigma: Float[Tensor, " b"]
    guidance: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class Objective:
    """What a sample is asked: at which sigmas and guidances, and how its error counts."""

    seed: int
    timesteps: Timesteps
    guidance: tuple[float, float]
    """Lowest and highest; equal for a constant."""
    penalty: Penalty
    strata: Strata | None = None
    """Where given, it decides which part of the density each sample draws from."""

    @classmethod
    def of(
        cls, schedule: ScheduleOptions, guidance: GuidanceOptions, seed: int, strata: Strata | None = None
    ) -> "Objective":
        """The objective that the options describe."""
        penalties = {
            "l2": squared,
            "huber": huber(schedule.huber_c, schedule.huber_schedule),
            "smooth_l1": smooth_l1(schedule.huber_c, schedule.huber_schedule),
        }
        if guidance.flux_guidance_mode == "constant":
            span = (guidance.flux_guidance_value, guidance.flux_guidance_value)
        else:
            span = (guidance.flux_guidance_min, guidance.flux_guidance_max)
        return cls(
            seed=seed,
            timesteps=Timesteps.of(schedule),
            guidance=span,
            penalty=penalties[schedule.loss_type],
            strata=strata if schedule.timestep_strata else None,
        )

    def draw(self, step: int, slots: Sequence[int], shape: tuple[int, int, int]) -> Draws:
        """The draws of the samples in `slots` of `step`; `shape` is one sample's latent (channels, h, w)."""
        tokens = shape[1] * shape[2]
        low, high = self.guidance
        sigma = [self.timesteps.sigma(self._level(step, slot), tokens) for slot in slots]
        guidance = [
            low if low == high else low + (high - low) * self._uniform("guidance", step, slot) for slot in slots
        ]
        noise = [torch.randn(shape, generator=self._generator("noise", step, slot)) for slot in slots]
        return Draws(torch.tensor(sigma), torch.tensor(guidance), torch.stack(noise))

    def _level(self, step: int, slot: int) -> float:
        """How far up its density a sample's sigma lies, in (0, 1)."""
        u = self._uniform("sigma", step, slot)
        if self.strata is None or step == 0:  # step 0 is a trial, outside every epoch
            return u
        return in_stratum(u, *self.strata(step, slot))

    def _generator(self, purpose: Purpose, step: int, slot: int) -> torch.Generator:
        return torch.Generator().manual_seed(draw_seed(self.seed, purpose, step, slot))

    def _uniform(self, purpose: Purpose, step: int, slot: int) -> float:
        """Even in (0, 1), both ends left out: a quantile is infinite there."""
        draw = torch.rand((), dtype=torch.float64, generator=self._generator(purpose, step, slot)).item()
        return max(draw, 2.0**-53)


@dataclass(frozen=True)
class Group:
    """The batches that share one optimiser step, and the epoch of the first."""

    step: int
    epoch: int
    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        return sum(len(batch.names) for batch in self.batches)


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    rollout_calls: int
    """Model calls without gradient that scheduled sampling added."""


DenoiserOf = Callable[[int, Sequence[int], tuple[int, int]], Denoise]
"""(step, slots, height and width of the latents) → what predicts the velocity of those samples."""


@dataclass(frozen=True)
class Stepper:
    """Everything a step works on. `denoise` runs on `device`; `parameters` are what learns."""

    denoise: Denoise
    parameters: Sequence[torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    options: OptimOptions
    objective: Objective
    scaler: torch.amp.GradScaler
    device: torch.device
    route: DenoiserOf | None = None
    """Takes the place of `denoise` where it learns; a rollout's walk is not routed."""
    rollout: Rollout | None = None
    masters: Masters | None = None
    """Where given, `parameters` are these, and the weights that compute follow them."""

    def losses(self, batch: Batch, draws: Draws, step: int, slots: Sequence[int]) -> Float[Tensor, " b"]:
        """Loss of each sample of `batch`, in `slots` of `step`, with gradients. fp16 computes under autocast over
        bf16 weights.
        """
        height, width = batch.latents.shape[2:]
        denoise = self.denoise if self.route is None else self.route(step, slots, (height, width))
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.scaler.is_enabled()):
            latents = batch.latents.to(self.device, non_blocking=True)
            context = batch.context.to(self.device, non_blocking=True)
            drawn: dict[str, Any] = {
                "sigma": draws.sigma.to(self.device),
                "guidance": draws.guidance.to(self.device),
                "noise": draws.noise.to(self.device),
                "penalty": self.objective.penalty,
            }
            if self.rollout is None:
                return flow_loss(denoise, latents, context, **drawn)
            lengths = self.rollout.lengths(step, slots)
            return self.rollout.losses(denoise, latents, context, **drawn, lengths=lengths, walk=self.denoise)

    def backward(self, group: Group) -> list[float]:
        """Add the gradients of the group's mean loss; returns the loss of each sample, in order.

        Raises:
            DataError: a loss is not finite. Nothing has been updated.
        """
        found: list[float] = []
        for batch in group.batches:
            slots = range(len(found), len(found) + len(batch.names))
            channels, height, width = batch.latents.shape[1:]
            draws = self.objective.draw(group.step, slots, (channels, height, width))
            # The adapter's dropout is the one draw made inside the model, from torch's own generator.
            torch.manual_seed(draw_seed(self.objective.seed, "lora_dropout", group.step, slots[0]))
            losses = self.losses(batch, draws, group.step, slots)
            self.scaler.scale(losses.sum() / group.size).backward()
            if self.masters is not None:
                self.masters.collect()
            found += losses.detach().tolist()
        bad = [
            name
            for name, loss in zip((n for b in group.batches for n in b.names), found, strict=True)
            if not math.isfinite(loss)
        ]
        if bad:
            raise not_finite("loss", group.step, bad)
        return found

    def __call__(self, group: Group, lr: float) -> StepResult:
        """Train on `group`.

        Raises:
            DataError: a loss or gradient is not finite. Nothing has been updated.
        """
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = lr * parameters[optim.RATIO]
        losses = self.backward(group)
        self.scaler.unscale_(self.optimiser)
        grad_norm = optim.clip(self.parameters, self.options).item()
        if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            # With fp16 an overflow is part of the method: the scaler skips the step and lowers its scale.
            raise not_finite("gradient", group.step, [name for batch in group.batches for name in batch.names])
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.masters is not None:
            self.masters.settle()
        self.optimiser.zero_grad(set_to_none=True)
        return StepResult(math.fsum(losses) / group.size, grad_norm, self.rollout_calls(group))

    def rollout_calls(self, group: Group) -> int:
        """Model calls without gradient that scheduled sampling adds to the step of `group`."""
        if self.rollout is None:
            return 0
        calls = first = 0
        for batch in group.batches:
            slots = range(first, first + len(batch.names))
            calls += self.rollout.calls_of(self.rollout.lengths(group.step, slots))
            first = slots.stop
        return calls


def not_finite(what: str, step: int, names: Sequence[str]) -> DataError:
    """The error of a `what` that is infinite or not a number."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return DataError.of(
        f"the {what} of step {step} is not finite; it came from {shown}",
        remedy="The step was not taken and the last good state is saved. Look at these pictures and captions, "
        "lower learning_rate, or set max_grad_norm=1.0; then start again to go on.",
    )
