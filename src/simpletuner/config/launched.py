"""Read the number of processes and machines that torchrun, our supervisor or Slurm's srun set for this process."""

import re
from collections.abc import Mapping

from simpletuner.base.console import is_terminal
from simpletuner.base.errors import Problem
from simpletuner.config.given import CheckedKeys, GivenValue
from simpletuner.config.run import RunConfig

SLURM_NODES, SLURM_TASKS, SLURM_NODE, SLURM_NODE_LIST, SLURM_JOB = (
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NODEID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
"""Environment variables that srun sets for each task of a step (srun(1), "Output environment variables")."""
MIN_SLURM_PORT, SLURM_PORT_COUNT = 10_000, 20_000
"""The lowest port and the number of ports from which the job's number selects one; all are below Linux's ephemeral
ports, which begin at 32768."""


def with_launched_processes(
    config: RunConfig, givens: Mapping[str, GivenValue], checked: CheckedKeys, environ: Mapping[str, str]
) -> RunConfig:
    """The config with the number of processes and machines that this process was started with, if there are several. If
    srun started one process on each node and `num_machines` is not given, Slurm's nodes are the machines.
    """
    if "RANK" not in environ:
        # A command at a terminal was typed inside a step, not started by srun on each node.
        return config if "num_machines" in givens or is_terminal() else _with_nodes(config, givens, checked, environ)
    size, ranks_per_machine, rank = (_number(environ.get(name)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"))
    if size < 2:
        return config
    ranks_per_machine = ranks_per_machine or size  # `read_rank_place` reports missing or contradictory values
    started = {"num_processes": size, "num_machines": max(1, size // ranks_per_machine)}
    for name, number in started.items():
        if name in givens and vars(config)[name] not in (None, number):
            checked.problems[name] = Problem(
                f"{givens[name].spelled} = {vars(config)[name]}, and torchrun started {number} "
                f"{name.removeprefix('num_')}",
                str(number),
                "Remove it, or start simpletuner train without torchrun: it starts the processes itself.",
            )
    return config.model_copy(update={**started, "machine_rank": rank // ranks_per_machine})


def _with_nodes(
    config: RunConfig, givens: Mapping[str, GivenValue], checked: CheckedKeys, environ: Mapping[str, str]
) -> RunConfig:
    """The config with the nodes of a Slurm step as machines. Given options keep their values."""
    nodes, tasks, node, job = (_number(environ.get(name)) for name in (SLURM_NODES, SLURM_TASKS, SLURM_NODE, SLURM_JOB))
    if nodes < 2:
        return config
    if tasks != nodes:
        checked.problems["num_machines"] = Problem(
            f"srun started {tasks} tasks on {nodes} nodes",
            "one on each node, which starts that node's processes",
            "Let srun start one task on each node; or give --num_machines=1, if each task trains its own run.",
        )
    slurm = {
        "num_machines": nodes,
        "machine_rank": node,
        "main_process_ip": first_node(environ.get(SLURM_NODE_LIST, "")),
        "main_process_port": MIN_SLURM_PORT + job % SLURM_PORT_COUNT,
    }
    return config.model_copy(update={name: value for name, value in slurm.items() if name not in givens})


def _number(text: str | None) -> int:
    """Parse a number from the environment; 0 if it is missing or not a number."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else 0


def first_node(node_list: str) -> str:
    """Name of the first node in Slurm's node list: n01 of "n[01-03,7],m2"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")
