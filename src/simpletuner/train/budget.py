"""Plan a run's memory before it starts: peak memory per phase, whether it fits, and the smallest change that fits."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from simpletuner.base import machine
from simpletuner.base.errors import DataError, MemoryBudgetError
from simpletuner.base.sizes import format_duration, format_seconds, format_size
from simpletuner.config.datasets import ImageSet
from simpletuner.config.load import LoadedConfig
from simpletuner.config.options.offload import AUTO
from simpletuner.config.options.ranks import ZERO_STAGES
from simpletuner.config.precisions import PRECISIONS
from simpletuner.config.previews import preview_source
from simpletuner.config.record import MAY_CHANGE
from simpletuner.config.run import RunConfig
from simpletuner.data.geometry import aligned_square
from simpletuner.data.manifest import Manifest, count_new, scan_of
from simpletuner.data.order import Order
from simpletuner.data.preserved import PreservedPrompts
from simpletuner.data.references import LARGEST_REFERENCE, reference_crops
from simpletuner.data.sample import Crop, Sample
from simpletuner.flux2.arithmetic import training_flop
from simpletuner.flux2.footprint import Architecture, Footprint, Workload, tokens_of
from simpletuner.flux2.model_locations import base_name, missing_download
from simpletuner.flux2.tokenizer import longest_caption
from simpletuner.memory.free import free_memory_bytes
from simpletuner.memory.peak import PeakMemory
from simpletuner.memory.planner import (
    MachineMemory,
    MemoryPlan,
    MemoryTier,
    OptionValue,
    PlannedPhase,
    Remedy,
    engine_table,
    phase_line,
    plan_table,
    plan_title,
    smallest_change,
    verdict,
    with_less_memory,
)
from simpletuner.memory.world import World
from simpletuner.runs.events import Phase, PlanEvent
from simpletuner.train.engine import EngineAdvice, advise, is_possible, with_options
from simpletuner.train.length import RunSchedule

RESOLUTION = "resolution"
"""An option of the image datasets, not of the run."""
IN_SETS = "in each image set"
"""The place of such an option, in messages."""

TIER_WORDS: Mapping[MemoryTier, str] = {"accelerator": "VRAM", "ram": "RAM"}
"""Names of the memory tiers in the summary sentence."""

REMEDY_TARGET = 0.9
"""After a failed allocation, suggest only changes that need at most this fraction of the memory that was planned or
used, whichever is less: the plan is not exact.
"""

PLAN_PHASES: Mapping[Phase, PlannedPhase] = {
    "text": "text",
    "latents": "latents",
    "load": "train",
    "train": "train",
    "validation": "validation",
}
"""For each phase of a run, the phase of the memory plan that covers it."""


def free_resources(device: torch.device, folder: Path, gpus: int = 1) -> MachineMemory:
    """The free bytes of this machine: on `device`, in RAM, and on the disk of `folder`, which need not exist yet.

    Args:
        gpus: if above 1, use the GPU with the least free memory among the first `gpus`, instead of `device`.
    """
    accelerator = free_memory_bytes(device) if device.type == "cuda" else None
    if accelerator is not None and gpus > 1:
        indices = range(min(gpus, torch.cuda.device_count()))
        accelerator = min(free_memory_bytes(torch.device("cuda", index)) for index in indices)
    return MachineMemory(accelerator, free_memory_bytes(torch.device("cpu")), machine.free_disk_bytes(folder))


def least_free_resources(world: World, folder: Path) -> MachineMemory:
    """The minimum of `free_resources` over all processes of `world`, so that all of them make the same plan.

    Raises:
        RanksError: a process died or timed out.
    """
    local = free_resources(world.device, folder)
    if world.is_alone:
        return local
    resources_of_ranks = [MachineMemory(**each) for each in world.gather_json(asdict(local))]

    def least(values: Iterable[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return MachineMemory(
        least(each.accelerator for each in resources_of_ranks),
        min(each.ram for each in resources_of_ranks),
        least(each.disk for each in resources_of_ranks),
    )


def with_processes(config: RunConfig, gpus: int) -> RunConfig:
    """`config` with the number of processes that `train` would start on machines with `gpus` visible GPUs each."""
    if config.num_processes is not None:
        return config
    per_machine = max(1, gpus) if config.takes_every_gpu else 1
    return config.model_copy(update={"num_processes": config.num_machines * per_machine})


def configured_workload(loaded: LoadedConfig) -> Workload:
    """The workload from the configuration alone, without reading any image."""
    sets = loaded.datasets.train_sets
    run_batch = loaded.config.train_batch_size
    loads: list[_Load] = []
    reference_sizes: list[tuple[int, int]] = []
    for each in sets:
        conditions = loaded.datasets.conditions_of(each)
        loose_sizes = [aligned_square(item) for item in conditions if item.conditioning_type == "reference_loose"]
        strict_tokens = tokens_of(_size(each)) * sum(
            item.conditioning_type == "reference_strict" for item in conditions
        )
        loads.append(
            _Load(
                _size(each),
                each.train_batch_size or run_batch,
                strict_tokens + sum(map(tokens_of, loose_sizes)),
                strict_tokens,
            )
        )
        reference_sizes += loose_sizes
    largest = max(loads, key=lambda load: load.tokens)
    max_references = max((len(prompt.references) for prompt in loaded.validation_prompts), default=0)
    prompt_reference_sizes = [LARGEST_REFERENCE] * max_references
    largest_encoded = max([*map(_size, sets), *reference_sizes, *prompt_reference_sizes], key=math.prod)
    return Workload(
        largest.size,
        largest.batch,
        references=largest.reference_tokens,
        strict_references=largest.strict_tokens,
        largest_encoded_size=None if largest_encoded == largest.size else largest_encoded,
        prompt_reference_tokens=sum(map(tokens_of, prompt_reference_sizes)),
        samples_images=_samples_images(loaded),
    )


@dataclass(frozen=True)
class _Load:
    """The images of a micro-batch."""

    size: tuple[int, int]
    """(width, height) of each image, in pixels."""
    batch: int
    reference_tokens: int
    """Reference tokens of the sample with the most; the other samples are padded to it."""
    strict_tokens: int
    """How many of these are tokens of strict references, which have the image's size."""

    @property
    def tokens(self) -> int:
        return (tokens_of(self.size) + self.reference_tokens) * self.batch


