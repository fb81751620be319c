"""Whether a run's blocks are compiled: what `dynamo_backend` comes to on this machine, for this run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.rules import streaming_conflict
from simpletuner.config.run import RunConfig
from simpletuner.config.values import shown

UNREPAID_STEPS = 200
"""So many steps or fewer are over before faster steps have made up for the compilation."""

FindLack = Callable[[str], str | None]
"""Why blocks cannot be compiled for a type of device, None if they can: `memory.compile.compiler_lack`."""


@dataclass(frozen=True)
class BackendChoice:
    """What `dynamo_backend` auto comes to."""

    backend: Literal["no", "inductor"]
    reason: str = ""
    """Why, in a line for the user; empty on a CPU, where nobody expects compiled blocks."""


def choose_backend(config: RunConfig, device: torch.device, steps: int, find_lack: FindLack) -> BackendChoice:
    """Choose for a run of `steps` steps that begins now. The compiler is tried only if nothing else forbids it."""
    if device.type == "cpu":
        return BackendChoice("no")
    conflict = streaming_conflict(config)
    if conflict is not None:
        key, reason, _ = conflict
        return uncompiled(f"enable_group_offload with {key} = {shown(vars(config)[key])}: {reason}")
    if config.zero_stage == 3:
        return uncompiled("DeepSpeed's stage 3 gathers weights inside the blocks")
    if steps <= UNREPAID_STEPS:
        return uncompiled(f"{steps} steps are too few to make up for the compilation (more than {UNREPAID_STEPS} are)")
    lack = find_lack(device.type)
    if lack is not None:
        return uncompiled(f"this machine cannot: {lack}")
    return BackendChoice("inductor", f"The blocks are compiled (dynamo_backend = auto): {steps} steps make up for it.")


def uncompiled(reason: str) -> BackendChoice:
    """The choice of `dynamo_backend` auto not to compile, for `reason`."""
    return BackendChoice("no", f"The blocks are not compiled (dynamo_backend = auto): {reason.rstrip('.')}.")


def check_backend(config: RunConfig, device: torch.device, find_lack: FindLack) -> None:
    """Raise a ConfigError where blocks are to be compiled, by the user's word or the run's record, and cannot be."""
    if config.dynamo_backend != "inductor":
        return
    lack = find_lack(device.type)
    if lack is not None:
        raise ConfigError.of(
            f"dynamo_backend = inductor on a machine that cannot compile: {lack}",
            remedy="Mend that, or give --dynamo_backend=no to train uncompiled.",
        )
