"""One optimizer step: draws, noising, forward, loss, backward, clipping and update."""

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
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Denoise
from simpletuner.flow.loss import Penalty, distillation_loss, flow_loss, huber, smooth_l1, squared
from simpletuner.flow.path import noised
from simpletuner.flow.sigma import in_stratum
from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import RankShards, RowShards
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards
from simpletuner.train import optim
from simpletuner.train.preservation import Preservation
from simpletuner.train.release import GradientRelease
from simpletuner.train.rollout import Rollout, RolloutInputs
from simpletuner.train.strata import Strata
from simpletuner.train.timesteps import Timesteps


@dataclass(frozen=True)
class SampleDraws:
    """Random draws for the samples of one batch, on the CPU, in fp32."""

    sigma: Float[Tensor, " b"]
    guidance: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class Objective:
    """Training objective: sigma and guidance distributions, and the loss."""

    seed: int
    timesteps: Timesteps
    guidance: tuple[float, float]
    """Lowest and highest guidance; equal for a constant."""
    penalty: Penalty
    strata: Strata | None = None
    """If not None, assigns each sample a stratum of the sigma density to draw from."""

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

    def draw(self, step: int, slots: Sequence[int], shape: tuple[int, int, int], offset: float = 0.0) -> SampleDraws:
        """The draws of the samples in `slots` of `step`. `shape` is that of one sample's latents, (channels, h, w);
        `offset` is the dataset's `timestep_sampling_offset`.
        """
        tokens = shape[1] * shape[2]
        low, high = self.guidance
        sigma = [self.timesteps.sigma(self._quantile(step, slot), tokens, offset) for slot in slots]
        guidance = [
            low if low == high else low + (high - low) * self._uniform("guidance", step, slot) for slot in slots
        ]
        noise = [torch.randn(shape, generator=self._generator("noise", step, slot)) for slot in slots]
        return SampleDraws(torch.tensor(sigma), torch.tensor(guidance), torch.stack(noise))

    def _quantile(self, step: int, slot: int) -> float:
        """The quantile of the sample's sigma in its density, in (0, 1)."""
        u = self._uniform("sigma", step, slot)
        if self.strata is None or step == 0:  # step 0 is a trial and belongs to no epoch
            return u
        return in_stratum(u, *self.strata(step, slot))

    def _generator(self, purpose: Purpose, step: int, slot: int) -> torch.Generator:
        return torch.Generator().manual_seed(draw_seed(self.seed, purpose, step, slot))

    def _uniform(self, purpose: Purpose, step: int, slot: int) -> float:
        """A uniform draw in (0, 1) without the ends, where quantiles are infinite."""
        draw = torch.rand((), dtype=torch.float64, generator=self._generator(purpose, step, slot)).item()
        return max(draw, 2.0**-53)


class NotFiniteError(DataError):
    """A loss or gradient is infinite or not a number."""

    @classmethod
    def for_step(cls, quantity: str, step: int, names: Sequence[str]) -> "NotFiniteError":
        """The error for `quantity`, a loss or a gradient, of the samples `names`."""
        samples = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        pass_name = f"step {step}" if step > 0 else "the trial pass"
        return cls.of(f"the {quantity} of {pass_name} is not finite; it came from {samples}")


class PartialStepError(NotFiniteError):
    """A gradient is not finite, but parameters earlier in the backward pass are already stepped."""


@dataclass(frozen=True)
class StepResult:
    """Figures of a step that was taken."""

    loss: float
    """Mean over the samples of the weighted loss."""
    grad_norm: float
    """Before clipping."""
    rollout_calls: int
    """Model calls without gradient that scheduled sampling added."""
    preservation_loss: float | None = None
    """Mean over the samples of the weighted preservation loss, which `loss` does not include; None without one."""


