"""`simpletuner plan`: predict the memory that a configuration needs; with --show-timesteps, plot the distribution of
timesteps that it trains."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.console import say
from simpletuner.base.errors import MemoryBudgetError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.base.machine import visible_gpus
from simpletuner.base.sizes import GIB, parse_size
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import json_text
from simpletuner.cli.sigma_density import ResolutionShift, SampledDensity, chart_image, terminal_chart
from simpletuner.config.load import LoadedConfig
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.config.values import join_names
from simpletuner.data.manifest import scan_of
from simpletuner.data.order import Order
from simpletuner.train.length import RunSchedule
from simpletuner.train.timesteps import Timesteps

USAGE = """usage: simpletuner plan [--vram GIB] [--ram GIB] [--gpus N [--hosts M]] [--json]
           [options of `simpletuner train`]
       simpletuner plan --show-timesteps [--json] [--out FOLDER] [options of `simpletuner train`]

  Without --show-timesteps: prints how much GPU memory, RAM and disk each phase needs, and whether this machine has it.
  If not, prints the smallest change that fits and returns exit code 5. Nothing is loaded or downloaded. With --gpus,
  also prints how much each process sends in a step, and which engine to use: DDP, FSDP2 or a stage of ZeRO. --gpus is
  the number of GPUs on each of M hosts.