def _size(image_set: ImageSet) -> tuple[int, int]:
    """(width, height) assumed for an image: a square of the dataset's resolution; 3:2 where the resolution is the
    shorter edge and aspect ratios are kept.
    """
    if image_set.resolution_type == "pixel" and not (image_set.crop and image_set.crop_aspect == "square"):
        width, height = aligned_square(image_set)
        return width * 3 // 2 // 16 * 16, height
    return aligned_square(image_set)


def quick_workload(loaded: LoadedConfig, limit: int = 50) -> Workload:
    """The workload from a scan of the images, if that is quick: at most `limit` images are new since the last scan.
    Otherwise, or if a folder is missing or empty, the workload from the configuration.
    """
    manifests: list[list[Manifest]] = []
    try:
        for sets in (loaded.datasets.train_sets, loaded.datasets.eval_sets):
            pairs = [(each, loaded.datasets.conditions_of(each)) for each in sets]
            if sum(count_new(*pair) for pair in pairs) > limit:
                return configured_workload(loaded)
            manifests.append([scan_of(loaded, each) for each in sets])
    except (DataError, OSError):  # `train` and `dataset scan` report these errors
        return configured_workload(loaded)
    return scanned_workload(loaded, *manifests)


def scanned_workload(
    loaded: LoadedConfig,
    train: Sequence[Manifest],
    held_out: Sequence[Manifest] = (),
    *,
    prompt_crops: Mapping[str, Crop] | None = None,
) -> Workload:
    """The workload from scanned images.

    Args:
        prompt_crops: the crops of validation prompts' references by path; None reads them.

    Raises:
        ConfigError: a prompt's reference is not an image, or its size is out of range for a reference.
    """
    run_batch = loaded.config.train_batch_size
    loads = [
        _load_of(manifest, bucket, manifest.image_set.train_batch_size or run_batch)
        for manifest in train
        for bucket in manifest.buckets
    ]
    largest = max(loads, key=lambda load: load.tokens)
    samples = [sample for manifest in (*train, *held_out) for sample in manifest.samples]
    references = {crop for sample in samples for crop in sample.references}
    if prompt_crops is None:
        prompt_crops = reference_crops(path for prompt in loaded.validation_prompts for path in prompt.references)
    references.update(prompt_crops.values())
    largest_encoded = max((crop.geometry.target for crop in (*samples, *references)), key=math.prod)
    captions = {caption for sample in samples for caption in sample.captions}
    captions |= {prompt.text for prompt in loaded.prompts.values()} | set(loaded.config.validation_drift_prompts or ())
    captions.update(*map(PreservedPrompts(loaded.config).all_of, train))
    longest = longest_caption(captions, loaded.config)
    per_step = loaded.config.gradient_accumulation_steps * loaded.config.ranks
    order = Order(train, seed=loaded.config.seed, batch_size=run_batch, batches_per_step=per_step)
    schedule = RunSchedule.of(loaded.config, order, per_step)
    train_images = sum(len(manifest.samples) for manifest in train)
    return Workload(
        largest.size,
        largest.batch,
        references=largest.reference_tokens,
        strict_references=largest.strict_tokens,
        largest_encoded_size=None if largest_encoded == largest.size else largest_encoded,
        prompt_reference_tokens=max(
            (
                _reference_tokens(prompt_crops[path] for path in prompt.references)
                for prompt in loaded.validation_prompts
            ),
            default=0,
        ),
        images=len(samples),
        cached_images=len(samples) + len(references),
        captions=len(captions) + 1,
        caption_tokens=longest.tokens,
        tokenizer=longest.tokenizer,
        samples_images=_samples_images(loaded),
        steps=schedule.steps,
        train_images=train_images,
        visits_per_image=order.visits(schedule.steps * per_step) / train_images,
    )


