"""`simpletuner train`, from the checked configuration to the exported weights: `build` a job, then `run` it."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch

import simpletuner
from simpletuner.base import machine
from simpletuner.base.commandline import command_text
from simpletuner.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    MemoryBudgetError,
    Stopped,
    UserError,
)
from simpletuner.base.files import file_errors_reported, sha256_json, write_json
from simpletuner.base.sizes import format_duration, format_size
from simpletuner.config.load import LoadedConfig
from simpletuner.config.previews import preview_flavour, validation_scales
from simpletuner.config.record import recorded_options, weight_options
from simpletuner.config.rules import profile_findings
from simpletuner.config.run import RunConfig
from simpletuner.data.order import Cut, MicroBatch, Order, Visit
from simpletuner.flux2.base_location import locate_on_each_machine
from simpletuner.flux2.components import check_precisions, check_trainable
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import tokens_of
from simpletuner.flux2.load import checked_skeleton
from simpletuner.flux2.lora import Adapter
from simpletuner.flux2.modelspec import modelspec, most_common_size
from simpletuner.flux2.routes import Route, resolve
from simpletuner.flux2.source import Source, locate, locate_preview
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute
from simpletuner.memory.exhausted import exhausted_memory, first_line
from simpletuner.memory.free import release_memory
from simpletuner.memory.machines import with_writers
from simpletuner.memory.planner import phase_line
from simpletuner.memory.shard import idle_pass, is_sharded
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.events import CheckpointEvent, EndEvent, ErrorEvent, EventLog, RunEvent, read_events
from simpletuner.runs.finished import missing_result, write_finished
from simpletuner.runs.layout import EMA_FOLDER, RESULTS, RunDirectory
from simpletuner.runs.process import Requests, stopped
from simpletuner.runs.samplers import stop_samplers
from simpletuner.train import checkpoint, optim, resume, trackers
from simpletuner.train.backend import BackendChoice, check_backend, choose_backend, uncompiled
from simpletuner.train.batches import BatchBuilder
from simpletuner.train.budget import (
    Budget,
    configured_workload,
    least_free_resources,
    reference_tokens_of,
    scanned_workload,
)
from simpletuner.train.caches import PreparedData, base_fingerprints, fill_caches, has_full_fingerprints, scan_sets
from simpletuner.train.drift import DriftMeter
from simpletuner.train.ema import Ema
from simpletuner.train.export import EXPORTS
from simpletuner.train.length import RunSchedule
from simpletuner.train.loop import TrainingLoop, best_step, check_free_disk, shapes_of
from simpletuner.train.placement import open_decoder, residency_text, stream_blocks
from simpletuner.train.preservation import Preservation
from simpletuner.train.preview import PreviewModel, SamplingModel, TrainedModel, tensors_unused_by_preview
from simpletuner.train.product import PRODUCTS, Product, zero_shards
from simpletuner.train.profile import StepProfiler
from simpletuner.train.release import GradientRelease, StepsOneParameter
from simpletuner.train.report import Reporter
from simpletuner.train.rollout import Rollout
from simpletuner.train.state import TrainState
from simpletuner.train.step import NotFiniteError, Objective, Stepper
from simpletuner.train.strata import Strata
from simpletuner.train.throughput import FlopMeter, data_sheet_rate
from simpletuner.train.validate import HeldOutLoss, ValidationSampler, sheet_of, steps_with_drift, steps_with_sheet
from simpletuner.train.watch import Watch

MANY_VISITS = 400
"""Above this number of visits per training image, a LoRA or model usually memorizes the images instead of the subject.
"""

WARM_UP_WORTH_S = 20.0
"""If the first trial pass takes longer than this, skip the second timing pass: warm-up no longer matters."""


@dataclass(frozen=True)
class Job:
    """A run before it starts: configuration, processes, run directory and memory plan. No file has been written."""

    loaded: LoadedConfig
    world: World
    run: RunDirectory
    budget: Budget


def build(loaded: LoadedConfig, world: World) -> Job:
    """Construct the job of a checked configuration. Reads the free memory and disk space, writes nothing.

    Raises:
        ConfigError: the device cannot train with these options.
    """
    if not world.is_alone:
        config = loaded.config.model_copy(update={"num_processes": world.size})
        loaded = replace(loaded, config=config)
    check_device(loaded.config, world.device)
    directory = RunDirectory(Path(loaded.config.output_dir))
    with file_errors_reported(directory.root, ConfigError):
        machine_memory = least_free_resources(world, directory.root)
    return Job(loaded, world, directory, Budget(loaded.config, configured_workload(loaded), machine_memory))


def run(job: Job) -> int:
    """Train to the end; returns the exit code, 0.

    Raises:
        UserError: a problem that the user can fix, with its own exit code. The run's events contain it too.
    """
    if not job.world.is_main:
        return follow(job)
    job.run.create()
    with job.run.lock(), EventLog(job.run.events) as events, Requests(job.run.control) as requests:
        job.run.sweep()

        def poll() -> None:
            requests.poll()
            job.world.check()

        reporter = Reporter(events=events, log=job.run.log, poll=poll)
        # Samplers may have started in the meantime; none may run during training.
        stop_samplers(Path.cwd(), os.environ, reporter.say)
        for text in job.loaded.notices:
            reporter.notice(text)
        attempt = Attempt(job, reporter, requests)
        try:
            with (
                end_events(reporter, attempt),
                job.world.reporting_errors(),
                memory_is_explained(attempt),
                file_errors_reported(job.run.root, doing="use"),
            ):
                attempt()
        finally:
            reporter.trackers.close()
    return 0


def follow(job: Job) -> int:
    """Train as a rank other than 0: rank 0 reports, decides and writes. Returns the exit code.

    Raises:
        UserError: as `run` does.
    """
    with Requests(job.run.control, is_obeying=False) as requests:
        attempt = Attempt(job, Reporter(is_muted=True, poll=job.world.check), requests)
        with (
            job.world.reporting_errors(),
            memory_is_explained(attempt),
            file_errors_reported(job.run.root, doing="use"),
        ):
            attempt()
    return 0


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raise a ConfigError if `device`, as torch sees it, cannot train with `config`."""
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError.of(
            "mixed_precision = fp16 on a machine without a GPU", "bf16 or no", "Give --mixed_precision=bf16."
        )
    check_precisions(config, device)
    check_backend(config, device, compilation.compiler_problem)


