"""`simpletuner doctor`: check whether this machine can train, before anything is downloaded."""

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
from simpletuner.base.machine import Gpu, free_disk_bytes, gpus
from simpletuner.base.sizes import GIB, format_size
from simpletuner.base.storage import storage_of
from simpletuner.cli.arguments import Flag, parse_command
from simpletuner.cli.env import installed_version
from simpletuner.cli.loading import examine_here
from simpletuner.cli.printing import json_text, table
from simpletuner.config.deepspeed import deepspeed_problem
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.load import NO_CONFIGURATION, ExaminedConfig
from simpletuner.config.previews import preview_source
from simpletuner.config.recipes import card_of, recipe, resident_flavour
from simpletuner.config.rules import precision_findings
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names
from simpletuner.data.discover import discover
from simpletuner.flux2.model_locations import Hub, hub_cache, missing_download

USAGE = """usage: simpletuner doctor [--online] [--json] [options of `simpletuner train`]

  Checks whether this machine has what the configuration in this folder needs; without a configuration, what a LoRA of
  FLUX.2-dev needs. Nothing is loaded or downloaded. The exit code is 0 if training can start, otherwise the code with
  which training would fail.
"""

State = Literal["ok", "warning", "missing"]

DRIVERS = {12: 525, 13: 580}
"""The oldest NVIDIA driver that supports each major version of CUDA."""
BF16_CAPABILITY = (8, 0)
OPTIONAL_PACKAGES = ("bitsandbytes", "optimum-quanto", "torchao", "deepspeed", "tensorboard", "wandb")
INSTALL = "pip install -e '.[{}]'"
"""Command that installs an extra, typed in the clone of the repository."""


@dataclass(frozen=True)
class DoctorCommand:
    """Arguments of `simpletuner doctor`."""

    online: bool = Flag("also ask the Hub whether your token may read the weights").default(False)
    json: bool = Flag("print one JSON object instead").default(False)
    train_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineCheck:
    """The result of one check, which is printed as one line."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to type or do; empty if the check is ok."""
    exit_code: int = 0
    """Exit code with which training would fail, if `state` is "missing"."""


FORMS = {"": DoctorCommand}


def run(arguments: list[str]) -> int:
    """Print a line for each check. Returns 0 if training can start, otherwise the lowest exit code of the failures.

    Raises:
        ConfigError: a mistake in this command's flags.
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
        say("\n" + "\n".join(dict.fromkeys(f"{check.name}: {check.remedy}" for check in remedies)))
    say("\nTraining can start." if code == 0 else "\nTraining cannot start yet.")
    return code


def _checks(command: DoctorCommand) -> Iterator[MachineCheck]:
    examined = examine_here(command.train_options)
    cards = gpus()
    if examined.config_file is None and examined.datasets is None:
        ConfigError.raise_if(problem for problem in examined.problems if problem.found != NO_CONFIGURATION)
        config = _default_config(cards)
        examined = replace(examined, config=config)
        finding = f"none in this folder: the lines below are for a LoRA of {FLAVOURS[config.model_flavour].title}"
        yield _python()
        yield MachineCheck("config", "warning", finding, _first_step(cards))
    else:
        config = examined.config
        yield _python()
        yield _config(examined, command.train_options)
    yield from _data(examined)
    yield from _torch(config, cards)
    if len(cards) > 1 and config.ranks == 1 and not config.takes_every_gpu:
        plan = command_text("simpletuner", "plan", f"--gpus={len(cards)}")
        yield MachineCheck("GPUs", "ok", f"{len(cards)}, of which one trains; {plan} shows how to train on all")
    yield _compiler(config, cards)
    yield _extras(config)
    if config.zero_optimization:
        yield _deepspeed()
    if cards or FLAVOURS[config.model_flavour].repo is None:
        yield from _memory(examined, cards, command.train_options)
    yield from _disk(config)
    yield _token(config, command.online)


def _default_config(cards: Sequence[Gpu]) -> RunConfig:
    """The options that `simpletuner init` writes for a LoRA of a subject on dev and this machine's GPU."""
    card = card_of(_largest_gpu_gib(cards))
    options = {**FLAVOURS["dev"].option_defaults, **recipe("subject", "dev").options, "output_dir": "output"}
    return RunConfig(**options | dict({} if card is None else card.fits["dev"].options))


