"""The training loop. Validation, saving and disk checks are plain `if`s in it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simpletuner.base import machine
from simpletuner.base.errors import DataError, DiskError, UserError
from simpletuner.base.sizes import format_duration, format_size
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.data.ahead import prefetched_map
from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.memory.free import release_memory
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints, disk
from simpletuner.runs.events import CheckpointEvent, StepEvent, ValidationEvent, last_losses
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.process import Requests
from simpletuner.train import optim
from simpletuner.train.drift import DriftMeter
from simpletuner.train.ema import Ema
from simpletuner.train.length import RunSchedule
from simpletuner.train.profile import StepProfiler
from simpletuner.train.report import AVERAGED_STEPS, Reporter, TrainingBar
from simpletuner.train.resume import RestartCommands
from simpletuner.train.state import TrainState
from simpletuner.train.step import NotFiniteError, PartialStepError, Stepper, StepResult
from simpletuner.train.throughput import FlopMeter
from simpletuner.train.validate import HeldOutLoss, ValidationSampler, failure_reason
from simpletuner.train.watch import Watch


@dataclass(frozen=True)
class TrainingLoop:
    """Trains a run step by step; validates, saves and reports at the steps where that is due."""

    schedule: RunSchedule
    run: RunDirectory
    batches: Callable[[int], GlobalBatch]
    """Builds the global batch of a step from the caches. The result depends on the step alone."""
    stepper: Stepper
    meter: FlopMeter
    profiler: StepProfiler
    save: Callable[[TrainState], Path]
    ema: Ema | None
    held_out: HeldOutLoss | None
    sampler: ValidationSampler | None
    drift: DriftMeter | None
    reporter: Reporter
    requests: Requests
    watch: Watch
    commands: RestartCommands
    world: World
    """Rank 0 decides for all ranks what is due."""

    def __call__(self, state: TrainState) -> bool:
        """Train from `state` to the end. Returns whether the end was reached; False means that a stop request ended it.

        Raises:
            DataError: a loss or gradient is not finite. The last good state is saved.
            DiskError: the disk fills up. The last good state is saved if there is room.
        """
        if self.world.is_main:
            check_free_disk(self.run, self.schedule.config, self.reporter, self.requests)
        self.world.barrier("disk space")
        self._catch_up(state)
        losses = last_losses(self.run.events, state.step, AVERAGED_STEPS)
        bar = TrainingBar(self.reporter, done=state.step, total=self.schedule.steps, losses=losses)
        try:
            with self.profiler:
                return self._steps(state, bar)
        finally:
            bar.close()

    def _catch_up(self, state: TrainState) -> None:
        """Validate before the first step: at step 0 the base model; on resume, whatever a killed attempt did not finish
        after its checkpoint.
        """
        self._ensure_drift_base(state.step)
        if state.step == 0:
            self._measure(state)
            if self.schedule.config.validation_on_startup or self._lacks_base_images():
                self._validate(0)
            return
        if self._lacks_base_images():
            self.reporter.notice(
                "The base model's validation images are missing, and training has changed its weights: the contact "
                "sheet continues without them."
            )
        if self.schedule.measures_held_out(state.step) and state.step not in state.held_out:
            self._measure(state)
        if self.schedule.validates(state.step) and not self._is_validated(state.step):
            self._validate(state.step)

    def _is_validated(self, step: int) -> bool:
        """Whether the contact sheet of `step` exists and is in the events; without prompts, whether its drift is in the
        events. An event with a sheet has the drift too.
        """
        if self.sampler is not None:
            return self.sampler.is_complete(step)
        return self.drift is None or self.drift.is_measured(step)

    def _lacks_base_images(self) -> bool:
        """Whether the base model's images are missing and can only be generated before the first step."""
        return self.sampler is not None and not self.sampler.keeps_base and self.sampler.lacks_base

    def _steps(self, state: TrainState, bar: TrainingBar) -> bool:
        options = self.schedule.config
        disk_checked_at = began = time.monotonic()
        steps = range(state.step + 1, self.schedule.steps + 1)
        for batch in batches_of(steps, self.batches, self.stepper.device, prefetch=options.dataloader_prefetch):
            lr = optim.learning_rate(options, batch.step, self.schedule.steps)
            self.profiler.begin(batch.step)
            self.reporter.activity = f"training step {batch.step} ({shapes_of(batch)})"
            waited = time.monotonic() - began
            result = self._step(batch, lr, state)
            state.step = batch.step
            state.micro_batches += self.schedule.batches_per_step
            if result is None:
                bar.skip()
            else:
                self._report_step(batch, lr, result, bar, waited=waited, seconds=time.monotonic() - began)
            self.profiler.end(batch.step)

            is_last = batch.step == self.schedule.steps
            is_disk_check_due = time.monotonic() - disk_checked_at > disk.CHECK_SPACE_EVERY_S
            # Take requests at every step: a save or validation that is due anyway also satisfies a request for it.
            decisions = [not is_last and self.requests.take("stop")]
            decisions += [self.requests.take("save"), self.requests.take("validate"), is_disk_check_due]
            is_stopping, is_saving, is_validating, is_checking_disk = self.world.decide(decisions)
            is_saving = is_saving or self.schedule.saves(batch.step) or is_stopping
            is_validating = is_validating or self.schedule.validates(batch.step)
            if self.schedule.measures_held_out(batch.step):
                try:
                    self._measure(state)
                except (UserError, OSError, MemoryError, RuntimeError):
                    if self.world.is_alone:  # other ranks may wait in a different collective call
                        self._save(state)  # the step is trained, and the next start measures again
                    raise
            if is_saving:
                self._save(state)
            if is_stopping:
                return False
            if is_validating:
                self._validate(batch.step)
            if is_checking_disk:
                disk_checked_at = time.monotonic()
                self._check_free_disk(state)
            began = time.monotonic()  # leave out the time between steps
            bar.unpause()
        return True

    def _step(self, batch: GlobalBatch, lr: float, state: TrainState) -> StepResult | None:
        """Train on `batch`. Returns None if a loss or gradient is not finite and `skip_bad_batches` allows skipping the
        step. `state` is the state before this step.
        """
        allowed = self.schedule.config.skip_bad_batches
        try:
            result = self.stepper(batch, lr)
        except NotFiniteError as error:
            finding = error.problems[0].found
            is_partial = isinstance(error, PartialStepError)
            if len(state.skipped_steps) >= allowed:
                if state.step > 0 and not is_partial:
                    self._save(state)
                raise DataError.of(finding, remedy=self.commands.past_bad_batch(state, is_partial=is_partial)) from None
            self.stepper.discard()
            state.skipped_steps.append(batch.step)
            subject = "The rest of the step" if is_partial else "The step"
            self.reporter.notice(
                f"{finding}. {subject} is skipped, {len(state.skipped_steps)} of {allowed} (skip_bad_batches)."
            )
            return None
        if self.ema is not None:
            with optim.averaged_weights(self.stepper.optimizer):
                self.ema.update(batch.step)
        return result

    def _report_step(
        self, batch: GlobalBatch, lr: float, result: StepResult, bar: TrainingBar, *, waited: float, seconds: float
    ) -> None:
        """Report a step that was taken, and check whether it was effective and fast enough."""
        peak = self.reporter.peak_memory()
        rates = self.meter.throughput(batch, seconds)
        event = StepEvent(
            step=batch.step,
            epoch=batch.epoch,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            seconds=round(seconds, 4),
            preservation_loss=result.preservation_loss,
            rollout_calls=result.rollout_calls,
            memory_gib=peak.used_gib,
            memory_allocated_gib=peak.allocated_gib,
            images_per_s=four_digits(rates.images_per_s),
            tflop_per_s=four_digits(rates.tflop_per_s),
            mfu=None if rates.mfu is None else round(rates.mfu, 4),
            hfu=None if rates.hfu is None else round(rates.hfu, 4),
        )
        self.reporter.emit(event)
        bar.step(event)
        if math.isfinite(result.grad_norm):  # fp16's scaler skips the others
            self.watch.trained_step(lr)
        if batch.step not in self.schedule.config.profiled:
            self.watch.timed_step(
                batch.step, shapes_of(batch), seconds=seconds, waited=waited, tflop_per_s=rates.tflop_per_s
            )

    def _measure(self, state: TrainState) -> None:
        """Compute, store and report the held-out loss, if there are held-out samples."""
        if self.held_out is None:
            return
        with self.reporter.phase("validation", "measuring the held-out loss") as progress, self.stepper.averaged():
            by_sigma = self.held_out(progress)
            ema_loss = None
            if self.ema is not None and self.schedule.config.ema_validation != "none":
                with self.ema.applied():
                    ema_loss = mean(self.held_out(progress))
        loss = mean(by_sigma)
        state.held_out[state.step] = loss
        self.reporter.emit(
            ValidationEvent(
                step=state.step,
                loss=loss,
                loss_by_sigma={str(sigma): value for sigma, value in by_sigma.items()},
                ema_loss=ema_loss,
            )
        )
        parts = ", ".join(f"σ {sigma}: {value:.4f}" for sigma, value in by_sigma.items())
        self.reporter.say(f"Held-out loss at step {state.step}: {loss:.4f} ({parts})")
        if ema_loss is not None:
            self.reporter.say(f"Held-out loss of the moving average: {ema_loss:.4f}")

    def _validate(self, step: int) -> None:
        """Generate the validation images and measure the drift, and report both."""
        event = None
        if self.sampler is not None:
            with self.reporter.phase("validation") as progress, self.stepper.averaged():
                event = self.sampler.sample_base(step, progress)
                if step > 0:
                    if event is not None:
                        self.reporter.emit(event)
                    event = self.sampler.sample(step, progress)
        if step > 0 and self.drift is not None:
            event = self._with_drift(self.drift, event, step)
        if event is not None:
            self.reporter.emit(event)
            if event.sheet is not None:
                self.reporter.say(f"Validation images at step {step}: {self.run.root / event.sheet}")

    def _ensure_drift_base(self, step: int) -> None:
        """Sample the drift prompts with the base model before training changes it."""
        if self.drift is None or (step > 0 and not self.drift.lacks_base):
            return
        with self.reporter.phase("validation", "sampling the drift prompts with the base model") as progress:
            if not self.drift.ensure_base(step, progress):
                self.reporter.notice(
                    "The base model's latents for validation_drift_prompts are missing, and training has changed its "
                    f"weights: no drift is measured. To measure it from the start: {self.commands.fresh()}."
                )

    def _with_drift(self, drift: DriftMeter, event: ValidationEvent | None, step: int) -> ValidationEvent | None:
        """Measure and report the drift. Returns `event`, or a new event of `step`, with the drift added; the unchanged
        `event` if the drift could not be measured.
        """
        drifts: dict[str, dict[str, float]] = {}

        def measure() -> None:
            with self.reporter.phase("validation", "measuring the drift") as progress, self.stepper.averaged():
                if drift.ensure_base(step, progress):
                    drifts.update(drift(progress))

        # With several ranks the error is fatal: the others wait in a collective call.
        reason = failure_reason(measure, is_fatal=lambda: not self.world.is_alone)
        if reason is not None:
            release_memory(self.world.device)
            self.reporter.notice(f"The drift at step {step} could not be measured: {reason} Training continues.")
        if not drifts:
            return event
        event = with_drift(event or ValidationEvent(step=step), drifts)
        average = "" if event.ema_drift is None else f"{event.ema_drift:.3f} (moving average)"
        live = "" if event.drift is None else f"{event.drift:.3f}"
        self.reporter.say(f"Drift at step {step}: {', '.join(filter(None, (live, average)))}")
        return event

    def _save(self, state: TrainState) -> None:
        """Save a checkpoint, report it, and delete the oldest ones beyond `checkpoints_total_limit`."""
        folder = self.save(state)
        if not self.world.is_main:
            return
        size = checkpoints.size(folder)
        relative_path = str(folder.relative_to(self.run.root))
        self.reporter.emit(CheckpointEvent(step=state.step, state="saved", path=relative_path, bytes=size))
        self.reporter.say(f"Checkpoint at step {state.step}: {folder} ({format_size(size)})")
        self.watch.saved(state.step)
        best = best_step(self.run, state)
        protect = frozenset() if best is None else frozenset({best})
        for step in checkpoints.prune(self.run, self.schedule.config.checkpoints_total_limit, protect):
            pruned_path = str(self.run.checkpoint(step).relative_to(self.run.root))
            self.reporter.emit(CheckpointEvent(step=step, state="pruned", path=pruned_path))

    def _check_free_disk(self, state: TrainState) -> None:
        """Call `check_free_disk` on rank 0. Before it stops the run, all ranks save a checkpoint."""
        options = self.schedule.config
        (is_low,) = self.world.decide([machine.free_disk_bytes(self.run.root) < options.disk_low_bytes])
        if is_low and options.disk_low_action == "stop":
            self._save(state)
        if is_low and self.world.is_main:
            check_free_disk(self.run, options, self.reporter, self.requests, f"The run is saved at step {state.step}")
        self.world.barrier("disk space")


