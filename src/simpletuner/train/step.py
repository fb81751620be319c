"""One optimiser step: draw, noise, predict, compare, backward, clip, update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from simpletuner.flow.sigma import (
    Density,
    beta_density,
    mu_linear,
    shifted,
    sigmoid_density,
    uniform_density,
)
from simpletuner.train import optim


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
    density: Density
    shift: float | None
    """None takes it from the sample's size."""
    guidance: tuple[float, float]
    """Lowest and highest; equal for a constant."""
    penalty: Penalty

    @classmethod
    def of(cls, schedule: ScheduleOptions, guidance: GuidanceOptions, seed: int) -> "Objective":
        """The objective that the options describe."""
        if schedule.flow_use_uniform_schedule:
            density = uniform_density()
        elif schedule.flow_use_beta_schedule:
            density = beta_density(schedule.flow_beta_schedule_alpha, schedule.flow_beta_schedule_beta)
        else:
            density = sigmoid_density(schedule.flow_sigmoid_scale)
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
            density=density,
            shift=None if schedule.flow_schedule_auto_shift else schedule.flow_schedule_shift,
            guidance=span,
            penalty=penalties[schedule.loss_type],
        )

    def draw(self, step: int, slots: Sequence[int], shape: tuple[int, int, int]) -> Draws:
        """The draws of the samples in `slots` of `step`; `shape` is one sample's latent (channels, h, w)."""
        tokens = shape[1] * shape[2]
        shift = math.exp(mu_linear(tokens)) if self.shift is None else self.shift
        low, high = self.guidance
        sigma = [shifted(self.density(self._uniform("sigma", step, slot)), shift) for slot in slots]
        guidance = [
            low if low == high else low + (high - low) * self._uniform("guidance", step, slot) for slot in slots
        ]
        noise = [torch.randn(shape, generator=self._generator("noise", step, slot)) for slot in slots]
        return Draws(torch.tensor(sigma), torch.tensor(guidance), torch.stack(noise))

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

    def losses(self, batch: Batch, draws: Draws) -> Float[Tensor, " b"]:
        """Loss of each sample of `batch`, with gradients. fp16 computes under autocast over bf16 weights."""
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.scaler.is_enabled()):
            return flow_loss(
                self.denoise,
                batch.latents.to(self.device, non_blocking=True),
                batch.context.to(self.device, non_blocking=True),
                sigma=draws.sigma.to(self.device),
                guidance=draws.guidance.to(self.device),
                noise=draws.noise.to(self.device),
                penalty=self.objective.penalty,
            )

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
            losses = self.losses(batch, draws)
            self.scaler.scale(losses.sum() / group.size).backward()
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
        self.optimiser.zero_grad(set_to_none=True)
        return StepResult(loss=math.fsum(losses) / group.size, grad_norm=grad_norm)


def not_finite(what: str, step: int, names: Sequence[str]) -> DataError:
    """The error of a `what` that is infinite or not a number."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return DataError.of(
        f"the {what} of step {step} is not finite; it came from {shown}",
        remedy="The step was not taken and the last good state is saved. Look at these pictures and captions, "
        "lower learning_rate, or set max_grad_norm=1.0; then start again to go on.",
    )