def _first_step(cards: Sequence[Gpu]) -> str:
    """The `simpletuner init` command to type, and a smaller model if that fits on this GPU but dev does not."""
    smaller = resident_flavour(card_of(_largest_gpu_gib(cards)))
    if smaller is None:
        return "simpletuner init"
    flavour = FLAVOURS[smaller]
    return (
        f"simpletuner init, or simpletuner init --model {smaller}: {flavour.title} fits on this GPU without streaming. "
        f"Its license: {flavour.license}."
    )


def _largest_gpu_gib(cards: Sequence[Gpu]) -> float:
    """Memory of the largest GPU in GiB; 0.0 without one."""
    return max((card.total_bytes / GIB for card in cards if card.total_bytes is not None), default=0.0)


def _python() -> MachineCheck:
    return MachineCheck("Python", "ok", f"{platform.python_version()}, {platform.system()}, {sys.prefix}")


def _config(examined: ExaminedConfig, train_options: Sequence[str]) -> MachineCheck:
    file = str(examined.config_file or examined.datasets_file)
    if not examined.problems:
        return MachineCheck("config", "ok", file)
    finding = f"{file}: {len(examined.problems)} {'problem' if len(examined.problems) == 1 else 'problems'}"
    remedy = command_text("simpletuner", "config", "check", *train_options)
    return MachineCheck("config", "missing", finding, remedy, ConfigError.exit_code)


def _data(examined: ExaminedConfig) -> Iterator[MachineCheck]:
    """The number of images in each training dataset; no image is decoded."""
    sets = () if examined.datasets is None else examined.datasets.train_sets
    for image_set in sets:
        try:
            files = discover(storage_of(image_set.instance_data_dir))
        except DataError as error:
            problem = error.problems[0]
            yield MachineCheck("images", "missing", problem.found, problem.remedy, DataError.exit_code)
            continue
        finding = f"{len(files.pictures)} in {image_set.instance_data_dir}"
        if files.pictures:
            yield MachineCheck("images", "ok", finding)
        else:
            remedy = f"Put images into {image_set.instance_data_dir}."
            yield MachineCheck("images", "missing", finding, remedy, DataError.exit_code)


