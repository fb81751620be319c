"""`simpletuner doctor`: what training needs of this machine and has, on one screen, before anything is downloaded."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from simpletuner.base.commandline import command_text
from simpletuner.base.console import say
from simpletuner.base.errors import AccessError, ConfigError, DataError, DiskError, MemoryBudgetError
from simpletuner.base.machine import Gpu, disk_room, gpus
from simpletuner.base.sizes import GIB, format_size
from simpletuner.base.storage import storage_of
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.cli.env import installed_version
from simpletuner.cli.loading import examine_here
from simpletuner.cli.printing import json_text, table
from simpletuner.config.deepspeed import deepspeed_lack
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.load import NO_CONFIGURATION, Examined
from simpletuner.config.previews import preview_download
from simpletuner.config.recipes import card_of, recipe, resident_flavour
from simpletuner.config.rules import precision_findings
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names
from simpletuner.data.discover import discover
from simpletuner.flux2.places import Hub, hub_cache, missing_download

USAGE = """usage: simpletuner doctor [--online] [--json] [options of `simpletuner train`]

  What the configuration found here needs and this machine has; without one, what a LoRA of FLUX.2-dev needs. Nothing
  is loaded or downloaded. The exit code is 0 where training could start, else that of the stage that would fail.
"""

State = Literal["ok", "warning", "missing"]

DRIVERS = {12: 525, 13: 580}
"""The first NVIDIA driver for each major version of CUDA."""
BF16_CAPABILITY = (8, 0)
OPTIONAL = ("bitsandbytes", "optimum-quanto", "torchao", "deepspeed", "tensorboard", "wandb")
INSTALL = "pip install -e '.[{}]'"
"""In the clone."""


@dataclass(frozen=True)
class DoctorCommand:
    """Arguments of `simpletuner doctor`."""

    online: bool = Flag("also ask the Hub whether your token may read the weights").default(False)
    json: bool = Flag("print one JSON object instead").default(False)
    train_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineCheck:
    """One line of the screen."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to type or do; empty where the check is ok."""
    exit_code: int = 0
    """Of the stage that fails while this is missing."""


FORMS = {"": DoctorCommand}


def run(arguments: list[str]) -> int:
    """Print a line for each thing that training needs. 0 where it could start, else the code of what would fail first.

    Raises:
        ConfigError: a flag of this command is wrong.
    """
    command = parse_command(DoctorCommand, arguments)
    checks = tuple(_checks(command))
    code = min((check.exit_code for check in checks if check.state == "missing"), default=0)
    if command.json:
        say(json_text({"ready": code == 0, "exit_code": code, "checks": [asdict(check) for check in checks]}))
        return code
    say(table([(check.state, check.name, check.found) for check in checks]))
    remedies = [check for check in checks if check.remedy]
    if remedies:
        say("\n" + "\n".join(f"{check.name}: {check.remedy}" for check in remedies))
    say("\nTraining can start." if code == 0 else "\nTraining cannot start yet.")
    return code


def _checks(command: DoctorCommand) -> Iterator[MachineCheck]:
    examined = examine_here(command.train_options)
    cards = gpus()
    if examined.config_file is None and examined.datasets is None:
        ConfigError.raise_if(problem for problem in examined.problems if problem.found != NO_CONFIGURATION)
        config = _usual(cards)
        examined = replace(examined, config=config)
        wanted = f"none here: below, a LoRA of {FLAVOURS[config.model_flavour].title}"
        yield _python()
        yield MachineCheck("config", "warning", wanted, _first_step(cards))
    else:
        config = examined.config
        yield _python()
        yield _config(examined, command.train_options)
    yield from _data(examined)
    yield from _torch(config, cards)
    if len(cards) > 1 and config.ranks == 1 and not config.takes_every_gpu:
        planned = command_text("simpletuner", "plan", f"--gpus={len(cards)}")
        yield MachineCheck("GPUs", "ok", f"{len(cards)}, of which one trains; {planned} says how all of them can")
    yield _compiler(config, cards)
    yield _extras(config)
    if config.zero_optimization:
        yield _deepspeed()
    if cards or FLAVOURS[config.model_flavour].repo is None:
        yield from _memory(examined, cards, command.train_options)
    yield from _disk(config)
    yield _token(config, command.online)


def _usual(cards: Sequence[Gpu]) -> RunConfig:
    """What `simpletuner init` would write for a subject and this machine's card."""
    card = card_of(_largest(cards))
    options = {**FLAVOURS["dev"].option_defaults, **recipe("subject", "dev").options, "output_dir": "output"}
    return RunConfig(**options | dict({} if card is None else card.fits["dev"].options))


def _first_step(cards: Sequence[Gpu]) -> str:
    """How to begin, with the model whose weights stay on this machine's card where dev's do not."""
    smaller = resident_flavour(card_of(_largest(cards)))
    if smaller is None:
        return "simpletuner init"
    flavour = FLAVOURS[smaller]
    return (
        f"simpletuner init, or simpletuner init --model {smaller}: {flavour.title} fits on this GPU without streaming. "
        f"Its license: {flavour.license}."
    )


