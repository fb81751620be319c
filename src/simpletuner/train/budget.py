"""What a run will take of this machine, before it is taken: the plan's first lines, its verdict, and what to change."""

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
from simpletuner.config.load import Loaded
from simpletuner.config.options.offload import AUTO
from simpletuner.config.options.ranks import ZERO_STAGES
from simpletuner.config.precisions import PRECISIONS
from simpletuner.config.previews import preview_download
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
from simpletuner.flux2.places import base_name, missing_download
from simpletuner.flux2.tokenizer import longest_caption
from simpletuner.memory.free import free_memory_bytes
from simpletuner.memory.peak import PeakMemory
from simpletuner.memory.planner import (
    Change,
    Machine,
    MemoryPlan,
    MemoryTier,
    PlannedPhase,
    Remedy,
    engine_table,
    phase_line,
    plan_table,
    plan_title,
    smallest_change,
    verdict,
    with_less,
)
from simpletuner.memory.world import World
from simpletuner.runs.events import Phase, PlanEvent
from simpletuner.train.engine import EngineAdvice, advise, is_possible, with_options
from simpletuner.train.length import Plan

RESOLUTION = "resolution"
"""An option of the picture sets and not of the run."""
IN_SETS = "in each image set"
"""Where such an option is written."""

MEMORY_WORDS: Mapping[MemoryTier, str] = {"accelerator": "VRAM", "ram": "RAM"}
"""What the sentence calls them."""

WORTH = 0.9
"""After a failed allocation a change is named only if it saves a tenth: the plan was off by something."""

PLANNED: Mapping[Phase, PlannedPhase] = {
    "text": "text",
    "latents": "latents",
    "load": "train",
    "train": "train",
    "validation": "validation",
}
"""The phase of the plan in which each of a run's is."""


def this_machine(device: torch.device, folder: Path, gpus: int = 1) -> Machine:
    """What is free here: on `device`, in RAM, and on the disk of `folder`, which may not be there yet.

    Args:
        gpus: of so many, as far as there are, the one with the least free memory is meant instead of `device`.
    """
    card = free_memory_bytes(device) if device.type == "cuda" else None
    if card is not None and gpus > 1:
        found = range(min(gpus, torch.cuda.device_count()))
        card = min(free_memory_bytes(torch.device("cuda", index)) for index in found)
    return Machine(card, free_memory_bytes(torch.device("cpu")), machine.disk_room(folder))