@dataclass(frozen=True)
class Stepper:
    """Makes optimizer steps. `denoise` runs on `device`; `parameters` are the trainable parameters."""

    denoise: Denoise
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    options: OptimOptions
    objective: Objective
    scaler: torch.amp.GradScaler
    device: torch.device
    route: Callable[[Sequence[TokenChoice]], Denoise] | None = None
    """Returns the denoiser with TREAD routing for a batch's choices; used in the pass with gradients and for
    predictions that are compared with it, but not in a rollout.
    """
    rollout: Rollout | None = None
    preservation: Preservation | None = None
    """Computes the base model's predictions; required if a batch needs them."""
    masters: SteppedParameters | None = None
    """If not None, `parameters` belong to it, and it updates the model's weights after each step."""
    is_autocast: bool = False
    """Whether matrix products run in fp16 over weights of another dtype."""
    release: GradientRelease | None = None
    """If not None, it steps each parameter inside the backward pass and frees the gradient; one micro-batch a step."""
    world: World | None = None
    """If not None, each rank trains on its micro-batches of the global batch, and all ranks make the same step."""

    @property
    def shards(self) -> RankShards | None:
        """The sharding, if `parameters` are this rank's shards; else None."""
        return self.masters if isinstance(self.masters, RankShards) else None

    @property
    def zero(self) -> ZeroShards | None:
        """DeepSpeed's shards, if its engine reduces the gradients and gathers the stepped weights; else None."""
        return self.masters if isinstance(self.masters, ZeroShards) else None

    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """The weighted loss of each sample of `batch`, with gradients, without the preservation loss."""
        batch = batch.to(self.device, non_blocking=True)
        return self._losses_at(batch, self._inputs(batch))

    def _inputs(self, batch: Batch) -> RolloutInputs:
        """The noisy latents for `batch`, which is on the device."""
        if self.rollout is None:
            return RolloutInputs(noised(batch.latents, batch.noise, batch.sigma))
        with self._autocast():
            return self.rollout.inputs(self._routed(batch), batch, sample=self.denoise)

    def _losses_at(self, batch: Batch, inputs: RolloutInputs) -> Float[Tensor, " b"]:
        """The `losses` of a batch that is on the device. The base model's pass runs first, so that its activations are
        freed before the pass with gradients stores its own.
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
        """The weighted preservation loss of each sample, with gradients; None if the batch has none."""
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
        """A context in which matrix products run in fp16, if `is_autocast`."""
        if self.is_autocast:
            return torch.autocast(self.device.type, dtype=torch.float16)
        return contextlib.nullcontext()

    def backward(self, global_batch: GlobalBatch) -> list[float]:
        """Accumulate the gradients of the global batch's mean loss, without an update; DeepSpeed's are discarded.
        Returns the weighted loss of each sample, in order.

        Raises:
            NotFiniteError: a loss is not finite. Nothing has been updated.
        """
        device_losses = self._accumulate(global_batch)
        if self.zero is not None:
            self.zero.discard()  # its gradients are only available within a step
        losses, preservation_losses = _split_losses(self.read(device_losses), global_batch)
        _check_losses(global_batch, losses, preservation_losses)
        return losses

    def read(self, values: Float[Tensor, " n"]) -> list[float]:
        """Copy `values` to the host, which waits for the device to compute them.

        This is the only place in a step where the host waits for the device: once, and with `release` a second time,
        before the backward pass. Exceptions: fp16's GradScaler reads from the device whether gradients overflowed, and
        an optimizer of another library may read its state.
        """
        numbers: list[float] = values.tolist()
        return numbers

    def _accumulate(self, global_batch: GlobalBatch) -> Float[Tensor, " n"]:
        """Accumulate the gradients of the global batch's mean loss. Returns the samples' weighted losses, on the
        device, followed by their preservation losses if there is such a loss.

        The preservation loss has a separate backward pass, after the first, so that only one graph is in memory.
        """
        losses: list[Tensor] = []
        preservation_losses: list[Tensor] = []
        for batch in global_batch.batches:
            batch = batch.to(self.device, non_blocking=True)  # noqa: PLW2901  the same batch
            self._seed(batch, global_batch.step)
            inputs = self._inputs(batch)
            batch_losses = self._losses_at(batch, inputs)
            self._backward(batch_losses.sum() / global_batch.size)
            losses.append(batch_losses.detach())
            if self._has_second_loss:
                preservation_losses.append(self._preserve(batch, inputs.x, global_batch.size))
            if self.masters is not None:
                self.masters.take_gradients()
        return torch.cat(losses + preservation_losses)

    def _preserve(self, batch: Batch, x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, " b"]:
        """Accumulate the gradients of the preservation loss. Returns the samples' weighted losses, 0 for samples
        without one. Its dropout does not advance torch's generators.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            losses = self._preservation_losses(batch, x)
            if losses is None:
                return torch.zeros_like(batch.weights)
            self._backward(losses.sum() / size)
        return losses.detach()

    def _backward(self, loss: Float[Tensor, ""]) -> None:
        """Accumulate the gradients of `loss`."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.scaler.scale(loss).backward()

    @property
    def _has_second_loss(self) -> bool:
        return self.preservation is not None and self.preservation.has_second_loss

    def _seed(self, batch: Batch, step: int) -> None:
        # Adapter dropout is the only random draw inside the model; it uses torch's global generator.
        torch.manual_seed(draw_seed(self.objective.seed, "lora_dropout", step, batch.slots[0]))

    def __call__(self, global_batch: GlobalBatch, lr: float) -> StepResult:
        """Train on one global batch.

        Raises:
            PartialStepError: a gradient is not finite, but `release` has already stepped other parameters.
            NotFiniteError: a loss or gradient is not finite. Nothing is updated; call `discard` before the next step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group[optim.RATIO]
        return self._step(global_batch) if self.release is None else self._step_in_backward(global_batch, self.release)

    def _step(self, global_batch: GlobalBatch) -> StepResult:
        """Run the backward passes, then the optimizer's step."""
        device_losses = self._accumulate(global_batch)
        calls = self._rollout_calls(global_batch)
        if self.world is not None:
            device_losses = self._summed(global_batch, device_losses, calls, self.world)
        update = functools.partial(self._update, global_batch, device_losses, calls)
        return update() if self.zero is None else self.zero.step(update)

    def _update(self, global_batch: GlobalBatch, device_losses: Float[Tensor, " n"], calls: int) -> StepResult:
        """Step the optimizer on gradients summed over the ranks, if all losses and the gradient norm are finite."""
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip(self.parameters, self.options, None if self.shards is None else self.world)
        # One tensor, so that the host waits once. `cat` promotes to the wider dtype, so no number is rounded.
        *losses, grad_norm = self.read(torch.cat([device_losses, norm[None].to(device_losses.device)]))
        if self.world is not None:
            calls = int(losses.pop())
        losses, preservation_losses = _split_losses(losses, global_batch)
        _check_losses(global_batch, losses, preservation_losses)
        if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            # With fp16 overflows are expected: the scaler skips the step and lowers its scale.
            raise NotFiniteError.for_step("gradient", global_batch.step, global_batch.names)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not None:
            self.masters.update_weights()
        self.optimizer.zero_grad(set_to_none=True)
        preservation_loss = math.fsum(preservation_losses) / global_batch.size if self._has_second_loss else None
        return StepResult(math.fsum(losses) / global_batch.size, grad_norm, calls, preservation_loss)

    def _rollout_calls(self, global_batch: GlobalBatch) -> int:
        """Model calls without gradient for this process's micro-batches."""
        return 0 if self.rollout is None else sum(map(self.rollout.calls_of, global_batch.batches))

    def _summed(
        self, global_batch: GlobalBatch, losses: Float[Tensor, " n"], calls: int, world: World
    ) -> Float[Tensor, " m"]:
        """Sum the gradients over the ranks. Returns, on the device, the losses of all samples by slot, then their
        preservation losses if any, then the calls of all ranks. They are reduced together with the gradients; these
        sums are exact, because each loss is zero on all ranks but one.
        """
        loss_count = 2 if self._has_second_loss else 1
        numbers = losses.new_zeros(loss_count * global_batch.size + 1)
        slots = [slot for batch in global_batch.batches for slot in batch.slots]
        numbers[[index * global_batch.size + slot for index in range(loss_count) for slot in slots]] = losses
        numbers[-1] = calls
        reduced = self.parameters if self.shards is None else ()  # FSDP2 or DeepSpeed sums those of shards
        if isinstance(self.shards, RowShards) and self.scaler.is_enabled():
            self.shards.share_overflow()
        world.sum_([*(each.grad for each in reduced if each.grad is not None), numbers])
        # An optimizer may draw from torch's global generator, which micro-batches have seeded differently per rank.
        torch.manual_seed(draw_seed(self.objective.seed, "optimizer", global_batch.step))
        return numbers

    def _step_in_backward(self, global_batch: GlobalBatch, release: GradientRelease) -> StepResult:
        """Check the losses, then run a backward pass that steps each parameter on its gradient."""
        (batch,) = global_batch.batches
        self._seed(batch, global_batch.step)
        device_losses = self.losses(batch)
        losses = self.read(device_losses.detach())
        _check_losses(global_batch, losses)
        (grad_norm,) = self.read(release.backward(device_losses.sum() / global_batch.size)[None])
        if not math.isfinite(grad_norm):
            raise PartialStepError.for_step("gradient", global_batch.step, global_batch.names)
        return StepResult(math.fsum(losses) / global_batch.size, grad_norm, self._rollout_calls(global_batch))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model computes with the optimizer's averaged weights: see `optim.averaged_weights`."""
        return optim.averaged_weights(self.optimizer, self.masters)

    def discard(self) -> None:
        """Discard the gradients of a step that is not taken."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def _split_losses(values: list[float], global_batch: GlobalBatch) -> tuple[list[float], list[float]]:
    """Split `values` into the samples' losses and their preservation losses; the latter may be empty."""
    count = len(global_batch.names)
    return values[:count], values[count:]


def _check_losses(
    global_batch: GlobalBatch, losses: Sequence[float], preservation_losses: Sequence[float] = ()
) -> None:
    for quantity, values in (("loss", losses), ("preservation loss", preservation_losses)):
        bad_names = [name for name, loss in zip(global_batch.names, values, strict=False) if not math.isfinite(loss)]
        if bad_names:
            raise NotFiniteError.for_step(quantity, global_batch.step, bad_names)