def _largest(cards: Sequence[Gpu]) -> float:
    """GiB of the largest GPU; 0.0 without one."""
    return max((card.total_bytes / GIB for card in cards if card.total_bytes is not None), default=0.0)


def _python() -> MachineCheck:
    return MachineCheck("Python", "ok", f"{platform.python_version()}, {platform.system()}, {sys.prefix}")


def _config(examined: Examined, train_options: Sequence[str]) -> MachineCheck:
    place = str(examined.config_file or examined.datasets_file)
    if not examined.problems:
        return MachineCheck("config", "ok", place)
    found = f"{place}: {len(examined.problems)} {'problem' if len(examined.problems) == 1 else 'problems'}"
    remedy = command_text("simpletuner", "config", "check", *train_options)
    return MachineCheck("config", "missing", found, remedy, ConfigError.exit_code)


def _data(examined: Examined) -> Iterator[MachineCheck]:
    """How many images each set has; none is decoded."""
    sets = () if examined.datasets is None else examined.datasets.train_sets
    for image_set in sets:
        try:
            found = discover(storage_of(image_set.instance_data_dir))
        except DataError as error:
            problem = error.problems[0]
            yield MachineCheck("images", "missing", problem.found, problem.remedy, DataError.exit_code)
            continue
        told = f"{len(found.pictures)} in {image_set.instance_data_dir}"
        if found.pictures:
            yield MachineCheck("images", "ok", told)
        else:
            remedy = f"Put images into {image_set.instance_data_dir}."
            yield MachineCheck("images", "missing", told, remedy, DataError.exit_code)


def _torch(config: RunConfig, cards: Sequence[Gpu]) -> Iterator[MachineCheck]:
    """torch, its CUDA, the driver and the GPUs, as far as they must go together."""
    install = INSTALL.format("cuda" if cards else "cpu")
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        yield MachineCheck("torch", "missing", f"cannot be imported: {error}", install, ConfigError.exit_code)
        return
    build = torch.version.cuda
    told = f"{torch.__version__}, {'built for the CPU' if build is None else f'CUDA {build}'}"
    if not cards and not torch.cuda.is_available():
        yield MachineCheck("torch", "ok", told)
        if FLAVOURS[config.model_flavour].repo is None:
            yield MachineCheck("GPU", "ok", "none, and none is needed for the embedded model")
        else:
            remedy = "Use a machine with an NVIDIA GPU of 8 GB or more, or try: simpletuner train --example tiny-lora"
            yield MachineCheck("GPU", "missing", "no NVIDIA GPU was found", remedy, MemoryBudgetError.exit_code)
        return
    if build is None:
        remedy = f"pip uninstall -y torch && {install}"
        yield MachineCheck("torch", "missing", f"{told}, beside a GPU", remedy, ConfigError.exit_code)
    else:
        yield MachineCheck("torch", "ok", told)
    for card in cards:
        size = "" if card.total_bytes is None else f", {format_size(card.total_bytes)}"
        told = f"{card.name}{size}, driver {card.driver}"
        needed = DRIVERS.get(int(build.partition(".")[0]), 0) if build else 0
        major = card.driver.partition(".")[0]
        if major.isdecimal() and int(major) < needed:
            remedy = f"Install an NVIDIA driver of {needed} or newer: CUDA {build} needs it."
            yield MachineCheck("GPU", "missing", told, remedy, ConfigError.exit_code)
        elif build and not torch.cuda.is_available():
            remedy = "Restart the machine after a driver update; in a container, give it the GPU."
            yield MachineCheck("GPU", "missing", f"{told}, which torch cannot use", remedy, ConfigError.exit_code)
        elif build and torch.cuda.get_device_capability(0) < BF16_CAPABILITY and config.mixed_precision == "bf16":
            yield MachineCheck("GPU", "warning", f"{told}, without bf16", "Give --mixed_precision=fp16.")
        else:
            yield MachineCheck("GPU", "ok", told)


def _compiler(config: RunConfig, cards: Sequence[Gpu]) -> MachineCheck:
    """What compiled blocks take: only where the options ask for them, or may choose them."""
    if config.dynamo_backend == "no" or (config.dynamo_backend == "auto" and not cards):
        return MachineCheck("compiler", "ok", "not needed: blocks are not compiled")
    lacks = []
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        lacks.append("C compiler")
    if cards and find_spec("triton") is None:
        lacks.append("Triton")
    if not lacks:
        return MachineCheck("compiler", "ok", "a C compiler and Triton" if cards else "a C compiler")
    told = f"no {join_names(lacks, 'and no')}"
    commands = {"C compiler": "sudo apt install gcc", "Triton": "pip install triton"}
    remedy = " && ".join(commands[lack] for lack in lacks)
    if config.dynamo_backend == "auto":
        return MachineCheck("compiler", "warning", f"{told}: blocks are not compiled, steps take longer", remedy)
    return MachineCheck("compiler", "missing", told, f"{remedy}, or give --dynamo_backend=no", ConfigError.exit_code)