def _load_of(manifest: Manifest, bucket: tuple[int, int], batch: int) -> _Load:
    """The load of a micro-batch of `bucket`."""
    samples = [manifest.samples[index] for index in manifest.buckets[bucket]]
    heaviest = max(samples, key=reference_tokens_of)
    strict_ids = {each.id for each in manifest.conditions if each.conditioning_type == "reference_strict"}
    strict = (reference for reference in heaviest.references if reference.dataset in strict_ids)
    return _Load(bucket, batch, reference_tokens_of(heaviest), _reference_tokens(strict))


def reference_tokens_of(sample: Sample) -> int:
    """The number of tokens of a sample's references."""
    return _reference_tokens(sample.references)


def _reference_tokens(references: Iterable[Crop]) -> int:
    return sum(tokens_of(reference.geometry.target) for reference in references)


def _samples_images(loaded: LoadedConfig) -> bool:
    return bool(loaded.prompts or loaded.config.validation_drift_prompts) and not loaded.config.validation_disable


def ladder(config: RunConfig, work: Workload, fitting_blocks: int | None = None) -> Iterator[OptionValue]:
    """Yield changes that save memory, cheapest first: those that cost time, then those that cost precision, then those
    that change what the run trains.

    Args:
        fitting_blocks: number of resident blocks that fit, if more are configured.
    """
    is_lora = config.model_type == "lora"
    if config.ranks > 1 and not config.fsdp_enable and not config.zero_stage:
        yield OptionValue("fsdp_enable", True)
    if config.ranks > 1 and config.zero_stage:
        for stage in range(config.zero_stage, len(ZERO_STAGES)):
            yield OptionValue("deepspeed_config", ZERO_STAGES[stage])
    if config.ranks > 1 and config.fsdp_enable and not config.fsdp_reshard_after_forward:
        yield OptionValue("fsdp_reshard_after_forward", True)
    if fitting_blocks is not None:
        yield OptionValue("group_offload_resident_blocks", str(fitting_blocks))
    if config.enable_group_offload and config.group_offload_use_stream == "true":
        yield OptionValue("group_offload_use_stream", "false")
    if not config.gradient_checkpointing:
        yield OptionValue("gradient_checkpointing", True)
    elif config.gradient_checkpointing_interval is not None:
        yield OptionValue("gradient_checkpointing_interval", None)
    if config.text_encoder_mode != "streamed":
        yield OptionValue("text_encoder_mode", "streamed")
    if config.text_encoder_batch_size > 1:
        yield OptionValue("text_encoder_batch_size", 1)
    if config.vae_batch_size > 1:
        yield OptionValue("vae_batch_size", 1)
    if not config.vae_enable_tiling:
        yield OptionValue("vae_enable_tiling", True)
    if config.use_ema and not config.is_average_on_cpu:
        yield OptionValue("ema_device", "cpu")
    bits = PRECISIONS[config.base_model_precision].bits if config.base_model_precision in PRECISIONS else 16
    for precision in ("int8-quanto", "int4-quanto"):
        if is_lora and PRECISIONS[precision].bits < bits:
            yield OptionValue("base_model_precision", precision)
    if config.gradient_checkpointing and not config.activation_offload:
        yield OptionValue("activation_offload", True)
    if config.ranks > 1 and config.fsdp_enable and not config.fsdp_cpu_offload:
        yield OptionValue("fsdp_cpu_offload", True)
    if is_lora and not config.enable_group_offload:
        yield OptionValue("enable_group_offload", True)
    if not is_lora and not config.optimizer_release_gradients:
        yield OptionValue("optimizer_release_gradients", True)
    if not is_lora and config.optimizer != "adamw_bf16" and config.base_dtype != "fp16":
        yield OptionValue("optimizer", "adamw_bf16")
    if work.batch > 1:
        is_batch_of_set = work.batch != config.train_batch_size
        yield OptionValue("train_batch_size", 1, IN_SETS if is_batch_of_set else "")
    if any(math.prod(size) > 512 * 512 for size in config.sizes):
        yield OptionValue("validation_resolution", "512x512")
    for edge in (768, 512):
        if math.prod(work.bucket) > edge * edge:
            yield OptionValue(RESOLUTION, edge, IN_SETS)
    if config.enable_group_offload and config.group_offload_to_disk_path is None:
        yield OptionValue("group_offload_to_disk_path", "cache/blocks")


