"""`simpletuner plan`: the memory that a configuration takes, and with --show-timesteps the density of noise levels that
it really gives.
"""

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
from simpletuner.cli.spread import Resolution, Spread, spread_picture, terminal
from simpletuner.config.load import Loaded
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.config.values import join_names
from simpletuner.data.manifest import scan_of
from simpletuner.data.order import Order
from simpletuner.train.length import Plan
from simpletuner.train.timesteps import Timesteps

USAGE = """usage: simpletuner plan [--vram GIB] [--ram GIB] [--gpus N [--hosts M]] [--json]
           [options of `simpletuner train`]
       simpletuner plan --show-timesteps [--json] [--out FOLDER] [options of `simpletuner train`]

  Without --show-timesteps: what each phase takes of GPU, RAM and disk, and whether that is there; if not, the smallest
  change that would fit, and exit code 5. Nothing is loaded or downloaded. With --gpus also what each process sends in a
  step, and which engine to take: DDP, FSDP2 or a stage of ZeRO. --gpus are those of each of M hosts.
"""

MOST_GPUS = 1024
"""And most hosts."""
PICTURE = "timesteps.png"
EVERY_SIZE = "every size"


def _gib(text: str) -> float:
    """ "24", "24GB" or "24 GiB" in GiB."""
    plain = text.replace(".", "", 1).isdecimal()
    return float(text) if plain else parse_size(text) / GIB


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST_GPUS):
        raise ValueError(text)
    return int(text)


def _gib_flag(meaning: str) -> Flag:
    return Flag(meaning, "GIB", convert=_gib, expects="a size in GiB such as 24", follows="a size in GiB")


def _count_flag(meaning: str, letter: str, what: str) -> Flag:
    expects = f"a whole number from 1 to {MOST_GPUS}"
    return Flag(meaning, letter, convert=_count, expects=expects, follows=f"a number of {what}")


@dataclass(frozen=True)
class PlanCommand:
    """What is typed after `simpletuner plan`. A size is None for what this machine has."""

    vram: float | None = _gib_flag(
        "plan for a card of this size instead of this machine's; 0 is a machine without one"
    ).default(None)
    ram: float | None = _gib_flag("plan for a machine with so much memory").default(None)
    gpus: int | None = _count_flag(
        "plan for so many GPUs on each host, one process each, instead of num_processes", "N", "GPUs"
    ).default(None)
    hosts: int | None = _count_flag(
        "plan for so many machines, instead of num_machines; with --gpus alone it is 1", "M", "machines"
    ).default(None)
    show_timesteps: bool = Flag("draw where between data (σ 0) and noise (σ 1) the run will train").default(False)
    out: Path | None = Flag(
        "where timesteps.png is put; by default output_dir", "FOLDER", convert=Path, follows="a folder"
    ).default(None)
    json: bool = Flag("print one JSON object instead").default(False)
    train_options: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.ram == 0:
            yield Problem("--ram = 0", "a size in GiB above 0")
        if self.show_timesteps and self.gpus is not None:
            yield Problem("--gpus is given beside --show-timesteps", "one of them")
        if self.hosts is not None and self.gpus is None:
            yield Problem("--hosts is given without --gpus", "the GPUs of each host too, such as --gpus 8")

    @property
    def process_options(self) -> tuple[str, ...]:
        """Arguments for the processes of `gpus` and `hosts`."""
        if self.gpus is None:
            return ()
        hosts = self.hosts or 1
        return f"--num_processes={hosts * self.gpus}", f"--num_machines={hosts}", "--machine_rank=0"


FORMS = {"": PlanCommand}


def run(arguments: list[str]) -> int:
    """Print the memory plan, or draw the density in the terminal and as a picture. 5 where memory is too small.

    Raises:
        ConfigError: a mistake in the configuration, or in the flags.
        AccessError: a local model is no FLUX.2.
        DataError: where the density depends on the pictures' sizes: a set is missing or empty.
        DiskError: no space for the picture.
    """
    command = parse_command(PlanCommand, arguments, check=PlanCommand.problems)
    loaded = load_here((*command.train_options, *command.process_options))
    return _draw(loaded, command) if command.show_timesteps else _plan(loaded, command)