def _extras(config: RunConfig) -> MachineCheck:
    versions = {name: installed_version(name) for name in OPTIONAL}
    here = [f"{name} {version}" for name, version in versions.items() if version is not None]
    told = join_names(here, "and") if here else "none is installed"
    lacks = [problem for _, problem in precision_findings(config)]
    if lacks:
        remedy = INSTALL.format("quantization")
        return MachineCheck("extras", "missing", f"{told}; {lacks[0].found}", remedy, ConfigError.exit_code)
    return MachineCheck("extras", "ok", told)


def _deepspeed() -> MachineCheck:
    lack = deepspeed_lack()
    if lack is None:
        return MachineCheck("DeepSpeed", "ok", f"deepspeed {installed_version('deepspeed')}")
    return MachineCheck("DeepSpeed", "missing", lack.found, lack.remedy, ConfigError.exit_code)


def _memory(examined: Examined, cards: Sequence[Gpu], train_options: Sequence[str]) -> Iterator[MachineCheck]:
    """The memory plan against what is free now."""
    try:
        from simpletuner.flux2.footprint import Workload
        from simpletuner.memory.device import choose_device
        from simpletuner.train.budget import MEMORY_WORDS, Budget, configured, this_machine, with_processes
    except (ImportError, OSError):  # `_torch` says so
        return
    config = examined.config
    machine = this_machine(choose_device(), Path(config.output_dir))
    if cards and machine.accelerator is None:  # which torch cannot use yet
        machine = machine.of_size(_largest(cards) * GIB, float(machine.ram))
    work = Workload((1024, 1024), config.train_batch_size)
    if examined.datasets is not None:
        work = configured(replace(examined, problems=()).loaded())
    plan = Budget(with_processes(config, len(cards)), work, machine).plan
    lacks = {lack.place for lack in plan.lacks}
    remedy = "simpletuner init" if examined.datasets is None else command_text("simpletuner", "plan", *train_options)
    for place, name in MEMORY_WORDS.items():
        there = machine.has(place)
        if there is None:
            continue
        told = f"{format_size(plan.peak(place))} of {format_size(there)} that are free"
        if place not in lacks:
            yield MachineCheck(name, "ok", told)
        elif place == "accelerator":
            yield MachineCheck(name, "missing", told, remedy, MemoryBudgetError.exit_code)
        else:  # what is free of it changes, and a system can swap
            yield MachineCheck(name, "warning", told, remedy)


def _disk(config: RunConfig) -> Iterator[MachineCheck]:
    """Room for the weights and for the run, and the right to write."""
    for name, folder, needed in (
        ("download", hub_cache(config), missing_download(config, preview_download(config))),
        ("output", Path(config.output_dir), config.disk_low_bytes),
    ):
        if not needed:
            continue
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path))
        free = disk_room(folder)
        told = f"{format_size(needed)} of {format_size(free)} free in {folder}"
        option = "--cache_dir" if name == "download" else "--output_dir"
        if not os.access(place, os.W_OK, effective_ids=True):
            remedy = f"Give yourself the right to write there, or another folder with {option}."
            yield MachineCheck(name, "missing", f"{place} may not be written", remedy, DiskError.exit_code)
        elif free < needed:
            remedy = f"Free some space, or choose another disk with {option}."
            yield MachineCheck(name, "missing", told, remedy, DiskError.exit_code)
        else:
            yield MachineCheck(name, "ok", told)


def _token(config: RunConfig, is_online: bool) -> MachineCheck:
    """Whether the Hub would hand out the weights. The token itself is never shown."""
    from huggingface_hub import constants

    flavour = FLAVOURS[config.model_flavour]
    repo = config.pretrained_model_name_or_path or flavour.repo
    if repo is None or not Hub.is_id(repo) or os.path.exists(repo) or not missing_download(config):
        return MachineCheck("Hub", "ok", "not needed: nothing is to be downloaded")
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    is_here = any(os.environ.get(name) for name in variables) or os.path.isfile(constants.HF_TOKEN_PATH)
    is_open = repo == flavour.repo and flavour.license_notice is None
    if not is_here and not is_open:
        remedy = f"Accept the license on https://huggingface.co/{repo}, then: hf auth login"
        return MachineCheck("Hub", "missing", "no token on this machine", remedy, AccessError.exit_code)
    if not is_online:
        found = f"{flavour.title} is {flavour.license}: no token is needed" if is_open else "a token is here"
        return MachineCheck("Hub", "ok", f"{found}; --online asks whether {repo} may be read")
    try:
        commit = Hub(repo, config, lambda _: None, os.environ).check_access()
    except AccessError as error:
        return MachineCheck("Hub", "missing", error.problems[0].found, error.problems[0].remedy, AccessError.exit_code)
    return MachineCheck("Hub", "ok", f"{repo} may be read, at {commit[:8]}")
