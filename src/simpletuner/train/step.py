"""One optimizer step: draw, noise, predict, compare, backward, clip, update."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import Purpose, draw_seed
from simpletuner.base.errors import DataError
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.choice import Choice
from simpletuner.flow.condition import Denoise
from simpletuner.flow.loss import Penalty, distillation_loss, flow_loss, huber, smooth_l1, squared
from simpletuner.flow.path import noised
from simpletuner.flow.sigma import in_stratum
from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import RowShards, Shards
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards
from simpletuner.train import optim
from simpletuner.train.preservation import Preservation
from simpletuner.train.release import GradientRelease
from simpletuner.train.rollout import Rollout, RolloutInputs
from simpletuner.train.strata import Strata
from simpletuner.train.timesteps import Timesteps


@dataclass(frozen=True)
class Draws:
    """Random draws of the samples of one batch. On the CPU, fp32."""

    sigma: Float[Tensor, " b"]
    guidance: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class Objective:
    """Training objective: sigma and guidance distributions, and the loss."""

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

    def draw(self, step: int, slots: Sequence[int], shape: tuple[int, int, int], offset: float = 0.0) -> Draws:
        """The draws of the samples in `slots` of `step`; `shape` is one sample's latent (channels, h, w), and `offset`
        their set's `timestep_sampling_offset`.
        """
        tokens = shape[1] * shape[2]
        low, high = self.guidance
        sigma = [self.timesteps.sigma(self._level(step, slot), tokens, offset) for slot in slots]
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


class NotFiniteError(DataError):
    """A loss or gradient is infinite or not a number."""

    @classmethod
    def at(cls, what: str, step: int, names: Sequence[str]) -> "NotFiniteError":
        """`what`, the loss or the gradient, of the samples `names`."""
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        place = f"step {step}" if step > 0 else "the trial pass"
        return cls.of(f"the {what} of {place} is not finite; it came from {shown}")


class PartialStepError(NotFiniteError):
    """A gradient is not finite, and parameters whose gradients came before it in the backward pass are stepped."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    rollout_calls: int
    """Model calls without gradient that scheduled sampling added."""
    preservation_loss: float | None = None
    """Mean over the samples of the weighted loss of `preservation`, which `loss` leaves out; None without one."""