def _plan(loaded: Loaded, command: PlanCommand) -> int:
    # torch, which the other word and all mistakes do without.
    from simpletuner.memory.device import choose_device
    from simpletuner.memory.planner import Machine
    from simpletuner.memory.precision import DTYPES
    from simpletuner.memory.rate import matmul_rate
    from simpletuner.train.budget import Budget, looked_at, this_machine, with_processes

    device = choose_device()
    gpus = visible_gpus(os.environ)
    config = with_processes(loaded.config, gpus)
    loaded = replace(loaded, config=config)
    machine = this_machine(device, Path(config.output_dir), config.ranks_per_machine)
    other = Machine.of_size(None if command.vram is None else command.vram * GIB, (command.ram or 0.0) * GIB)
    if command.vram is not None:
        machine = replace(machine, accelerator=other.accelerator)
    if command.ram is not None:
        machine = replace(machine, ram=other.ram)
    if command.vram is not None or command.ram is not None:
        machine = replace(machine, disk=None)
    budget = Budget(config, looked_at(loaded), machine)
    is_this_one = command.vram is None
    rate = matmul_rate(device, DTYPES[config.base_dtype]) if is_this_one else None
    has_advice = command.gpus is not None or config.ranks > 1
    notices = list(loaded.notices)
    if is_this_one and machine.accelerator is not None and config.ranks > gpus:
        notices.append(f"This machine has {gpus} of {config.ranks} GPUs; the others are planned as alike.")
    if command.json:
        say(json_text(budget.summary(rate, has_advice=has_advice) | {"notices": notices}))
    else:
        say("\n".join((budget.sentence(), *notices, "", *budget.table(rate, has_advice=has_advice))))
    return 0 if budget.plan.fits else MemoryBudgetError.exit_code


def _draw(loaded: Loaded, command: PlanCommand) -> int:
    spread = _spread(loaded)
    folder = Path(loaded.config.output_dir) if command.out is None else command.out
    path = folder / PICTURE
    with file_errors_reported(path):
        folder.mkdir(parents=True, exist_ok=True)
        spread_picture(spread).save(path)
    if command.json:
        found: dict[str, Any] = {"timesteps": spread.summary() | {"path": str(path)}, "notices": list(loaded.notices)}
        say(json_text(found))
    else:
        say("\n".join((*loaded.notices, terminal(spread), "", f"Picture: {path}")))
    return 0


def _spread(loaded: Loaded) -> Spread:
    """The density, resolution by resolution. The pictures are looked at only where something depends on them."""
    config = loaded.config
    timesteps = Timesteps.of(config)
    visits: dict[str, float] = {}
    strata = None
    shifts: dict[str, tuple[int, float]] = {}
    offsets = [image_set.timestep_sampling_offset for image_set in loaded.datasets.train_sets]
    is_by_size = timesteps.shift is None or (any(offsets) and timesteps.offset_scale > 0)
    if is_by_size or config.timestep_strata:
        manifests = [scan_of(loaded, image_set) for image_set in loaded.datasets.train_sets]
        per_step = config.gradient_accumulation_steps * config.ranks
        order = Order(manifests, seed=config.seed, batch_size=config.train_batch_size, batches_per_step=per_step)
        strata = int(order.epoch(0).batch_sizes().sum()) if config.timestep_strata else None
        for micro_batch, count in order.shown(Plan.of(config, order, per_step).steps * per_step):
            width, height = micro_batch.bucket
            offset = offsets[micro_batch.visits[0].set_index] if is_by_size and timesteps.offset_scale else 0.0
            name = f"{width}x{height}{f' {offset:+g}' if offset else ''}"
            visits[name] = visits.get(name, 0) + count * len(micro_batch.visits)
            tokens = width * height // 256
            shifts[name] = tokens, timesteps.shift_of(tokens, offset)
    samples = sum(visits.values())
    shares = (
        {EVERY_SIZE: 1.0}
        if not is_by_size
        else {name: count / samples for name, count in sorted(visits.items(), key=lambda item: shifts[item[0]])}
    )
    resolutions = []
    for name, share in shares.items():
        tokens_of_one, shift = shifts[name] if is_by_size else (None, timesteps.shift_of(0))
        resolutions.append(Resolution(name, tokens_of_one, share, shift))
    values = config.flow_custom_timesteps
    return Spread.of(
        timesteps.density,
        _named(config),
        tuple(resolutions),
        listed_values=None if values is None else len(values),
        strata=strata,
    )


def _named(config: ScheduleOptions) -> str:
    """The density in words, and what moves it."""
    if config.flow_custom_timesteps is not None:
        timesteps = [f"{value:g}" for value in sorted(config.flow_custom_timesteps)]
        return f"the listed timesteps {join_names(timesteps, 'and')}"
    if config.flow_use_uniform_schedule:
        name = "uniform"
    elif config.flow_use_beta_schedule:
        name = f"Beta({config.flow_beta_schedule_alpha:g}, {config.flow_beta_schedule_beta:g})"
    else:
        name = f"sigmoid({config.flow_sigmoid_scale:g} × normal)"
    shift = "each size's own shift" if config.flow_schedule_auto_shift else f"shift {config.flow_schedule_shift:g}"
    return f"{name}, {shift}"
