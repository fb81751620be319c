"""`simpletuner train`: check the configuration without torch, then train here or start one process for each GPU."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpletuner import __version__
from simpletuner.base.console import output_failures_ignored, say
from simpletuner.base.errors import ConfigError
from simpletuner.base.files import read_json, sha256_json
from simpletuner.base.machine import visible_gpus
from simpletuner.base.signals import deferred_signals
from simpletuner.cli.help import requested_help, train_help
from simpletuner.cli.loading import load_here
from simpletuner.config.deepspeed import deepspeed_findings
from simpletuner.config.load import LoadedConfig
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.record import recorded_options
from simpletuner.config.run import RunConfig
from simpletuner.config.values import no_effect
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.machines import meet
from simpletuner.runs.process import stop_if_asked
from simpletuner.runs.ranks import RANKS_NOTICE, Supervisor, as_rank, read_rank_place, train_command
from simpletuner.runs.samplers import stop_samplers

MAY_DIFFER_BETWEEN_MACHINES = {"machine_rank", "main_process_port", "max_workers"}
"""Recorded options that may have another value on each machine."""

_USAGE = "usage: simpletuner train [--config PATH | --env NAME | --example NAME] [--like FILE] [--option value ...]"


def run(arguments: list[str]) -> int:
    """Check the configuration, then train. Returns the exit code.

    Raises:
        UserError: a problem that the user can fix.
    """
    word = requested_help(arguments)
    if word is not None:
        say(train_help(_USAGE, word))
        return 0
    with deferred_signals, output_failures_ignored():
        rank_place = read_rank_place(os.environ)
        with as_rank(rank_place):
            loaded = load_here(arguments)
            if rank_place is None:
                gpus = visible_gpus(os.environ)
                size = processes(loaded.config, gpus)
                notice = _idle_gpus(loaded.config, gpus)
                loaded = _settled(loaded, size)
                if size > 1 and (loaded.config.num_machines > 1 or not _is_trained(loaded.config)):
                    return _supervise(loaded.arguments, loaded, size, notice)
                if notice is not None:
                    loaded = replace(loaded, notices=(*loaded.notices, notice))
            if rank_place is None or rank_place.rank == 0:
                stop_samplers(Path.cwd(), os.environ, say)
            # Imported late, because it loads torch: mistakes in the configuration are reported first.
            from simpletuner.memory.rendezvous import join
            from simpletuner.train import job

            stop_if_asked()
            world = join(os.environ, float(loaded.config.distributed_timeout_s))
            if rank_place is not None and rank_place.folder is not None and rank_place.machines > 1:
                of_machines = world.gather_json(os.environ.get(RANKS_NOTICE))
                loaded = replace(loaded, notices=(*loaded.notices, *(text for text in of_machines if text is not None)))
            return job.run(job.build(loaded, world))


def processes(options: RankOptions, gpus: int) -> int:
    """The number of processes that train, on machines with `gpus` visible GPUs each; without GPUs they use the CPU.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    machines, count = options.num_machines, options.num_processes
    if count is None:
        return machines * max(1, gpus) if options.takes_every_gpu else machines
    if 0 < gpus < options.ranks_per_machine:
        on_each = f" on each of {machines} machines" if machines > 1 else ""
        raise ConfigError.of(
            f"num_processes = {count} with {gpus} visible GPU{'s' * (gpus > 1)}{on_each}",
            "at most one process on each GPU",
            f"Give --num_processes={gpus * machines}, or make more GPUs visible with CUDA_VISIBLE_DEVICES.",
        )
    return count


def _supervise(arguments: Sequence[str], loaded: LoadedConfig, size: int, notice: str | None) -> int:
    """Train with `size` processes, and run this machine's share of them; returns the exit code.

    Rank 0 reports the notices of all machines. Other machines print their own `notice` too, where the ranks are silent.
    """
    config = loaded.config
    local_size = size // config.num_machines
    if notice is not None and config.machine_rank > 0:
        say(f"Note: {notice}")
    stop_samplers(Path.cwd(), {**os.environ, "LOCAL_WORLD_SIZE": str(local_size)}, say)
    stop_if_asked()
    machines = None
    if config.num_machines > 1:
        machines = meet(
            config.machine_rank,
            config.num_machines,
            config.main_process_ip,
            config.main_process_port,
            _terms(loaded, size),
            config.distributed_timeout_s,
        )
    environ = {name: value for name, value in os.environ.items() if name != RANKS_NOTICE}
    if notice is not None:
        environ[RANKS_NOTICE] = notice
    return Supervisor(local_size, RunDirectory(Path(config.output_dir)), machines)(train_command(arguments), environ)


def _terms(loaded: LoadedConfig, size: int) -> dict[str, Any]:
    """Everything that must be equal on all machines: the recorded options, the number of processes, and the prompts of
    the validation images."""
    config = loaded.config.model_copy(update={"num_processes": size})
    prompts = {name: prompt.text for name, prompt in loaded.prompts.items()}
    return {
        **{name: value for name, value in recorded_options(config).items() if name not in MAY_DIFFER_BETWEEN_MACHINES},
        "deepspeed_config": config.deepspeed_config,
        "user_prompt_library": sha256_json(prompts),
        "version": __version__,
    }


def _is_trained(config: RunConfig) -> bool:
    """Whether the run's record shows that all steps are done. Then one process is enough to report that."""
    if config.max_train_steps is None:
        return False
    try:
        done = read_json(RunDirectory(Path(config.output_dir)).finished)["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(done, int) and done >= config.max_train_steps


def _settled(loaded: LoadedConfig, size: int) -> LoadedConfig:
    """`loaded` with its number of processes, on which `deepspeed_config` may depend.

    Raises:
        ConfigError: `deepspeed_config` is wrong for this number of processes.
    """
    if loaded.config.deepspeed_config is None:
        return loaded
    config = loaded.config.model_copy(update={"num_processes": size})
    ConfigError.raise_if(problem for _, problem in deepspeed_findings(config))
    return replace(loaded, config=config)


def _idle_gpus(config: RunConfig, gpus: int) -> str | None:
    """A notice if GPUs stay idle, or an engine has no effect, because one process trains by default; None otherwise."""
    if config.num_processes is not None:
        return None
    if not config.takes_every_gpu and gpus > 1:
        here = "" if config.num_machines == 1 else f" on machine {config.machine_rank}"
        return (
            f"{gpus} GPUs are visible{here}, one trains, and {gpus - 1} stay idle. "
            f"--num_processes={gpus * config.num_machines} trains on all, with {gpus} times the effective batch."
        )
    if config.takes_every_gpu and gpus < 2 and config.num_machines == 1:
        there = "one GPU is visible" if gpus else "no GPU is visible"
        engine = "fsdp_enable" if config.fsdp_enable else "deepspeed_config"
        return no_effect([engine], f"{there}, and one process trains")
    return None