@dataclass(frozen=True)
class Stepper:
    """Everything a step works on. `denoise` runs on `device`; `parameters` are the trainable ones."""

    denoise: Denoise
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    options: OptimOptions
    objective: Objective
    scaler: torch.amp.GradScaler
    device: torch.device
    route: Callable[[Sequence[Choice]], Denoise] | None = None
    """Makes of a batch's choices the denoiser of the pass with gradients, and of what is compared with it; a rollout is
    not routed.
    """
    rollout: Rollout | None = None
    preservation: Preservation | None = None
    """Where given, the base model's predictions can be had: without it no batch may ask for them."""
    masters: SteppedParameters | None = None
    """Where given, `parameters` are these, and the weights that compute follow them."""
    is_autocast: bool = False
    """Whether products are computed in fp16 over weights of another format."""
    release: GradientRelease | None = None
    """Where given, it steps on the gradients inside the backward pass, of one micro-batch a step, and frees them."""
    world: World | None = None
    """Where given, its ranks train on their shares of each global batch, and step alike."""

    @property
    def shards(self) -> Shards | None:
        """Where `parameters` are this rank's share of those that ranks share out."""
        return self.masters if isinstance(self.masters, Shards) else None

    @property
    def zero(self) -> ZeroShards | None:
        """Where DeepSpeed's engine computes the gradients and gathers the stepped weights."""
        return self.masters if isinstance(self.masters, ZeroShards) else None

    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """Weighted loss of each sample of `batch`, with gradients; without that of `preservation`."""
        batch = batch.to(self.device, non_blocking=True)
        return self._losses_at(batch, self._inputs(batch))

    def _inputs(self, batch: Batch) -> RolloutInputs:
        """What `batch`, which is on the device, is trained at."""
        if self.rollout is None:
            return RolloutInputs(noised(batch.latents, batch.noise, batch.sigma))
        with self._autocast():
            return self.rollout.inputs(self._routed(batch), batch, sample=self.denoise)

    def _losses_at(self, batch: Batch, inputs: RolloutInputs) -> Float[Tensor, " b"]:
        """`losses` of a batch that is on the device. The base model's pass comes first, so that its activations are
        gone before those of the pass with gradients are kept.
        """
        denoise, penalty, base = self._routed(batch), self.objective.penalty, self.preservation
        with self._autocast():
            if batch.is_regularization:
                assert base is not None
                target = base.predictions(batch, inputs.x, batch.condition)
                losses = distillation_loss(
                    denoise, inputs.x, batch.condition, sigma=batch.sigma, target=target, penalty=penalty
                )
                return losses * batch.weights
            prior = None if base is None else base.prior_of(batch, inputs.x)
            if self.rollout is not None:
                losses = self.rollout.losses(denoise, batch, inputs, penalty=penalty, prior=prior)
            else:
                losses = flow_loss(
                    denoise,
                    batch.latents,
                    batch.condition,
                    sigma=batch.sigma,
                    noise=batch.noise,
                    penalty=penalty,
                    weight=batch.masks,
                    prior=prior,
                )
            return losses * batch.weights

    def _preservation_losses(self, batch: Batch, x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"] | None:
        """Weighted loss of `preservation` of each sample, with gradients; None where the batch has none."""
        base = self.preservation
        second = None if base is None else base.second_pass(batch)
        if base is None or second is None:
            return None
        condition, weights = second
        with self._autocast():
            losses = distillation_loss(
                self._routed(batch),
                x,
                condition,
                sigma=batch.sigma,
                target=base.predictions(batch, x, condition),
                penalty=self.objective.penalty,
            )
            return losses * weights

    def _routed(self, batch: Batch) -> Denoise:
        """The denoiser of the pass with gradients."""
        return self.denoise if self.route is None else self.route(batch.choices)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        """A block in which products are computed in fp16, where the run does."""
        if self.is_autocast:
            return torch.autocast(self.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def backward(self, whole: GlobalBatch) -> list[float]:
        """Add the gradients of the global batch's mean loss, which DeepSpeed's engine forgets again; returns the
        weighted loss of each sample, in order.

        Raises:
            NotFiniteError: a loss is not finite. Nothing has been updated.
        """
        device_losses = self._accumulate(whole)
        if self.zero is not None:
            self.zero.discard()  # its gradients are seen in a step alone
        losses, preserved = _rows(self.read(device_losses), whole)
        _check_losses(whole, losses, preserved)
        return losses

    def read(self, values: Float[Tensor, " n"]) -> list[float]:
        """The numbers in `values`, once the device has computed them.

        The host waits for the device here and nowhere else in a step: once, and with `release` once more, before the
        backward pass. Exceptions: fp16's GradScaler asks the device
        whether gradients overflowed; an optimizer of another library may read its state.
        """
        numbers: list[float] = values.tolist()
        return numbers

    def _accumulate(self, whole: GlobalBatch) -> Float[Tensor, " n"]:
        """Add the gradients of the global batch's mean loss. Returns the samples' weighted losses, on the device;
        after them, with `preservation`, those of its loss.

        That loss has a backward pass of its own, after the other's: the two graphs never lie in memory together.
        """
        losses: list[Tensor] = []
        preserved: list[Tensor] = []
        for batch in whole.batches:
            batch = batch.to(self.device, non_blocking=True)  # noqa: PLW2901  the same batch
            self._seed(batch, whole.step)
            inputs = self._inputs(batch)
            batch_losses = self._losses_at(batch, inputs)
            self._backward(batch_losses.sum() / whole.size)
            losses.append(batch_losses.detach())
            if self._has_second_loss:
                preserved.append(self._preserve(batch, inputs.x, whole.size))
            if self.masters is not None:
                self.masters.collect()
        return torch.cat(losses + preserved)

    def _preserve(self, batch: Batch, x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, " b"]:
        """Add the gradients of `preservation`; returns the samples' weighted losses, 0 where they take no part. The
        dropout that it draws changes no later draw.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            losses = self._preservation_losses(batch, x)
            if losses is None:
                return torch.zeros_like(batch.weights)
            self._backward(losses.sum() / size)
        return losses.detach()

    def _backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of `loss`."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.scaler.scale(loss).backward()

    @property
    def _has_second_loss(self) -> bool:
        return self.preservation is not None and self.preservation.has_second_loss

    def _seed(self, batch: Batch, step: int) -> None:
        # The adapter's dropout is the one draw made inside the model, from torch's global generator.
        torch.manual_seed(draw_seed(self.objective.seed, "lora_dropout", step, batch.slots[0]))

    def __call__(self, whole: GlobalBatch, lr: float) -> StepResult:
        """Train on one global batch.

        Raises:
            PartialStepError: a gradient is not finite, and `release` has stepped parameters before it.
            NotFiniteError: a loss or gradient is not finite. Nothing has been updated; `discard` before the next step.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr * parameters[optim.RATIO]
        return self._step(whole) if self.release is None else self._step_inside(whole, self.release)

    def _step(self, whole: GlobalBatch) -> StepResult:
        """Backward passes, then the optimizer's step."""
        device_losses = self._accumulate(whole)
        calls = self._rollout_calls(whole)
        if self.world is not None:
            device_losses = self._summed(whole, device_losses, calls, self.world)
        update = functools.partial(self._update, whole, device_losses, calls)
        return update() if self.zero is None else self.zero.step(update)

    def _update(self, whole: GlobalBatch, device_losses: Float[Tensor, " n"], calls: int) -> StepResult:
        """The optimizer's step on gradients that are summed over the ranks, if all numbers are finite."""
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip(self.parameters, self.options, None if self.shards is None else self.world)
        # One tensor, so that the host waits once. `cat` takes the wider of the two dtypes: no number is rounded.
        *losses, grad_norm = self.read(torch.cat([device_losses, norm[None].to(device_losses.device)]))
        if self.world is not None:
            calls = int(losses.pop())
        losses, preserved = _rows(losses, whole)
        _check_losses(whole, losses, preserved)
        if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            # With fp16 an overflow is part of the method: the scaler skips the step and lowers its scale.
            raise NotFiniteError.at("gradient", whole.step, whole.names)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not None:
            self.masters.settle()
        self.optimizer.zero_grad(set_to_none=True)
        preservation_loss = math.fsum(preserved) / whole.size if self._has_second_loss else None
        return StepResult(math.fsum(losses) / whole.size, grad_norm, calls, preservation_loss)

    def _rollout_calls(self, whole: GlobalBatch) -> int:
        """Model calls without gradient for the micro-batches of this process."""
        return 0 if self.rollout is None else sum(map(self.rollout.calls_of, whole.batches))

    def _summed(self, whole: GlobalBatch, losses: Float[Tensor, " n"], calls: int, world: World) -> Float[Tensor, " m"]:
        """Sum the gradients over the ranks. Returns the losses of all samples, by slot, those of `preservation` after
        them, and the calls of all ranks, on the device: they travel with the gradients. Sums with zeros, they are
        exact.
        """
        kinds = 2 if self._has_second_loss else 1
        numbers = losses.new_zeros(kinds * whole.size + 1)
        slots = [slot for batch in whole.batches for slot in batch.slots]
        numbers[[kind * whole.size + slot for kind in range(kinds) for slot in slots]] = losses
        numbers[-1] = calls
        reduced = self.parameters if self.shards is None else ()  # FSDP2 or DeepSpeed sum the gradients of shards
        if isinstance(self.shards, RowShards) and self.scaler.is_enabled():
            self.shards.share_overflow()
        world.sum_([*(each.grad for each in reduced if each.grad is not None), numbers])
        # An optimizer may draw from torch's global generator, which micro-batches have seeded differently.
        torch.manual_seed(draw_seed(self.objective.seed, "optimizer", whole.step))
        return numbers

    def _step_inside(self, whole: GlobalBatch, release: GradientRelease) -> StepResult:
        """A backward pass that steps on its gradients. The losses are checked before it."""
        (batch,) = whole.batches
        self._seed(batch, whole.step)
        device_losses = self.losses(batch)
        losses = self.read(device_losses.detach())
        _check_losses(whole, losses)
        (grad_norm,) = self.read(release.backward(device_losses.sum() / whole.size)[None])
        if not math.isfinite(grad_norm):
            raise PartialStepError.at("gradient", whole.step, whole.names)
        return StepResult(math.fsum(losses) / whole.size, grad_norm, self._rollout_calls(whole))

    def discard(self) -> None:
        """Forget the gradients of a step that is not taken."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def _rows(values: list[float], whole: GlobalBatch) -> tuple[list[float], list[float]]:
    """The samples' losses, and those of `preservation`, which come after them; none without it."""
    count = len(whole.names)
    return values[:count], values[count:]


def _check_losses(whole: GlobalBatch, losses: Sequence[float], preserved: Sequence[float] = ()) -> None:
    for what, values in (("loss", losses), ("preservation loss", preserved)):
        bad = [name for name, loss in zip(whole.names, values, strict=False) if not math.isfinite(loss)]
        if bad:
            raise NotFiniteError.at(what, whole.step, bad)