def _torch(config: RunConfig, cards: Sequence[Gpu]) -> Iterator[MachineCheck]:
    """torch, its CUDA version, the driver and the GPUs: whether they work together."""
    install = INSTALL.format("cuda" if cards else "cpu")
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        yield MachineCheck("torch", "missing", f"cannot be imported: {error}", install, ConfigError.exit_code)
        return
    build = torch.version.cuda
    finding = f"{torch.__version__}, {'built for the CPU' if build is None else f'CUDA {build}'}"
    if not cards and not torch.cuda.is_available():
        yield MachineCheck("torch", "ok", finding)
        if FLAVOURS[config.model_flavour].repo is None:
            yield MachineCheck("GPU", "ok", "none; the embedded model needs none")
        else:
            remedy = "Use a machine with an NVIDIA GPU of 8 GB or more, or try: simpletuner train --example tiny-lora"
            yield MachineCheck("GPU", "missing", "no NVIDIA GPU was found", remedy, MemoryBudgetError.exit_code)
        return
    with_cuda = f"pip uninstall -y torch && {install}"
    if build is None:
        yield MachineCheck("torch", "missing", f"{finding}, although there is a GPU", with_cuda, ConfigError.exit_code)
    else:
        yield MachineCheck("torch", "ok", finding)
    # By name: nvidia-smi orders the GPUs by bus and lists all, torch orders them by speed and lists the visible ones.
    devices = range(torch.cuda.device_count() if build and torch.cuda.is_available() else 0)
    capabilities = {torch.cuda.get_device_name(each): torch.cuda.get_device_capability(each) for each in devices}
    for card in cards:
        size = "" if card.total_bytes is None else f", {format_size(card.total_bytes)}"
        finding = f"{card.name}{size}, driver {card.driver}"
        if build is None:
            finding = f"{finding}, which this torch cannot use"
            yield MachineCheck("GPU", "missing", finding, with_cuda, ConfigError.exit_code)
            continue
        needed = DRIVERS.get(int(build.partition(".")[0]), 0)
        major = card.driver.partition(".")[0]
        capability = capabilities.get(card.name, BF16_CAPABILITY)
        if major.isdecimal() and int(major) < needed:
            remedy = f"Install an NVIDIA driver of {needed} or newer: CUDA {build} needs it."
            yield MachineCheck("GPU", "missing", finding, remedy, ConfigError.exit_code)
        elif not torch.cuda.is_available():
            remedy = "Restart the machine after a driver update; in a container, pass the GPU to it."
            yield MachineCheck("GPU", "missing", f"{finding}, which torch cannot use", remedy, ConfigError.exit_code)
        elif capability < BF16_CAPABILITY and config.mixed_precision == "bf16":
            yield MachineCheck("GPU", "warning", f"{finding}, without bf16", "Give --mixed_precision=fp16.")
        else:
            yield MachineCheck("GPU", "ok", finding)


def _compiler(config: RunConfig, cards: Sequence[Gpu]) -> MachineCheck:
    """Whether the tools for compiling blocks are installed, if the options enable compilation or allow it."""
    if config.dynamo_backend == "no" or (config.dynamo_backend == "auto" and not cards):
        return MachineCheck("compiler", "ok", "not needed: blocks are not compiled")
    missing = []
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        missing.append("C compiler")
    if cards and find_spec("triton") is None:
        missing.append("Triton")
    if not missing:
        return MachineCheck("compiler", "ok", "a C compiler and Triton" if cards else "a C compiler")
    finding = f"no {join_names(missing, 'and no')}"
    commands = {"C compiler": "sudo apt install gcc", "Triton": "pip install triton"}
    remedy = " && ".join(commands[tool] for tool in missing)
    if config.dynamo_backend == "auto":
        return MachineCheck("compiler", "warning", f"{finding}: blocks are not compiled, steps take longer", remedy)
    return MachineCheck("compiler", "missing", finding, f"{remedy}, or give --dynamo_backend=no", ConfigError.exit_code)


def _extras(config: RunConfig) -> MachineCheck:
    versions = {name: installed_version(name) for name in OPTIONAL_PACKAGES}
    installed = [f"{name} {version}" for name, version in versions.items() if version is not None]
    finding = join_names(installed, "and") if installed else "none is installed"
    problems = [problem for _, problem in precision_findings(config)]
    if problems:
        remedy = INSTALL.format("quantization")
        return MachineCheck("extras", "missing", f"{finding}; {problems[0].found}", remedy, ConfigError.exit_code)
    return MachineCheck("extras", "ok", finding)


def _deepspeed() -> MachineCheck:
    problem = deepspeed_problem()
    if problem is None:
        return MachineCheck("DeepSpeed", "ok", f"deepspeed {installed_version('deepspeed')}")
    return MachineCheck("DeepSpeed", "missing", problem.found, problem.remedy, ConfigError.exit_code)