"""

MAX_GPUS = 1024
"""Maximum value of --gpus, and of --hosts."""
CHART_FILE = "timesteps.png"
EVERY_SIZE = "every size"


def _gib(text: str) -> float:
    """Parse "24", "24GB" or "24 GiB" into GiB."""
    plain = text.replace(".", "", 1).isdecimal()
    return float(text) if plain else parse_size(text) / GIB


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_GPUS):
        raise ValueError(text)
    return int(text)


def _gib_flag(meaning: str) -> Flag:
    return Flag(meaning, "GIB", convert=_gib, expects="a size in GiB such as 24", follows="a size in GiB")


def _count_flag(meaning: str, letter: str, noun: str) -> Flag:
    expects = f"a whole number from 1 to {MAX_GPUS}"
    return Flag(meaning, letter, convert=_count, expects=expects, follows=f"a number of {noun}")


@dataclass(frozen=True)
class PlanCommand:
    """Arguments of `simpletuner plan`. None means the value of this machine or of the configuration."""

    vram: float | None = _gib_flag(
        "plan for a GPU with this much memory instead of this machine's; 0 is a machine without a GPU"
    ).default(None)
    ram: float | None = _gib_flag("plan for a machine with this much RAM").default(None)
    gpus: int | None = _count_flag(
        "plan for N GPUs on each host, with one process each, instead of num_processes", "N", "GPUs"
    ).default(None)
    hosts: int | None = _count_flag(
        "plan for M machines instead of num_machines; by default 1 with --gpus", "M", "machines"
    ).default(None)
    show_timesteps: bool = Flag("plot how the training samples spread from data (σ 0) to noise (σ 1)").default(False)
    out: Path | None = Flag(
        "the folder for timesteps.png; by default output_dir", "FOLDER", convert=Path, follows="a folder"
    ).default(None)
    json: bool = Flag("print one JSON object instead").default(False)
    train_options: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.ram == 0:
            yield Problem("--ram = 0", "a size in GiB above 0")
        if self.show_timesteps and self.gpus is not None:
            yield Problem("--gpus with --show-timesteps", "one of them")
        if self.hosts is not None and self.gpus is None:
            yield Problem("--hosts without --gpus", "also the GPUs of each host, such as --gpus 8")

    @property
    def process_options(self) -> tuple[str, ...]:
        """Options of `train` that `gpus` and `hosts` set."""
        if self.gpus is None:
            return ()
        hosts = self.hosts or 1
        return f"--num_processes={hosts * self.gpus}", f"--num_machines={hosts}", "--machine_rank=0"


FORMS = {"": PlanCommand}


def run(arguments: list[str]) -> int:
    """Print the memory plan, or plot the density in the terminal and as an image. Returns 5 if memory is too small.

    Raises:
        ConfigError: a mistake in the configuration, or in the flags.
        AccessError: a local model is not a FLUX.2 model.
        DataError: the density depends on the images' sizes, and a dataset is missing or empty.
        DiskError: no space for the image.
    """
    command = parse_command(PlanCommand, arguments, check=PlanCommand.problems)
    loaded = load_here((*command.train_options, *command.process_options))
    return _plot(loaded, command) if command.show_timesteps else _plan(loaded, command)


def _plan(loaded: LoadedConfig, command: PlanCommand) -> int:
    # Imported late, because it loads torch, which --show-timesteps and mistakes in the arguments do not need.
    from simpletuner.memory.device import choose_device
    from simpletuner.memory.planner import MachineMemory
    from simpletuner.memory.precision import DTYPES
    from simpletuner.memory.rate import matmul_rate
    from simpletuner.train.budget import Budget, free_resources, quick_workload, with_processes

    device = choose_device()
    gpus = visible_gpus(os.environ)
    config = with_processes(loaded.config, gpus)
    loaded = replace(loaded, config=config)
    machine = free_resources(device, Path(config.output_dir), config.ranks_per_machine)
    hypothetical = MachineMemory.of_size(
        None if command.vram is None else command.vram * GIB, (command.ram or 0.0) * GIB
    )
    if command.vram is not None:
        machine = replace(machine, accelerator=hypothetical.accelerator)
    if command.ram is not None:
        machine = replace(machine, ram=hypothetical.ram)
    if command.vram is not None or command.ram is not None:
        machine = replace(machine, disk=None)
    budget = Budget(config, quick_workload(loaded), machine)
    is_local_gpu = command.vram is None
    rate = matmul_rate(device, DTYPES[config.base_dtype]) if is_local_gpu else None
    has_advice = command.gpus is not None or config.ranks > 1
    notices = list(loaded.notices)
    if is_local_gpu and machine.accelerator is not None and config.ranks > gpus:
        notices.append(
            f"This machine has {gpus} of {config.ranks} GPUs; the plan assumes that the others are the same."
        )
    if command.json:
        say(json_text(budget.summary(rate, has_advice=has_advice) | {"notices": notices}))
    else:
        say("\n".join((budget.sentence(), *notices, "", *budget.table(rate, has_advice=has_advice))))
    return 0 if budget.plan.fits else MemoryBudgetError.exit_code


def _plot(loaded: LoadedConfig, command: PlanCommand) -> int:
    density = _sampled_density(loaded)
    folder = Path(loaded.config.output_dir) if command.out is None else command.out
    path = folder / CHART_FILE
    with file_errors_reported(path):
        folder.mkdir(parents=True, exist_ok=True)
        chart_image(density).save(path)
    if command.json:
        fields: dict[str, Any] = {"timesteps": density.summary() | {"path": str(path)}, "notices": list(loaded.notices)}
        say(json_text(fields))
    else:
        say("\n".join((*loaded.notices, terminal_chart(density), "", f"Chart: {path}")))
    return 0


def _sampled_density(loaded: LoadedConfig) -> SampledDensity:
    """The density of the configuration, for each resolution. The images are scanned only if the density depends on
    them."""
    config = loaded.config
    timesteps = Timesteps.of(config)
    sample_counts: dict[str, float] = {}
    strata = None
    shifts: dict[str, tuple[int, float]] = {}
    offsets = [image_set.timestep_sampling_offset for image_set in loaded.datasets.train_sets]
    is_by_size = timesteps.shift is None or (any(offsets) and timesteps.offset_scale > 0)
    if is_by_size or config.timestep_strata:
        manifests = [scan_of(loaded, image_set) for image_set in loaded.datasets.train_sets]
        per_step = config.gradient_accumulation_steps * config.ranks
        order = Order(manifests, seed=config.seed, batch_size=config.train_batch_size, batches_per_step=per_step)
        strata = int(order.epoch(0).batch_sizes().sum()) if config.timestep_strata else None
        for micro_batch, count in order.batches_shown(RunSchedule.of(config, order, per_step).steps * per_step):
            width, height = micro_batch.bucket
            offset = offsets[micro_batch.visits[0].set_index] if is_by_size and timesteps.offset_scale else 0.0
            name = f"{width}x{height}{f' {offset:+g}' if offset else ''}"
            sample_counts[name] = sample_counts.get(name, 0) + count * len(micro_batch.visits)
            tokens = width * height // 256
            shifts[name] = tokens, timesteps.shift_of(tokens, offset)
    samples = sum(sample_counts.values())
    shares = (
        {EVERY_SIZE: 1.0}
        if not is_by_size
        else {name: count / samples for name, count in sorted(sample_counts.items(), key=lambda item: shifts[item[0]])}
    )
    resolutions = []
    for name, share in shares.items():
        tokens_of_one, shift = shifts[name] if is_by_size else (None, timesteps.shift_of(0))
        resolutions.append(ResolutionShift(name, tokens_of_one, share, shift))
    values = config.flow_custom_timesteps
    return SampledDensity.of(
        timesteps.density,
        _density_title(config),
        tuple(resolutions),
        listed_values=None if values is None else len(values),
        strata=strata,
    )


def _density_title(config: ScheduleOptions) -> str:
    """The density and its shift, in words."""
    if config.flow_custom_timesteps is not None:
        timesteps = [f"{value:g}" for value in sorted(config.flow_custom_timesteps)]
        return f"the listed timesteps {join_names(timesteps, 'and')}"
    if config.flow_use_uniform_schedule:
        name = "uniform"
    elif config.flow_use_beta_schedule:
        name = f"Beta({config.flow_beta_schedule_alpha:g}, {config.flow_beta_schedule_beta:g})"
    else:
        name = f"sigmoid({config.flow_sigmoid_scale:g} × normal)"
    shift = "a shift for each size" if config.flow_schedule_auto_shift else f"shift {config.flow_schedule_shift:g}"
    return f"{name}, {shift}"