class Attempt:
    """One start of a job, fresh or from a checkpoint, until it ends or is stopped."""

    def __init__(self, job: Job, reporter: Reporter, requests: Requests) -> None:
        self.loaded = job.loaded
        self.config = job.loaded.config
        self.world = job.world
        self.run = job.run
        self.device = job.world.device
        self.budget = job.budget
        self.reporter = reporter
        self.requests = requests
        self.state = TrainState()
        self.checkpoint: Path | None = None
        """The checkpoint that was saved or resumed last."""
        self.compiled: compilation.CompiledBlocks | None = None
        self.may_drop_compiled = False
        """Whether `dynamo_backend` auto chose to compile at this start, and may still fall back to eager blocks."""
        self.streaming: offload.Streaming | None = None
        self.began = time.monotonic()

    @property
    def batches_per_step(self) -> int:
        """Micro-batches per global batch, over all processes."""
        return self.config.gradient_accumulation_steps * self.world.size

    @property
    def commands(self) -> resume.RestartCommands:
        """Commands that resume or restart this run."""
        return resume.RestartCommands(self.run, self.loaded)

    def __call__(self) -> None:
        """Find the checkpoint to resume from, plan memory, prepare the data, train and export."""
        self.world = with_writers(self.world, self.run.root)
        if self.world.writing_ranks < self.world.size:
            self.reporter.notice(
                f"The {self.world.machines} machines do not share {self.run.root}: machine 0 stores the run, generates "
                "its validation images, and sends checkpoints to the other machines when the run is resumed."
            )
        with file_errors_reported(self.run.checkpoints, CheckpointError, doing="read"):
            resumed, loaded = resume.find_checkpoint(self.run, self.loaded, self.reporter, self.world)
        if loaded is not self.loaded:
            if self.config.dynamo_backend != loaded.config.dynamo_backend and self.device.type != "cpu":
                self.reporter.say(f"dynamo_backend = {loaded.config.dynamo_backend}, as at the start of this run.")
            self.loaded, self.config = loaded, loaded.config
            check_device(self.config, self.device)
            self.budget = Budget(self.config, configured_workload(loaded), self.budget.machine)
        if resumed is not None:
            self.state, self.checkpoint = resumed.state, resumed.folder
        if resumed is not None and self.config.max_train_steps and self.is_finished(self.config.max_train_steps):
            return
        self.record_config()
        self.plan_memory()
        if self.world.is_main:
            check_free_disk(self.run, self.config, self.reporter, self.requests)
        source = locate_on_each_machine(self.world, lambda: locate(self.config, report=self.reporter.say))
        if source.distillation_warning is not None:
            self.reporter.notice(source.distillation_warning)
        # Check these before the expensive work starts.
        resolve(self.config.tread_routes, source.spec.blocks)
        check_trainable(self.config, self.config, source)
        preview = self.locate_preview(source)
        model = base_fingerprints(self.config, source, self.world)
        if resumed is not None and not has_full_fingerprints(resumed.state.model):
            self.reporter.notice(
                f"{resumed.folder} has fingerprints of only the first 4 KiB of each base tensor, so only these bytes "
                "are compared. Checkpoints saved from now on have fingerprints of whole tensors."
            )
        prepared = scan_sets(self.loaded, source, self.world, self.reporter)
        if resumed is not None:
            comparable_model = base_fingerprints(self.config, source, self.world, like=resumed.state.model)
            resume.check_content(resumed, self.commands, data=prepared.fingerprints, model=comparable_model)
        if self.world.is_main:
            write_json(self.run.datasets, [m.summary() for m in (*prepared.train, *prepared.held_out)])
        current_cut = Cut(self.state.step, self.config.train_batch_size, self.batches_per_step)
        order = Order.of(prepared.train, seed=self.config.seed, cuts=self.state.cuts, now=current_cut)
        if resumed is not None:
            resume.check_windows(resumed, self.commands, prepared.windows, order)
        schedule = RunSchedule.of(self.config, order, self.batches_per_step)
        for text in (*order.notices, *schedule.notices):
            self.reporter.notice(text)
        if self.is_finished(schedule.steps):
            return
        ConfigError.raise_if(problem for _, problem in profile_findings(self.config, schedule.steps))
        fill_caches(prepared, source, self.world, self.reporter)
        if self.config.dynamo_backend == "auto":
            choice = choose_backend(self.config, self.device, schedule.steps, compilation.compiler_problem)
            self.may_drop_compiled = choice.backend != "no"
            self.record_backend(choice)
        self.replan_memory(prepared)
        self.state.config = recorded_options(self.config)
        self.state.data = prepared.fingerprints
        self.state.windows = prepared.windows
        self.state.model = model
        self.train(prepared, source, preview, order, schedule, resumed)

    def train(
        self,
        prepared: PreparedData,
        source: Source,
        preview: Source | None,
        order: Order,
        schedule: RunSchedule,
        resumed: resume.ResumePoint | None,
    ) -> None:
        """Load the model, train it and export it."""
        with self.reporter.phase("load"):
            resolved_config = self.budget.footprint.resolved_config
            product = PRODUCTS[self.config.model_type](resolved_config, source, self.world, self.reporter)
            self.install(product.transformer, order)
            if self.world.is_main:
                product.report_parameters(self.run, self.reporter)
            zero = None if self.world.is_alone else zero_shards(self.config, product, self.world)
        trained = product.trained
        if zero is not None:
            trained.masters = zero
            self.reporter.say(zero.description())
        self.check_disk_space(product, schedule)
        first_elements = None if trained.shards is None else trained.shards.first_elements
        optimizer = optim.build(product.groups(), self.config, seed=self.config.seed, first_elements=first_elements)
        average_device = torch.device("cpu") if self.config.is_average_on_cpu else self.device
        ema = Ema(trained, self.config, average_device) if self.config.use_ema else None
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.mixed_precision == "fp16")
        if resumed is not None:
            with checkpoint.on_each_machine(resumed.folder, self.run, self.world) as folder:
                checkpoint.restore(folder, resumed.state, product, optimizer, ema)
            scaler.load_state_dict(dict(resumed.state.scaler))
            checkpoint_path = str(resumed.folder)
            self.reporter.emit(CheckpointEvent(step=self.state.step, state="resumed", path=resumed.folder.name))
            self.reporter.say(f"Resuming from step {self.state.step} of {schedule.steps} ({checkpoint_path}).")
        forward = None if zero is None else zero.forward
        denoiser = Denoiser(product.transformer, self.config.reference_attention, forward)
        routes = self.routes(product.transformer.spec.blocks, order, prepared)
        strata = Strata(order, seed=self.config.seed, batches_per_step=self.batches_per_step)
        objective = Objective.of(self.config, self.config, self.config.seed, strata)
        idle: Callable[[], None] | None = None
        # Ranks of a sharded model must make equally many calls. With DeepSpeed such a call is a real pass: stage 3
        # gathers weights only in module hooks, and stage 2 reduces gradients in each backward pass.
        if is_sharded(product.transformer) or (zero is not None and zero.stage > 1):
            idle = partial(idle_pass, product.transformer) if zero is None else partial(denoiser.idle, self.device)
        rollout = Rollout.of(self.config, self.config.seed, idle)
        preservation = Preservation.of(self.config, denoiser, trained, idle)
        release = None
        if self.config.optimizer_release_gradients:
            assert isinstance(optimizer, StepsOneParameter)  # config.rules rejects other optimizers
            release = GradientRelease(trained.parameters(), optimizer, self.config)
        stepper = Stepper(
            denoise=denoiser,
            parameters=trained.parameters(),
            optimizer=optimizer,
            options=self.config,
            objective=objective,
            scaler=scaler,
            device=self.device,
            route=denoiser.routed if routes else None,
            rollout=rollout,
            preservation=preservation,
            masters=trained.masters,
            is_autocast=self.config.is_autocast,
            release=release,
            world=None if self.world.is_alone else self.world,
        )
        builder = BatchBuilder(
            self.config,
            prepared,
            order,
            objective,
            rollout,
            batches_per_step=self.batches_per_step,
            world=self.world,
            routes=routes,
        )
        model: SamplingModel = TrainedModel(denoiser)
        if preview is not None and isinstance(trained, Adapter):
            offloads_base, average_state = self.budget.footprint.offloads_base, {} if ema is None else ema.state()
            model = PreviewModel(
                self.budget.footprint.resolved_config,
                preview,
                trained,
                self.device,
                offloaded=lambda: (
                    tensors_unused_by_preview(product.transformer, trained, optimizer, average_state)
                    if offloads_base
                    else []
                ),
                notice=self.reporter.notice,
            )
        self.announce(prepared, schedule, product, resumed)
        if rollout is not None:
            self.reporter.say(rollout.describe())
        if self.config.profiled and self.config.profiled.stop - 1 <= self.state.step:
            self.reporter.notice(
                f"profile_steps = {self.config.profile_steps}: these steps are already done, so none is recorded."
            )

        def save(state: TrainState) -> Path:
            state.scaler = scaler.state_dict()
            metadata = self.header(prepared, source, state.step)
            self.checkpoint = checkpoint.save_checkpoint(
                self.run, state, product, optimizer, ema, metadata=metadata, world=self.world
            )
            return self.checkpoint

        self.reporter.poll()
        self.run_compiled_trial(stepper, builder, schedule)
        self.reporter.poll()
        profiled = self.config.profiled if self.world.is_main else range(0)
        loop = TrainingLoop(
            schedule=schedule,
            run=self.run,
            batches=builder,
            stepper=stepper,
            meter=FlopMeter(
                self.config,
                product.transformer,
                rollout,
                data_sheet_rate(self.device),
                is_compiled=self.compiled is not None,
                preservation=preservation,
            ),
            profiler=StepProfiler(self.run.profiles, profiled, self.device, self.reporter),
            save=save,
            ema=ema,
            held_out=self.held_out(prepared, denoiser, builder),
            sampler=self.sampler(prepared, source, model, product, ema),
            drift=self.drift(prepared, model, product, ema),
            reporter=self.reporter,
            requests=self.requests,
            watch=Watch(trained, self.run, self.reporter.notice, start=self.state.step),
            commands=self.commands,
            world=self.world,
        )
        if self.state.step < schedule.steps and self.world.is_main:
            self.run.finished.unlink(missing_ok=True)  # the run is no longer finished
        with self.requests.between_steps():
            with self.reporter.phase("train"), self.compiling():
                is_done = loop(self.state)
            if self.streaming is not None:
                self.reporter.detail(f"Streamed: {self.streaming.description()}.")
            if not is_done:
                raise stopped(f"stopped after step {self.state.step} of {schedule.steps}; the run is saved")
            if self.world.is_main:
                self.finish(schedule, source, product.noun)
            self.world.barrier("the export")

    def record_backend(self, choice: BackendChoice) -> None:
        """Replace `dynamo_backend` auto by `choice`, also in the recorded configuration, and report the reason."""
        if choice.reason:
            self.reporter.say(choice.reason)
        self.config = self.config.model_copy(update={"dynamo_backend": choice.backend})
        self.loaded = replace(self.loaded, config=self.config)
        self.state.config = recorded_options(self.config)
        self.record_config()

    def record_config(self) -> None:
        """Write the resolved configuration into the run directory."""
        if self.world.is_main:
            write_json(self.run.config, recorded_options(self.config))

    def plan_memory(self) -> None:
        """Report the memory plan from the configuration alone, before anything is downloaded or loaded.

        Raises:
            MemoryBudgetError: the accelerator is too small to train.
        """
        for text in self.budget.lines():
            self.reporter.say(text)
        self.reporter.emit(self.budget.event())
        self.budget.check()

    def replan_memory(self, prepared: PreparedData) -> None:
        """Plan memory again with the scanned images; report it only if the largest micro-batch differs from
        the first plan's.

        Raises:
            MemoryBudgetError: the accelerator is too small to train.
        """
        before = self.budget.workload
        workload = scanned_workload(
            self.loaded, prepared.train, prepared.held_out, prompt_crops=prepared.prompt_references
        )
        if self.config.tread_routes:
            workload = replace(workload, forced_share=max(prepared.forced_shares, default=0.0))
        self.budget = replace(self.budget, workload=workload)
        self.reporter.emit(self.budget.event())
        if (before.bucket, before.batch) != (self.budget.workload.bucket, self.budget.workload.batch):
            train = self.budget.plan.phase("train")
            assert train is not None  # every plan has it
            self.reporter.say(f"Planned with the largest images: {phase_line(train)}")
        self.budget.check()

    def is_finished(self, steps: int) -> bool:
        """Whether all steps are trained and all validation images generated; if so, report it. Missing or damaged
        results are exported again from the checkpoint.
        """
        step = self.state.step
        if step < steps:
            return False
        reason = missing_result(self.run, step)
        if self.world.decide([reason is not None and self.lacks_validation(step)])[0]:
            return False
        if not self.world.is_main:
            self.world.barrier("the export")
            return True
        if reason is not None:
            self.reporter.say(f"{reason}: exporting the results again from {self.checkpoint}.")
            for line in self.export(lambda: locate(self.config, report=self.reporter.say)):
                self.reporter.say(line)
        self.world.barrier("the export")
        self.reporter.say(f"This run is finished: {step} steps, {self.run.result(self.config.model_type)}.")
        self.reporter.say(f"  To train it longer: {self.commands.resume(max_train_steps=2 * step)}")
        self.reporter.say(f"  To continue training with other images: {self.commands.from_weights(None)}")
        self.reporter.say(f"  To start another run: {self.commands.fresh()}")
        return True

    def lacks_validation(self, step: int) -> bool:
        """Whether validation images of `step`, the last one, are enabled but missing on disk or in the events. Without
        prompts: whether its drift is enabled but missing in the events.
        """
        if self.config.validation_disable:
            return False
        if not self.loaded.prompts:
            return self.config.validation_drift_prompts is not None and step not in steps_with_drift(self.run)
        return step not in steps_with_sheet(self.run) or not sheet_of(self.run, step).is_file()

    def install(self, transformer: Flux2Transformer, order: Order) -> None:
        """Prepare a transformer for training: install compilation, streaming and activation checkpointing of its blocks
        as configured.
        """
        if self.config.dynamo_backend != "no":
            shapes = {(micro_batch.bucket, len(micro_batch.visits)) for micro_batch in order.by_bucket()}
            has_references = any(sample.references for manifest in order.manifests for sample in manifest.samples)
            self.compiled = compilation.install(
                transformer.blocks,
                backend=self.config.dynamo_backend,
                mode=self.config.dynamo_mode,
                sizes_vary=len(shapes) > 1 or bool(self.config.tread_routes) or has_references,
                has_references=has_references,
            )
        resolved_config = self.budget.footprint.resolved_config
        self.streaming = stream_blocks(transformer, resolved_config, self.device)
        if self.streaming is not None:
            self.reporter.say(f"Streamed: {self.streaming}{residency_text(resolved_config, transformer.spec)}.")
        if self.config.gradient_checkpointing:
            ahead = self.config.prefetches(self.device.type)
            inputs = recompute.HostInputs(self.device, ahead=ahead) if self.config.activation_offload else None
            recompute.install(
                transformer.blocks,
                self.config.gradient_checkpointing_interval,
                inputs=inputs,
                draws=self.config.lora_dropout > 0,
            )
        offloads = self.streaming is not None or self.config.activation_offload or self.config.group_offload_vae
        if self.device.type == "cpu" and offloads:
            self.reporter.notice(
                "On a CPU, offloading copies within the same memory: the results are the same, no memory is saved, and "
                "group_offload_use_stream has no effect."
            )
        transformer.train()

    def check_disk_space(self, product: Product, schedule: RunSchedule) -> None:
        """Raise a DiskError if one more checkpoint and the finished model do not fit on the disk. Notify the user if
        not all remaining checkpoints fit.
        """
        if self.state.step >= schedule.steps or self.world.rank >= self.world.writing_ranks:
            return
        size, free = product.checkpoint_bytes, machine.free_disk_bytes(self.run.root)
        single = product.single_file_bytes
        if size + single > free:
            single_text = f" and the finished model's single file {format_size(single)}" if single else ""
            raise DiskError.of(
                f"a checkpoint takes about {format_size(size)}{single_text}, but only {format_size(free)} are free "
                f"for {self.run.root}",
                remedy="Free some space, or give an --output_dir on another disk.",
            )
        limit = self.config.checkpoints_total_limit
        remaining_saves = sum(schedule.saves(step) for step in range(self.state.step + 1, schedule.steps + 1))
        saved_count = len(checkpoints.steps(self.run))
        # A new checkpoint is written before the oldest is deleted.
        new_count = min(remaining_saves, max(1, limit + 1 - saved_count))
        if new_count * size + single > free:
            self.reporter.notice(
                f"{self.run.root} will hold {new_count} more checkpoints of about {format_size(size)} each, but only "
                f"{format_size(free)} are free. Lower --checkpoints_total_limit, now {limit}, to need less."
            )

    def routes(self, blocks: int, order: Order, prepared: PreparedData) -> tuple[Route, ...]:
        """TREAD's routes in a model of `blocks` blocks. Reports the tokens they keep, also those under masks."""
        routes = resolve(self.config.tread_routes, blocks)
        width, height = largest_micro_batch(order).bucket
        for route in routes:
            tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
            self.reporter.say(f"{route.description(tokens, blocks)}, at {width}x{height}.")
        shares = prepared.forced_shares if routes else []
        if shares:
            exceeding = sum(share > min(route.keep_ratio for route in routes) for share in shares)
            self.reporter.say(
                f"TREAD keeps all tokens under a mask: {len(shares)} images have a mask, over {min(shares):.0%} to "
                f"{max(shares):.0%} of their tokens, {sum(shares) / len(shares):.0%} on average. In {exceeding} of "
                "them that is more than a route keeps by itself."
            )
        return routes

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A context in which blocks may be compiled. Failures are explained; on exit it reports the compilations."""
        if self.compiled is None:
            yield
            return
        before = self.compiled.count
        with self.compiled.failures_are_explained():
            yield
        if self.compiled.count > before:
            self.reporter.say(f"Compiled: {self.compiled}.")

    def locate_preview(self, source: Source) -> Source | None:
        """`source` with the transformer of `validation_preview_model`; only file headers are checked. None if the
        trained model itself generates the validation images, or none are generated.
        """
        preview_name = self.config.validation_preview_model
        if preview_name is None or self.config.validation_disable or not self.loaded.prompts:
            return None
        flavour = preview_flavour(self.config)
        preview = locate_on_each_machine(
            self.world,
            lambda: locate_preview(self.config, preview_name, source, flavour=flavour, report=self.reporter.say),
        )
        checked_skeleton(preview)
        return preview

    def held_out(self, prepared: PreparedData, denoiser: Denoiser, builder: BatchBuilder) -> HeldOutLoss | None:
        """The held-out loss, over the first caption of every sample; None without eval datasets."""
        chosen = [
            (manifest.image_set, sample)
            for manifest in prepared.held_out
            if self.config.eval_dataset_id in (None, manifest.image_set.id)
            for sample in manifest.samples[: self.config.num_eval_images]
        ]
        if not chosen:
            return None
        return HeldOutLoss(
            denoiser,
            len(chosen),
            lambda index: builder.held_out(*chosen[index]),
            self.world,
            is_sharded=is_sharded(denoiser.transformer),
        )

    def sampler(
        self, prepared: PreparedData, source: Source, model: SamplingModel, product: Product, ema: Ema | None
    ) -> ValidationSampler | None:
        """The sampler of the validation images; None without prompts."""
        if self.config.validation_disable or not self.loaded.prompts:
            return None
        return ValidationSampler(
            run=self.run,
            options=self.config,
            scales=validation_scales(self.config),
            both_at_once=frozenset(size for size in self.config.sizes if self.budget.footprint.batches_guidance(size)),
            seed=self.config.seed,
            model=model,
            trained=product.trained,
            ema=None if self.config.ema_validation == "none" else ema,
            has_live=ema is None or self.config.ema_validation != "ema_only",
            decode=open_decoder(self.config, self.config, source, self.device),
            prompts=self.loaded.prompts,
            context=lambda prompt: prepared.contexts([prompt]),
            references=prepared.references_of,
            reference_crops=prepared.prompt_references,
            world=self.world,
            notice=self.reporter.notice,
            steps_with_sheet=steps_with_sheet(self.run),
            is_sharded=isinstance(model, TrainedModel) and is_sharded(product.transformer),
        )

    def drift(
        self, prepared: PreparedData, model: SamplingModel, product: Product, ema: Ema | None
    ) -> DriftMeter | None:
        """The drift meter; None without `validation_drift_prompts`."""
        if self.config.validation_disable or self.config.validation_drift_prompts is None:
            return None
        return DriftMeter(
            folder=self.run.drift,
            options=self.config,
            scales=validation_scales(self.config),
            seed=self.config.seed,
            model=model,
            trained=product.trained,
            ema=None if self.config.ema_validation == "none" else ema,
            has_live=ema is None or self.config.ema_validation != "ema_only",
            context=lambda prompt: prepared.contexts([prompt]),
            world=self.world,
            is_sharded=isinstance(model, TrainedModel) and is_sharded(product.transformer),
            steps_with_drift=frozenset(steps_with_drift(self.run)),
        )

    def announce(
        self, prepared: PreparedData, schedule: RunSchedule, product: Product, resumed: resume.ResumePoint | None
    ) -> None:
        """Emit the run event, start the trackers, and report images, steps and epochs."""
        self.reporter.emit(
            RunEvent(
                program=f"simpletuner {simpletuner.__version__}",
                pid=os.getpid(),
                resumed_from=None if resumed is None else self.state.step,
                steps=schedule.steps,
                pictures=prepared.image_count,
                trainable=product.trained.parameter_count,
                processes=self.world.size,
                engine=self.budget.footprint.engine,
            )
        )
        if self.config.trackers and self.world.is_main:
            first = next(read_events(self.run.events))
            self.reporter.trackers = trackers.build(
                self.config,
                root=self.run.root,
                resumed_from=None if resumed is None else self.state.step,
                config=recorded_options(self.config),
                run_id=sha256_json([self.run.root.name, first["time"]])[:12],
                notice=self.reporter.notice,
            )
        processes = "" if self.world.is_alone else f" on {self.world.size} processes"
        self.reporter.say(
            f"{prepared.image_count} images, {schedule.steps} steps{processes}: {schedule.epochs:.1f} epochs."
        )

    def run_compiled_trial(self, stepper: Stepper, builder: BatchBuilder, schedule: RunSchedule) -> None:
        """Call `run_trial`, which may compile blocks for the first time. If compilation fails and `dynamo_backend` is
        auto, the run trains uncompiled from its first step.
        """
        try:
            with self.compiling():
                self.run_trial(stepper, builder, schedule)
        except ConfigError as error:
            self.reporter.poll()  # Ctrl-C in a terminal also ends the compiler: stop then, do not fall back
            if self.compiled is None or not self.may_drop_compiled:
                raise
            self.compiled.is_on = False
            self.compiled = None
            stepper.optimizer.zero_grad(set_to_none=True)
            self.record_backend(uncompiled(error.problems[0].found))
            self.run_trial(stepper, builder, schedule)

    def run_trial(self, stepper: Stepper, builder: BatchBuilder, schedule: RunSchedule) -> None:
        """Run one forward and backward pass at the largest bucket, without an update. The run thus fails
        now if memory is too small, not in an hour, and its duration can be estimated.
        """
        remaining_steps = schedule.steps - self.state.step
        if remaining_steps <= 0:
            return
        largest_batch = largest_micro_batch(builder.order)
        trial = builder.trial(largest_batch)
        self.reporter.activity = f"running a trial pass over {shapes_of(trial)}"
        seconds = math.inf
        for _ in range(2):  # the first pass also warms up libraries
            began = time.monotonic()
            try:
                stepper.backward(trial)
            except NotFiniteError as error:
                # With skip_bad_batches, the step that trains this batch handles the error.
                if self.config.skip_bad_batches == 0:
                    raise DataError.of(
                        error.problems[0].found, remedy=self.commands.past_bad_batch(self.state)
                    ) from None
            stepper.optimizer.zero_grad(set_to_none=True)
            seconds = min(seconds, time.monotonic() - began)
            if self.world.decide([seconds > WARM_UP_WORTH_S and self.compiled is None])[0]:
                break
        self.reporter.activity = ""
        total_seconds = seconds * self.config.gradient_accumulation_steps * remaining_steps
        width, height = largest_batch.bucket
        self.reporter.say(
            f"A pass over {trial.size} × {width}x{height} takes {format_duration(seconds)}: "
            f"about {format_duration(total_seconds)} for {remaining_steps} steps, without validation and saving."
        )
        image_count = builder.prepared.image_count
        visits = schedule.steps * schedule.batches_per_step * trial.size / image_count
        if visits > MANY_VISITS:
            self.reporter.notice(
                f"{schedule.steps} steps on {image_count} images show each image about {visits:.0f} times. "
                "A model usually copies its training images long before that: watch the validation images and the "
                "held-out loss, or give a lower --max_train_steps."
            )
        elif visits < 1:
            steps_for_all = math.ceil(schedule.steps / visits)
            self.reporter.notice(
                f"{schedule.steps} steps show only {round(visits * image_count)} of {image_count} images: "
                f"--max_train_steps={steps_for_all} shows each about once."
            )

    def header(self, prepared: PreparedData, source: Source, step: int) -> dict[str, str]:
        """Metadata of a saved file, without paths or secrets. Its options and fingerprints cover everything that
        decides the weights, and no option that a resumed run may change.
        """
        config = self.config
        options = weight_options(recorded_options(config))
        data = [prepared.fingerprints, prepared.windows] if prepared.windows else prepared.fingerprints
        trigger, comment = config.modelspec_trigger_phrase, config.modelspec_comment
        fields = {
            "base_model": source.name,
            "licence": source.flavour.license,
            "version": simpletuner.__version__,
            "step": str(step),
            "options": json.dumps(options, sort_keys=True),
            "config": sha256_json(options),
            "datasets": sha256_json(data),
            "run": sha256_json([source.fingerprint("transformer"), options, data]),
        }
        optional_fields = {"comment": comment, "trigger_phrase": trigger}
        fields |= {name: text for name, text in optional_fields.items() if text is not None}
        size = most_common_size(manifest.buckets for manifest in prepared.train)
        is_lora = config.model_type == "lora"
        return fields | modelspec(source.flavour, is_lora=is_lora, resolution=size, comment=comment, trigger=trigger)

    def export(self, find_source: Callable[[], Source]) -> tuple[str, ...]:
        """Export the trained weights to the files that other programs load. Returns lines for the user.
        `find_source` locates the base model.
        """
        assert self.checkpoint is not None  # the last step is always saved
        with self.reporter.phase("export"):
            export = EXPORTS[self.config.model_type]
            exported = export(self.config, self.run, self.checkpoint, find_source, self.reporter)
            write_finished(self.run, self.state.step, self.checkpoint, exported.products)
        return exported.lines

    def finish(self, schedule: RunSchedule, source: Source, noun: str) -> None:
        """Export, and report the held-out losses, the images and the result files."""
        lines = self.export(lambda: source)
        self.reporter.say("")
        measured = self.state.held_out
        if 0 in measured and schedule.steps in measured:
            before, after = measured[0], measured[schedule.steps]
            self.reporter.say(
                f"Held-out loss: {before:.4f} before, {after:.4f} after ({(after - before) / before:+.1%})"
            )
        best = best_step(self.run, self.state)
        if best is not None:
            sheet = sheet_of(self.run, best)
            images = f", images {sheet}" if sheet.is_file() else ""
            self.reporter.say(f"Lowest held-out loss: {measured[best]:.4f}, {self.run.checkpoint(best)}{images}")
        sheet = sheet_of(self.run, schedule.steps)
        if sheet.is_file():
            self.reporter.say(f"Validation images: {sheet}")
        for line in lines:
            self.reporter.say(line)
        if source.flavour.repo is not None:
            self.reporter.say(f"License of the base model, which applies to this {noun} too: {source.flavour.license}")
        self.reporter.say(f"Try it: {command_text('simpletuner', 'sample', '--run', self.run.root, '--prompt', '…')}")
        release_memory(self.device)


def largest_micro_batch(order: Order) -> MicroBatch:
    """The micro-batch with the most tokens. If its bucket has references, it includes the sample with the most
    reference tokens.
    """
    manifests = order.manifests

    def heaviest(micro_batch: MicroBatch) -> tuple[int, MicroBatch]:
        first, *other_visits = micro_batch.visits
        manifest = manifests[first.set_index]
        tokens = [reference_tokens_of(manifest.samples[index]) for index in manifest.buckets[micro_batch.bucket]]
        if any(tokens):
            heaviest_index = manifest.buckets[micro_batch.bucket][tokens.index(max(tokens))]
            micro_batch = replace(micro_batch, visits=(Visit(first.set_index, heaviest_index), *other_visits))
        return (tokens_of(micro_batch.bucket) + max(tokens)) * len(micro_batch.visits), micro_batch

    candidates = [heaviest(micro_batch) for micro_batch in order.by_bucket()]
    _, heaviest_batch = max(candidates, key=itemgetter(0))
    return heaviest_batch


@contextlib.contextmanager
def end_events(reporter: Reporter, attempt: Attempt) -> Iterator[None]:
    """Emit the run's last events when the block ends, normally or by an error. A full disk cannot hide that error."""

    def end(reason: Literal["done", "stopped", "error"], exit_code: int) -> None:
        paths: dict[str, str] = {}
        if reason == "done":
            kind = attempt.config.model_type
            paths[kind] = RESULTS[kind]
            if attempt.config.use_ema:
                paths[f"ema_{kind}"] = f"{EMA_FOLDER}/{RESULTS[kind]}"
        reporter.emit(
            EndEvent(
                reason=reason,
                exit_code=exit_code,
                step=attempt.state.step,
                seconds=round(time.monotonic() - attempt.began, 1),
                lora=paths.get("lora"),
                ema_lora=paths.get("ema_lora"),
                model=paths.get("full"),
                ema_model=paths.get("ema_full"),
            )
        )

    try:
        yield
    except Stopped as error:
        with contextlib.suppress(DiskError):
            end("stopped", error.exit_code)
        raise
    except UserError as error:
        with contextlib.suppress(DiskError):
            reporter.emit(ErrorEvent(exit_code=error.exit_code, text=str(error)))
            end("error", error.exit_code)
        raise
    except BaseException as error:
        with contextlib.suppress(DiskError):
            reporter.emit(ErrorEvent(exit_code=1, text=f"{type(error).__name__}: {error}"))
            end("error", 1)
        raise
    end("done", 0)


@contextlib.contextmanager
def memory_is_explained(attempt: Attempt) -> Iterator[None]:
    """Turn a failed allocation into a MemoryBudgetError. It names the activity that failed, planned and measured memory
    of its phase, and the smallest change that takes less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        tier = exhausted_memory(error)
        if tier is None:
            raise
        reporter = attempt.reporter
        sentences = [f"It happened while {reporter.activity}."] if reporter.activity else []
        sentences += attempt.budget.explain(
            reporter.last_phase, tier, reporter.peak_memory(), has_checkpoint=checkpoints.steps(attempt.run) != []
        )
        sentences.append("Caches and checkpoints are kept.")
        raise MemoryBudgetError.of(first_line(error), remedy=" ".join(sentences)) from error