def check_free_disk(
    run: RunDirectory,
    options: CheckpointOptions,
    reporter: Reporter,
    requests: Requests,
    saved_text: str = "Caches and checkpoints are kept",
) -> None:
    """If less than `disk_low_threshold` is free, stop the run or wait for space, as `disk_low_action` says.
    `saved_text` tells the user what is saved if the run stops.

    Raises:
        DiskError: too little space is free, and `disk_low_action` is stop.
    """
    limit = options.disk_low_bytes
    free = machine.free_disk_bytes(run.root)
    if free >= limit:
        return
    finding = f"{format_size(free)} free for {run.root}, below disk_low_threshold ({format_size(limit)})"
    if options.disk_low_action == "stop":
        raise DiskError.of(
            finding,
            remedy=f"{saved_text}: free some space, or lower --disk_low_threshold, and run the same command again.",
        )
    reporter.notice(f"{finding}: waiting for space.")
    waited = disk.wait_for_space(run.root, limit, until=lambda: requests.take("stop"))
    reporter.notice(f"Continuing after {format_duration(waited)}.")


def batches_of(
    steps: range, build: Callable[[int], GlobalBatch], device: torch.device, *, prefetch: bool
) -> Iterator[GlobalBatch]:
    """Yield the global batches of `steps`. For an accelerator they are in pinned memory, so that copies do not block;
    with `prefetch` a thread reads, draws and pins the next batch while the current one trains. On a CPU nothing is
    prefetched: the thread would compete for cores with OpenMP's spinning threads, and a step took a third longer
    (docs/log.md).
    """
    if device.type == "cpu":
        return map(build, steps)

    def build_pinned(step: int) -> GlobalBatch:
        return build(step).pin_memory()

    return prefetched_map(build_pinned, steps, workers=1, ahead=2) if prefetch else map(build_pinned, steps)