@dataclass(frozen=True)
class Budget:
    """The memory plan of a run, plans of the same run with other options, and their texts for the user."""

    config: RunConfig
    workload: Workload
    machine: MachineMemory

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config)

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint(self.config, self.architecture, self.workload, self.machine)

    @cached_property
    def plan(self) -> MemoryPlan:
        return self.with_changes({})

    def with_changes(self, changes: Mapping[str, object]) -> MemoryPlan:
        """The plan with other values of options, and of `RESOLUTION`."""
        options = {option: value for option, value in changes.items() if option != RESOLUTION}
        config = with_options(self.config, options)
        work = self.workload
        if "train_batch_size" in options:
            work = replace(work, batch=config.train_batch_size)
        if RESOLUTION in changes:
            width, height = work.bucket
            shrink = float(str(changes[RESOLUTION])) / math.sqrt(width * height)
            bucket = (_multiple_of_16(width * shrink), _multiple_of_16(height * shrink))
            strict = work.strict_references * tokens_of(bucket) // tokens_of(work.bucket)
            loose = work.references - work.strict_references
            work = replace(work, bucket=bucket, references=loose + strict, strict_references=strict)
        return Footprint(config, self.architecture, work, self.machine).plan()

    @cached_property
    def remedy(self) -> Remedy | None:
        """The smallest change that makes everything fit; None if there is none."""
        return smallest_change(self.plan, self.rungs, self.with_changes)

    @property
    def rungs(self) -> list[OptionValue]:
        """The changes of `ladder` that the other options allow."""

        def is_allowed(change: OptionValue) -> bool:
            options = {} if change.where else {change.option: change.value}
            return is_possible(with_options(self.config, options))

        return [change for change in ladder(self.config, self.workload, self._fitting_blocks) if is_allowed(change)]

    @property
    def _fitting_blocks(self) -> int | None:
        """The number of resident blocks that fit on the accelerator; None unless more are configured."""
        configured_blocks = self.config.resident_blocks
        if not configured_blocks or not self.footprint.streams_blocks or self.machine.accelerator is None:
            return None
        config = self.config.model_copy(update={"group_offload_resident_blocks": AUTO})
        fitting = Footprint(config, self.architecture, self.workload, self.machine).resolved_config.resident_blocks or 0
        return fitting if fitting < configured_blocks else None

    @cached_property
    def advice(self) -> EngineAdvice:
        """The engine that the run should use."""
        return advise(self)

    def lines(self) -> list[str]:
        """The short text: a line per phase, whether it fits, and the remedy."""
        lines = [f"{plan_title(self.plan)}:"]
        lines += [f"  {phase_line(phase)}" for phase in self.plan.phases]
        lines += [*self._verdict(), *self._communication()]
        has_better_engine = self.plan.processes > 1 and self.advice.engine not in (None, self.plan.engine)
        return [*lines, self.advice.text] if has_better_engine else lines

    def sentence(self) -> str:
        """One sentence: what the run trains, and how much memory and download it needs."""
        return f"Trains {self._task}; {self._requirements}."

    @property
    def _task(self) -> str:
        config, images, visits = self.config, self.workload.train_images, self.workload.visits_per_image
        model = base_name(config)
        if config.model_type == "full":
            target = f"all weights of {model}"
        elif config.init_lora is not None:
            target = f"the LoRA {Path(config.init_lora).name} of {model} further"
        else:
            target = f"a rank-{config.lora_rank} LoRA of {model}"
        if images is None or visits is None:
            length = f"{self.steps:,} steps" if self.steps else _counted(config.num_train_epochs, "epoch")
            return f"{target} on images that are not scanned yet, {length}"
        times = f"{visits:,.0f}" if visits >= 10 else f"{visits:.2g}"
        frequency = "once" if times == "1" else f"{times} times"
        steps = _counted(self.steps or 0, "step")
        return f"{target} on {_counted(images, 'image')}, {steps} (each image seen {frequency})"

    @property
    def _requirements(self) -> str:
        """Peak memory of usable memory, and the download."""
        needs = []
        for tier, name in TIER_WORDS.items():
            usable, needed = self.machine.available(tier), self.plan.peak(tier)
            if usable is not None and needed:
                per_unit = f" on each of {self.plan.machines} machines" if self.plan.machines > 1 else ""
                if tier == "accelerator":
                    per_unit = f" on each of {self.plan.processes} GPUs" if self.plan.processes > 1 else ""
                needs.append(f"{format_size(needed)} of {format_size(usable)} usable {name}{per_unit}")
        lacks = ", which is not enough" if any(lack.place != "disk" for lack in self.plan.lacks) else ""
        download = missing_download(self.config, preview_source(self.config))
        fetched = f", downloads {download / 1e9:.0f} GB" if download else ""
        return f"needs {' and '.join(needs)}{lacks}{fetched}"

    def _communication(self) -> list[str]:
        """The total GPU memory of several processes, and the bytes each sends per step; empty for a single process."""
        plan, wire = self.plan, self.plan.wire
        if wire is None:
            return []
        lines = []
        if self.machine.accelerator is not None:
            together = plan.processes * plan.peak("accelerator")
            lines.append(f"{plan.processes} processes together take {format_size(together)} of GPU memory.")
        parts = {"weights": wire.gathered, "gradients": wire.reduced}
        amounts = " and ".join(f"{format_size(size)} of {name}" for name, size in parts.items() if size)
        sent = f"Each process sends {amounts} a step"
        if self.machine.accelerator is None:
            return [*lines, f"{sent}."]
        seconds = ", ".join(
            f"{format_seconds(duration)} over {name} ({wire.links[name] / 1e9:g} GB/s)"
            for name, duration in wire.seconds().items()
        )
        return [*lines, f"{sent}; estimated, not measured: {seconds}."]

    def _verdict(self) -> list[str]:
        lacks = any(lack.place != "disk" for lack in self.plan.lacks)
        return [verdict(self.plan), *([self._remedy_text] if lacks else [])]

    @property
    def _remedy_text(self) -> str:
        return f"It would fit with {self.remedy}." if self.remedy else "No option of this program would make it fit."

    def table(self, flop_per_s: float | None = None, *, has_advice: bool = False) -> list[str]:
        """The long text: each part of each phase, caches, minimum time, whether it fits, and the remedy. With
        `has_advice`, also the engine to use.
        """
        work, footprint = self.workload, self.footprint
        basis = "from the configuration, without images" if work.images is None else f"{work.images} images"
        lines = [f"{plan_title(self.plan)} ({basis}):", *plan_table(self.plan), ""]
        lines.append(
            f"Caches: up to {format_size(footprint.context_bytes)} per caption and "
            f"{format_size(footprint.latent_bytes)} per image of the largest size; a checkpoint takes about "
            f"{format_size(footprint.checkpoint_bytes)}."
        )
        lines += self._longest_caption()
        lines.append(self._time(flop_per_s))
        if has_advice and self.plan.processes > 1:
            lines += ["", *engine_table(self.advice.plans), ""]
        lines += [*self._verdict(), *self._communication()]
        return [*lines, self.advice.text] if has_advice else lines

    def _longest_caption(self) -> list[str]:
        """A line with the tokens of the longest caption and the tokenizer that counted them; none if no caption was
        read.
        """
        tokens, tokenizer, limit = self.workload.caption_tokens, self.workload.tokenizer, self.architecture.text_length
        if tokens is None:
            return []
        if tokenizer is None:
            count_text = f"at most about {tokens} tokens by its characters: this model's tokenizer is not on this disk"
        else:
            count_text = f"{tokens} tokens with its template, counted with {tokenizer / 'tokenizer.json'}"
        verb = "are" if tokenizer else "would be"
        truncation = f"; tokens beyond {limit} {verb} truncated" if tokens > limit else ""
        return [f"The longest caption has {count_text}{truncation}."]

    def _time(self, flop_per_s: float | None) -> str:
        text = f"A step computes {self.step_flop / 1e12:.3g} TFLOP"
        if flop_per_s is None:
            return f"{text}."
        step_s = self.step_flop / flop_per_s
        text = f"{text}: at least {step_s:.3g} s, at the {flop_per_s / 1e12:.3g} TFLOP/s measured here"
        return f"{text}; {self.steps} steps {format_duration(self.steps * step_s)}." if self.steps else f"{text}."

    @property
    def steps(self) -> int | None:
        """Steps of the run; None if they depend on images that are not scanned."""
        return self.config.max_train_steps or self.workload.steps

    @cached_property
    def step_flop(self) -> int:
        """FLOP of an optimizer step at the largest bucket, recompute included."""
        transformer_pass = self.footprint.transformer_pass(
            self.workload.bucket, self.workload.batch, self.workload.references
        )
        return self.config.gradient_accumulation_steps * training_flop(transformer_pass).hardware

    def summary(self, flop_per_s: float | None = None, *, has_advice: bool = False) -> dict[str, Any]:
        """The plan as JSON values, in bytes and seconds; docs/plan.md explains each key.

        Args:
            flop_per_s: FLOP/s of the machine; None if the plan is for another machine.
            has_advice: whether to include the engine to use.
        """
        footprint = self.footprint
        width, height = self.workload.bucket
        step_s = None if flop_per_s is None else self.step_flop / flop_per_s
        return {
            "summary": self.sentence(),
            "workload": {
                "width": width,
                "height": height,
                "batch": self.workload.batch,
                "pictures": self.workload.images,
                "captions": self.workload.captions,
                "caption_tokens": self.workload.caption_tokens,
                "tokenizer": None if self.workload.tokenizer is None else str(self.workload.tokenizer),
            },
            "caches": {
                "caption": footprint.context_bytes,
                "picture": footprint.latent_bytes,
                "checkpoint": footprint.checkpoint_bytes,
                "trained_parameters": footprint.trainable_parameters,
            },
            "time": {
                "flop": self.step_flop,
                "flop_per_s": flop_per_s,
                "step_s": step_s,
                "steps": self.steps,
                "total_s": None if step_s is None or self.steps is None else self.steps * step_s,
            },
            "plan": self.plan.summary(),
            "remedy": None if self.remedy is None else self.remedy.summary(),
            "engine": self.advice.summary() if has_advice else None,
        }

    def event(self) -> PlanEvent:
        """The plan as an event of the run."""
        return PlanEvent(plan=self.plan.summary(), remedy=None if self.remedy is None else self.remedy.summary())

    def check(self) -> None:
        """Raise a MemoryBudgetError if the accelerator is too small to train. A lack of RAM raises nothing, because
        free RAM changes and a system can swap; nor does a phase that fills caches, which may be complete already.
        """
        capacity = self.machine.accelerator
        for phase in self.plan.phases:
            needed = phase.total("accelerator")
            if capacity is not None and phase.phase in ("train", "validation", "preview") and needed > capacity:
                raise MemoryBudgetError.of(
                    f"{phase_line(phase)}, but only {format_size(capacity)} of the GPU are free",
                    remedy=self._remedy_text,
                )

    def explain(self, failed: Phase | None, tier: MemoryTier, peak: PeakMemory, *, has_checkpoint: bool) -> list[str]:
        """Explain why a run ran out of `tier` in phase `failed`: planned memory, measured peak, and a remedy.

        Args:
            has_checkpoint: whether the run has a checkpoint; if so, changes that a resumed run may make are preferred.
        """
        name = None if failed is None else PLAN_PHASES.get(failed)
        phase = None if name is None else self.plan.phase(name)
        if name == "validation" and phase is None:
            phase = self.plan.phase("preview")
        if phase is None:
            return []
        if self.machine.accelerator is None or peak.reserved is None or peak.allocated is None:
            tier, measured, measured_text = "ram", peak.resident, format_size(peak.resident)
        elif tier == "ram":
            measured, measured_text = peak.resident, f"{format_size(peak.resident)} of RAM"
        else:  # the plan counts tensors, not memory that the allocator reserves beyond them
            measured, measured_text = (
                peak.allocated,
                f"{format_size(peak.allocated)}, {format_size(peak.reserved)} reserved",
            )
        if tier == "ram":  # the plan counts RAM of all processes of a machine
            measured *= self.plan.processes_per_machine
        target = int(REMEDY_TARGET * min(phase.total(tier), measured))
        reduced_plan = with_less_memory(self.plan, phase.phase, tier, target)
        # `auto` values were resolved for the whole memory. Keep them while searching for a change with less memory.
        resolved_budget = replace(self, config=self.footprint.resolved_config, machine=reduced_plan.machine)
        process_text = "" if self.plan.processes == 1 else f" in the first of {self.plan.processes} processes"

        def replan(changes: Mapping[str, object]) -> MemoryPlan:
            return with_less_memory(resolved_budget.with_changes(changes), phase.phase, tier, target)

        sentences = [f"The plan was {phase_line(phase)}; the measured peak is {measured_text}{process_text}."]
        if has_checkpoint:
            remedy = smallest_change(
                reduced_plan, [rung for rung in resolved_budget.rungs if rung.option in MAY_CHANGE], replan
            )
            if remedy is not None:
                return [*sentences, f"Use less memory with {remedy}."]
        remedy = smallest_change(reduced_plan, resolved_budget.rungs, replan)
        if remedy is not None:
            new_run = ", in a new run: give another --output_dir too" if has_checkpoint else ""
            sentences.append(f"Use less memory with {remedy}{new_run}.")
        return sentences


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _multiple_of_16(side: float) -> int:
    return max(1, round(side / 16)) * 16