def _memory(examined: ExaminedConfig, cards: Sequence[Gpu], train_options: Sequence[str]) -> Iterator[MachineCheck]:
    """The planned memory, compared with the free memory."""
    try:
        from simpletuner.flux2.footprint import Workload
        from simpletuner.memory.device import choose_device
        from simpletuner.train.budget import TIER_WORDS, Budget, configured_workload, free_resources, with_processes
    except (ImportError, OSError):  # `_torch` reports this
        return
    config = examined.config
    machine = free_resources(choose_device(), Path(config.output_dir))
    if cards and machine.accelerator is None:  # torch cannot use the GPU yet
        machine = machine.of_size(_largest_gpu_gib(cards) * GIB, float(machine.ram))
    work = Workload((1024, 1024), config.train_batch_size)
    if examined.datasets is not None:
        work = configured_workload(replace(examined, problems=()).loaded())
    plan = Budget(with_processes(config, len(cards)), work, machine).plan
    exceeded = {lack.place for lack in plan.lacks}
    remedy = "simpletuner init" if examined.datasets is None else command_text("simpletuner", "plan", *train_options)
    for memory, name in TIER_WORDS.items():
        free = machine.available(memory)
        if free is None:
            continue
        finding = f"needs {format_size(plan.peak(memory))} of {format_size(free)} free"
        if memory not in exceeded:
            yield MachineCheck(name, "ok", finding)
        elif memory == "accelerator":
            yield MachineCheck(name, "missing", finding, remedy, MemoryBudgetError.exit_code)
        else:  # free RAM changes over time, and the system can swap
            yield MachineCheck(name, "warning", finding, remedy)


def _disk(config: RunConfig) -> Iterator[MachineCheck]:
    """Disk space for the download and for the run, and write permission."""
    for name, folder, needed in (
        ("download", hub_cache(config), missing_download(config, preview_source(config))),
        ("output", Path(config.output_dir), config.disk_low_bytes),
    ):
        if not needed:
            continue
        existing_folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path))
        free = free_disk_bytes(folder)
        finding = f"needs {format_size(needed)} of {format_size(free)} free in {folder}"
        option = "--cache_dir" if name == "download" else "--output_dir"
        if not os.access(existing_folder, os.W_OK, effective_ids=True):
            remedy = f"Give yourself write permission for it, or choose another folder with {option}."
            yield MachineCheck(name, "missing", f"{existing_folder} is not writable", remedy, DiskError.exit_code)
        elif free < needed:
            remedy = f"Free some space, or choose another disk with {option}."
            yield MachineCheck(name, "missing", finding, remedy, DiskError.exit_code)
        else:
            yield MachineCheck(name, "ok", finding)


def _token(config: RunConfig, is_online: bool) -> MachineCheck:
    """Whether the Hub grants access to the weights. The token is never printed."""
    from huggingface_hub import constants

    flavour = FLAVOURS[config.model_flavour]
    repo = config.pretrained_model_name_or_path or flavour.repo
    if repo is None or not Hub.is_id(repo) or os.path.exists(repo) or not missing_download(config):
        return MachineCheck("Hub", "ok", "not needed: there is nothing to download")
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    has_token = any(os.environ.get(name) for name in variables) or os.path.isfile(constants.HF_TOKEN_PATH)
    is_open = repo == flavour.repo and flavour.license_notice is None
    if not has_token and not is_open:
        remedy = f"Accept the license on https://huggingface.co/{repo}, then: hf auth login"
        return MachineCheck("Hub", "missing", "no token on this machine", remedy, AccessError.exit_code)
    if not is_online:
        finding = f"{flavour.title} is {flavour.license}: no token is needed" if is_open else "there is a token"
        return MachineCheck("Hub", "ok", f"{finding}; --online checks whether {repo} may be read")
    try:
        commit = Hub(repo, config, lambda _: None, os.environ).check_access()
    except AccessError as error:
        return MachineCheck("Hub", "missing", error.problems[0].found, error.problems[0].remedy, AccessError.exit_code)
    return MachineCheck("Hub", "ok", f"{repo} may be read, at {commit[:8]}")