def machine_of(world: World, folder: Path) -> Machine:
    """`this_machine` as all processes of `world` see it: the least that is free to any of them, so that all plan alike.

    Raises:
        RanksError: a process is gone, or is waited for in vain.
    """
    own = this_machine(world.device, folder)
    if world.is_alone:
        return own
    found = [Machine(**each) for each in world.gather_json(asdict(own))]

    def least(values: Iterable[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return Machine(
        least(each.accelerator for each in found), min(each.ram for each in found), least(each.disk for each in found)
    )


def with_processes(config: RunConfig, gpus: int) -> RunConfig:
    """`config` with the number of processes that `train` would start beside so many visible GPUs of each machine."""
    if config.num_processes is not None:
        return config
    on_each = max(1, gpus) if config.takes_every_gpu else 1
    return config.model_copy(update={"num_processes": config.num_machines * on_each})


def configured(loaded: Loaded) -> Workload:
    """The work as the configuration tells it: no picture is looked at."""
    sets = loaded.datasets.train_sets
    run_batch = loaded.config.train_batch_size
    loads: list[_Load] = []
    references: list[tuple[int, int]] = []
    for each in sets:
        conditions = loaded.datasets.conditions_of(each)
        loose = [aligned_square(own) for own in conditions if own.conditioning_type == "reference_loose"]
        strict = tokens_of(_size(each)) * sum(own.conditioning_type == "reference_strict" for own in conditions)
        loads.append(
            _Load(_size(each), each.train_batch_size or run_batch, strict + sum(map(tokens_of, loose)), strict)
        )
        references += loose
    largest = max(loads, key=lambda load: load.tokens)
    most_drawn = max((len(prompt.references) for prompt in loaded.drawn_prompts), default=0)
    drawn = [LARGEST_REFERENCE] * most_drawn
    encoded = max([*map(_size, sets), *references, *drawn], key=math.prod)
    return Workload(
        largest.size,
        largest.batch,
        references=largest.reference_tokens,
        strict_references=largest.strict_tokens,
        encoded=None if encoded == largest.size else encoded,
        drawn_references=sum(map(tokens_of, drawn)),
        draws=_draws(loaded),
    )


@dataclass(frozen=True)
class _Load:
    """The images of a micro-batch."""

    size: tuple[int, int]
    """(width, height) of each, in pixels."""
    batch: int
    reference_tokens: int
    """Of the sample with the most: the others are padded to it."""
    strict_tokens: int
    """Those of them whose references have the image's size."""

    @property
    def tokens(self) -> int:
        return (tokens_of(self.size) + self.reference_tokens) * self.batch


def _size(image_set: ImageSet) -> tuple[int, int]:
    """A square of the resolution; where the shorter edge is given and shapes are kept, three by two."""
    if image_set.resolution_type == "pixel" and not (image_set.crop and image_set.crop_aspect == "square"):
        width, height = aligned_square(image_set)
        return width * 3 // 2 // 16 * 16, height
    return aligned_square(image_set)


def looked_at(loaded: Loaded, most: int = 50) -> Workload:
    """The work as the pictures tell it, if that takes no time: at most `most` of them are new since the last scan.
    Else, or where a folder is missing or empty, as the configuration tells it.
    """
    manifests: list[list[Manifest]] = []
    try:
        for sets in (loaded.datasets.train_sets, loaded.datasets.eval_sets):
            pairs = [(each, loaded.datasets.conditions_of(each)) for each in sets]
            if sum(count_new(*pair) for pair in pairs) > most:
                return configured(loaded)
            manifests.append([scan_of(loaded, each) for each in sets])
    except (DataError, OSError):  # `train` and `dataset scan` say what is wrong with them
        return configured(loaded)
    return scanned(loaded, *manifests)


def scanned(
    loaded: Loaded,
    train: Sequence[Manifest],
    held_out: Sequence[Manifest] = (),
    *,
    drawn: Mapping[str, Crop] | None = None,
) -> Workload:
    """The work as the pictures tell it.

    Args:
        drawn: the references of prompts by path, where they are known; else they are read.

    Raises:
        ConfigError: a prompt's reference is no image, or of a size that no reference has.
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
    if drawn is None:
        drawn = reference_crops(path for prompt in loaded.drawn_prompts for path in prompt.references)
    references.update(drawn.values())
    encoded = max((crop.geometry.target for crop in (*samples, *references)), key=math.prod)
    captions = {caption for sample in samples for caption in sample.captions}
    captions |= {prompt.text for prompt in loaded.prompts.values()} | set(loaded.config.validation_drift_prompts or ())
    captions.update(*map(PreservedPrompts(loaded.config).all_of, train))
    longest = longest_caption(captions, loaded.config)
    per_step = loaded.config.gradient_accumulation_steps * loaded.config.ranks
    order = Order(train, seed=loaded.config.seed, batch_size=run_batch, batches_per_step=per_step)
    plan = Plan.of(loaded.config, order, per_step)
    train_images = sum(len(manifest.samples) for manifest in train)
    return Workload(
        largest.size,
        largest.batch,
        references=largest.reference_tokens,
        strict_references=largest.strict_tokens,
        encoded=None if encoded == largest.size else encoded,
        drawn_references=max(
            (_reference_tokens(drawn[path] for path in prompt.references) for prompt in loaded.drawn_prompts), default=0
        ),
        images=len(samples),
        pictures=len(samples) + len(references),
        captions=len(captions) + 1,
        caption_tokens=longest.tokens,
        tokenizer=longest.tokenizer,
        draws=_draws(loaded),
        steps=plan.steps,
        train_images=train_images,
        visits=order.visits(plan.steps * per_step) / train_images,
    )


def _load_of(manifest: Manifest, bucket: tuple[int, int], batch: int) -> _Load:
    """The load of a bucket's micro-batch."""
    samples = [manifest.samples[index] for index in manifest.buckets[bucket]]
    most = max(samples, key=reference_tokens_of)
    strict = {each.id for each in manifest.conditions if each.conditioning_type == "reference_strict"}
    own = (reference for reference in most.references if reference.dataset in strict)
    return _Load(bucket, batch, reference_tokens_of(most), _reference_tokens(own))


def reference_tokens_of(sample: Sample) -> int:
    """Tokens of all references of a sample."""
    return _reference_tokens(sample.references)


def _reference_tokens(references: Iterable[Crop]) -> int:
    return sum(tokens_of(reference.geometry.target) for reference in references)


def _draws(loaded: Loaded) -> bool:
    return bool(loaded.prompts or loaded.config.validation_drift_prompts) and not loaded.config.validation_disable


def ladder(config: RunConfig, work: Workload, fitting_blocks: int | None = None) -> Iterator[Change]:
    """What can be changed, from what costs least to what costs most: time first, then precision, then the result.

    Args:
        fitting_blocks: resident blocks for which there is room, where more are asked for.
    """
    is_lora = config.model_type == "lora"
    if config.ranks > 1 and not config.fsdp_enable and not config.zero_stage:
        yield Change("fsdp_enable", True)
    if config.ranks > 1 and config.zero_stage:
        for stage in range(config.zero_stage, len(ZERO_STAGES)):
            yield Change("deepspeed_config", ZERO_STAGES[stage])
    if config.ranks > 1 and config.fsdp_enable and not config.fsdp_reshard_after_forward:
        yield Change("fsdp_reshard_after_forward", True)
    if fitting_blocks is not None:
        yield Change("group_offload_resident_blocks", str(fitting_blocks))
    if config.enable_group_offload and config.group_offload_use_stream == "true":
        yield Change("group_offload_use_stream", "false")
    if not config.gradient_checkpointing:
        yield Change("gradient_checkpointing", True)
    elif config.gradient_checkpointing_interval is not None:
        yield Change("gradient_checkpointing_interval", None)
    if config.text_encoder_mode != "streamed":
        yield Change("text_encoder_mode", "streamed")
    if config.text_encoder_batch_size > 1:
        yield Change("text_encoder_batch_size", 1)
    if config.vae_batch_size > 1:
        yield Change("vae_batch_size", 1)
    if not config.vae_enable_tiling:
        yield Change("vae_enable_tiling", True)
    if config.use_ema and not config.is_average_on_cpu:
        yield Change("ema_device", "cpu")
    now = PRECISIONS[config.base_model_precision].bits if config.base_model_precision in PRECISIONS else 16
    for precision in ("int8-quanto", "int4-quanto"):
        if is_lora and PRECISIONS[precision].bits < now:
            yield Change("base_model_precision", precision)
    if config.gradient_checkpointing and not config.activation_offload:
        yield Change("activation_offload", True)
    if config.ranks > 1 and config.fsdp_enable and not config.fsdp_cpu_offload:
        yield Change("fsdp_cpu_offload", True)
    if is_lora and not config.enable_group_offload:
        yield Change("enable_group_offload", True)
    if not is_lora and not config.optimizer_release_gradients:
        yield Change("optimizer_release_gradients", True)
    if not is_lora and config.optimizer != "adamw_bf16" and config.base_dtype != "fp16":
        yield Change("optimizer", "adamw_bf16")
    if work.batch > 1:
        is_own = work.batch != config.train_batch_size
        yield Change("train_batch_size", 1, IN_SETS if is_own else "")
    if any(math.prod(size) > 512 * 512 for size in config.sizes):
        yield Change("validation_resolution", "512x512")
    for edge in (768, 512):
        if math.prod(work.bucket) > edge * edge:
            yield Change(RESOLUTION, edge, IN_SETS)
    if config.enable_group_offload and config.group_offload_to_disk_path is None:
        yield Change("group_offload_to_disk_path", "cache/blocks")


@dataclass(frozen=True)
class Budget:
    """A run's plan, and what would be of it with other options."""

    config: RunConfig
    work: Workload
    machine: Machine

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config)

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint(self.config, self.architecture, self.work, self.machine)

    @cached_property
    def plan(self) -> MemoryPlan:
        return self.with_changes({})

    def with_changes(self, changes: Mapping[str, object]) -> MemoryPlan:
        """The plan with other values of options."""
        options = {option: value for option, value in changes.items() if option != RESOLUTION}
        config = with_options(self.config, options)
        work = self.work
        if "train_batch_size" in options:
            work = replace(work, batch=config.train_batch_size)
        if RESOLUTION in changes:
            width, height = work.bucket
            shrink = float(str(changes[RESOLUTION])) / math.sqrt(width * height)
            bucket = (_multiple(width * shrink), _multiple(height * shrink))
            strict = work.strict_references * tokens_of(bucket) // tokens_of(work.bucket)
            loose = work.references - work.strict_references
            work = replace(work, bucket=bucket, references=loose + strict, strict_references=strict)
        return Footprint(config, self.architecture, work, self.machine).plan()

    @cached_property
    def remedy(self) -> Remedy | None:
        """The smallest change with which everything fits."""
        return smallest_change(self.plan, self.rungs, self.with_changes)

    @property
    def rungs(self) -> list[Change]:
        """Those of `ladder` that the other options allow."""

        def is_allowed(change: Change) -> bool:
            options = {} if change.where else {change.option: change.value}
            return is_possible(with_options(self.config, options))

        return [change for change in ladder(self.config, self.work, self._fitting_blocks) if is_allowed(change)]

    @property
    def _fitting_blocks(self) -> int | None:
        """Resident blocks for which the accelerator has room; None where no more are asked for."""
        asked = self.config.resident_blocks
        if not asked or not self.footprint.streams_blocks or self.machine.accelerator is None:
            return None
        config = self.config.model_copy(update={"group_offload_resident_blocks": AUTO})
        fitting = Footprint(config, self.architecture, self.work, self.machine).settled.resident_blocks or 0
        return fitting if fitting < asked else None

    @cached_property
    def advice(self) -> EngineAdvice:
        """Which engine to take."""
        return advise(self)

    def lines(self) -> list[str]:
        """The short form: a line a phase, the verdict, and the way out."""
        told = [f"{plan_title(self.plan)}:"]
        told += [f"  {phase_line(phase)}" for phase in self.plan.phases]
        told += [*self._verdict(), *self._over_the_wire()]
        is_other = self.plan.processes > 1 and self.advice.engine not in (None, self.plan.engine)
        return [*told, self.advice.text] if is_other else told

    def sentence(self) -> str:
        """What the run does and what it takes, for somebody who has not started it yet."""
        return f"Trains {self._task}; {self._price}."

    @property
    def _task(self) -> str:
        config, images, visits = self.config, self.work.train_images, self.work.visits
        model = base_name(config)
        if config.model_type == "full":
            told = f"all weights of {model}"
        elif config.init_lora is not None:
            told = f"the LoRA {Path(config.init_lora).name} of {model} further"
        else:
            told = f"a rank-{config.lora_rank} LoRA of {model}"
        if images is None or visits is None:
            length = f"{self.steps:,} steps" if self.steps else _counted(config.num_train_epochs, "epoch")
            return f"{told} on images that are not scanned yet, {length}"
        times = f"{visits:,.0f}" if visits >= 10 else f"{visits:.2g}"
        seen = "once" if times == "1" else f"{times} times"
        return f"{told} on {_counted(images, 'image')}, {_counted(self.steps or 0, 'step')} (each image seen {seen})"

    @property
    def _price(self) -> str:
        """Peak memory against what is usable, and the download."""
        told = []
        for place, name in MEMORY_WORDS.items():
            there, needed = self.machine.has(place), self.plan.peak(place)
            if there is not None and needed:
                each = f" on each of {self.plan.machines} machines" if self.plan.machines > 1 else ""
                if place == "accelerator":
                    each = f" on each of {self.plan.processes} GPUs" if self.plan.processes > 1 else ""
                told.append(f"{format_size(needed)} of {format_size(there)} usable {name}{each}")
        lacks = ", which is not enough" if any(lack.place != "disk" for lack in self.plan.lacks) else ""
        download = missing_download(self.config, preview_download(self.config))
        fetched = f", downloads {download / 1e9:.0f} GB" if download else ""
        return f"needs {' and '.join(told)}{lacks}{fetched}"

    def _over_the_wire(self) -> list[str]:
        """What several processes hold together, and send in a step; nothing of a single process."""
        plan, wire = self.plan, self.plan.wire
        if wire is None:
            return []
        told = []
        if self.machine.accelerator is not None:
            together = plan.processes * plan.peak("accelerator")
            told.append(f"{plan.processes} processes take {format_size(together)} of GPU memory together.")
        parts = {"weights": wire.gathered, "gradients": wire.reduced}
        shown = " and ".join(f"{format_size(size)} of {name}" for name, size in parts.items() if size)
        sent = f"Each process sends {shown} a step"
        if self.machine.accelerator is None:
            return [*told, f"{sent}."]
        seconds = ", ".join(
            f"{format_seconds(own)} over {name} ({wire.links[name] / 1e9:g} GB/s)"
            for name, own in wire.seconds().items()
        )
        return [*told, f"{sent}; estimated, not measured: {seconds}."]

    def _verdict(self) -> list[str]:
        lacks = any(lack.place != "disk" for lack in self.plan.lacks)
        return [verdict(self.plan), *([self._way_out] if lacks else [])]

    @property
    def _way_out(self) -> str:
        return f"It would fit with {self.remedy}." if self.remedy else "No option of this program would make it fit."

    def table(self, flop_per_s: float | None = None, *, has_advice: bool = False) -> list[str]:
        """The long form: every part of every phase, the caches, the least time, the verdict, and the way out; with
        `has_advice`, which engine to take.
        """
        work, foot = self.work, self.footprint
        seen = "as configured; no pictures looked at" if work.images is None else f"{work.images} pictures"
        told = [f"{plan_title(self.plan)} ({seen}):", *plan_table(self.plan), ""]
        told.append(
            f"Caches: up to {format_size(foot.context_bytes)} a caption, {format_size(foot.latent_bytes)} a picture of "
            f"the largest size; a checkpoint is about {format_size(foot.checkpoint_bytes)}."
        )
        told += self._longest_caption()
        told.append(self._time(flop_per_s))
        if has_advice and self.plan.processes > 1:
            told += ["", *engine_table(self.advice.plans), ""]
        told += [*self._verdict(), *self._over_the_wire()]
        return [*told, self.advice.text] if has_advice else told

    def _longest_caption(self) -> list[str]:
        """Its tokens, and what counted them; nothing where no caption was looked at."""
        tokens, tokenizer, limit = self.work.caption_tokens, self.work.tokenizer, self.architecture.text_length
        if tokens is None:
            return []
        if tokenizer is None:
            told = f"at most about {tokens} tokens by its characters: no tokenizer of this model is on this disk"
        else:
            told = f"{tokens} tokens with its template, counted with {tokenizer / 'tokenizer.json'}"
        is_cut = "is" if tokenizer else "would be"
        cut = f"; what is beyond {limit} {is_cut} left out" if tokens > limit else ""
        return [f"The longest caption has {told}{cut}."]

    def _time(self, flop_per_s: float | None) -> str:
        told = f"A step computes {self.step_flop / 1e12:.3g} TFLOP"
        if flop_per_s is None:
            return f"{told}."
        step_s = self.step_flop / flop_per_s
        told = f"{told}: at least {step_s:.3g} s, at the {flop_per_s / 1e12:.3g} TFLOP/s measured here"
        return f"{told}; {self.steps} steps {format_duration(self.steps * step_s)}." if self.steps else f"{told}."

    @property
    def steps(self) -> int | None:
        """Of the run; None where that depends on pictures that nobody has looked at."""
        return self.config.max_train_steps or self.work.steps

    @cached_property
    def step_flop(self) -> int:
        """What an optimizer step computes, at the largest bucket, recompute counted."""
        passing = self.footprint.passing(self.work.bucket, self.work.batch, self.work.references)
        return self.config.gradient_accumulation_steps * training_flop(passing).hardware

    def summary(self, flop_per_s: float | None = None, *, has_advice: bool = False) -> dict[str, Any]:
        """For a JSON reader, in bytes and seconds; docs/plan.md says what each key means.

        Args:
            flop_per_s: of the machine; None where it is not this one.
            has_advice: say which engine to take.
        """
        foot = self.footprint
        width, height = self.work.bucket
        step_s = None if flop_per_s is None else self.step_flop / flop_per_s
        return {
            "summary": self.sentence(),
            "workload": {
                "width": width,
                "height": height,
                "batch": self.work.batch,
                "pictures": self.work.images,
                "captions": self.work.captions,
                "caption_tokens": self.work.caption_tokens,
                "tokenizer": None if self.work.tokenizer is None else str(self.work.tokenizer),
            },
            "caches": {
                "caption": foot.context_bytes,
                "picture": foot.latent_bytes,
                "checkpoint": foot.checkpoint_bytes,
                "trained_parameters": foot.trained,
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
        """For the run's events."""
        return PlanEvent(plan=self.plan.summary(), remedy=None if self.remedy is None else self.remedy.summary())

    def check(self) -> None:
        """Raise a MemoryBudgetError if the accelerator is too small to train. RAM is never refused: what is free of it
        changes, and a system can swap. Nor is a phase that fills caches, which may be full already.
        """
        there = self.machine.accelerator
        for phase in self.plan.phases:
            needed = phase.total("accelerator")
            if there is not None and phase.phase in ("train", "validation", "preview") and needed > there:
                raise MemoryBudgetError.of(
                    f"{phase_line(phase)}, and {format_size(there)} of the GPU are free",
                    remedy=self._way_out,
                )

    def explain(self, failed: Phase | None, place: MemoryTier, peak: PeakMemory, *, saved: bool) -> list[str]:
        """For a run that ran out of `place` in `failed`: the plan's line, what was measured, and what would fit.

        Args:
            saved: whether there is a checkpoint. What a resumed run may change comes first then.
        """
        name = None if failed is None else PLANNED.get(failed)
        phase = None if name is None else self.plan.phase(name)
        if name == "validation" and phase is None:
            phase = self.plan.phase("preview")
        if phase is None:
            return []
        if self.machine.accelerator is None or peak.reserved is None or peak.allocated is None:
            place, measured, shown = "ram", peak.resident, format_size(peak.resident)
        elif place == "ram":
            measured, shown = peak.resident, f"{format_size(peak.resident)} of RAM"
        else:  # the plan counts tensors, not what the allocator holds beside them
            measured, shown = peak.allocated, f"{format_size(peak.allocated)}, {format_size(peak.reserved)} reserved"
        if place == "ram":  # of which the plan counts that of all processes of a machine
            measured *= self.plan.processes_per_machine
        there = int(WORTH * min(phase.total(place), measured))
        less = with_less(self.plan, phase.phase, place, there)
        # What `auto` took is what ran out; what it would take of less memory is what is looked for.
        smaller = replace(self, config=self.footprint.settled, machine=less.machine)
        of_one = "" if self.plan.processes == 1 else f" in the first of {self.plan.processes} processes"

        def replan(changes: Mapping[str, object]) -> MemoryPlan:
            return with_less(smaller.with_changes(changes), phase.phase, place, there)

        told = [f"The plan was {phase_line(phase)}; the measured peak is {shown}{of_one}."]
        if saved:
            remedy = smallest_change(less, [rung for rung in smaller.rungs if rung.option in MAY_CHANGE], replan)
            if remedy is not None:
                return [*told, f"Less is taken with {remedy}."]
        remedy = smallest_change(less, smaller.rungs, replan)
        if remedy is not None:
            anew = ", in a new run: give another --output_dir too" if saved else ""
            told.append(f"Less is taken with {remedy}{anew}.")
        return told


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _multiple(side: float) -> int:
    return max(1, round(side / 16)) * 16