def shapes_of(batch: GlobalBatch) -> str:
    """Batch sizes and pixels of the micro-batches, each once: "2 × 1024x768, 2 × 768x1024"."""
    shapes = []
    for each in batch.batches:
        count, _, height, width = each.latents.shape
        shapes.append(f"{count} × {width * PIXELS_PER_TOKEN}x{height * PIXELS_PER_TOKEN}")
    return ", ".join(dict.fromkeys(shapes))


def four_digits(value: float) -> float:
    """Round `value` to four significant digits: rates lie between a thousandth and a thousand."""
    return float(f"{value:.4g}")


def mean(values: Mapping[Any, float]) -> float:
    return math.fsum(values.values()) / len(values)


def with_drift(event: ValidationEvent, drifts: Mapping[str, Mapping[str, float]]) -> ValidationEvent:
    """`event` with the drifts that a `DriftMeter` returns."""
    means = {view: mean(by_prompt) for view, by_prompt in drifts.items()}
    by_prompt = drifts["live" if "live" in drifts else "ema"]
    return event.model_copy(
        update={"drift": means.get("live"), "drift_by_prompt": by_prompt, "ema_drift": means.get("ema")}
    )


def best_step(run: RunDirectory, state: TrainState) -> int | None:
    """The step of the existing checkpoint with the lowest held-out loss; None if no checkpoint has one."""
    measured = {step: state.held_out[step] for step in checkpoints.steps(run) if step in state.held_out}
    return min(measured, key=measured.__getitem__, default=None)
