"""Decide whether a run's blocks are compiled: resolve `dynamo_backend` auto for this machine and run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.rules import streaming_conflict
from simpletuner.config.run import RunConfig
from simpletuner.config.values import value_text

UNREPAID_STEPS = 200
"""A run of at most this many steps ends before faster steps repay the compilation."""

FindCompilerProblem = Callable[[str], str | None]
"""(device type) → why blocks cannot be compiled for it; None if they can. `memory.compile.compiler_problem` is one."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that `dynamo_backend` auto chose."""

    backend: Literal["no", "inductor"]
    reason: str = ""
    """The reason, in a line for the user; empty on a CPU, where nobody expects compiled blocks."""


def choose_backend(
    config: RunConfig, device: torch.device, steps: int, find_problem: FindCompilerProblem
) -> BackendChoice:
    """Choose the backend for a run of `steps` steps. The compiler is probed only if nothing else rules it out."""
    if device.type == "cpu":
        return BackendChoice("no")
    conflict = streaming_conflict(config)
    if conflict is not None:
        key, reason, _ = conflict
        return uncompiled(f"enable_group_offload with {key} = {value_text(vars(config)[key])}: {reason}")
    if config.zero_stage == 3:
        return uncompiled("DeepSpeed's stage 3 gathers weights inside the blocks")
    if steps <= UNREPAID_STEPS:
        return uncompiled(f"{steps} steps are too few to repay the compilation (it takes more than {UNREPAID_STEPS})")
    problem = find_problem(device.type)
    if problem is not None:
        return uncompiled(f"this machine cannot compile: {problem}")
    return BackendChoice("inductor", f"The blocks are compiled (dynamo_backend = auto): {steps} steps repay it.")


def uncompiled(reason: str) -> BackendChoice:
    """The choice not to compile, for `reason`."""
    return BackendChoice("no", f"The blocks are not compiled (dynamo_backend = auto): {reason.rstrip('.')}.")


def check_backend(config: RunConfig, device: torch.device, find_problem: FindCompilerProblem) -> None:
    """Raise a ConfigError if the user's option or the run's record asks for compiled blocks, but this machine cannot
    compile.
    """
    if config.dynamo_backend != "inductor":
        return
    problem = find_problem(device.type)
    if problem is not None:
        raise ConfigError.of(
            f"dynamo_backend = inductor on a machine that cannot compile: {problem}",
            remedy="Fix that, or give --dynamo_backend=no to train uncompiled.",
        )
