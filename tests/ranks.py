"""Several processes that train together, on this machine's CPUs."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.memory.rendezvous import join
from simpletuner.runs.ranks import RANKS_FOLDER

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0
"""Generous: on a busy machine the imports of a process alone take 40 s."""

PATIENCE_S = 30.0
"""How long ranks that run a function wait for one that is silent."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    exit_code: int
    out: str
    err: str


def start_ranks(
    size: int, command: Sequence[str], folder: Path, *, machines: int = 1, cwds: Sequence[Path] = (), **environ: str
) -> list[subprocess.Popen[str]]:
    """`command` once for each of `size` ranks, which meet in `folder`; as if on so many machines, which meet over
    loopback. `cwds` are the working folders of the machines.
    """
    each = size // machines
    own = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(each), RANKS_FOLDER: str(folder), "OMP_NUM_THREADS": "1"}
    if machines > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        subprocess.Popen(
            command,
            cwd=cwds[rank // each] if cwds else None,
            env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank % each), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def together(
    size: int, command: Sequence[str], *, machines: int = 1, cwds: Sequence[Path] = (), **environ: str
) -> list[Ended]:
    """How the ranks that run `command` ended, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(size, command, Path(folder), machines=machines, cwds=cwds, **environ)
        ended = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=TIMEOUT_S)
                ended.append(Ended(process.returncode, out, err))
        finally:
            for process in processes:
                process.kill()
    return ended


def train_together(size: int, *flags: str) -> None:
    """`simpletuner train FLAGS` as `size` ranks, in the working folder. Only rank 0 has anything to say."""
    ended = together(size, [sys.executable, "-m", "simpletuner", "train", *flags])
    assert [each.exit_code for each in ended] == [0] * size, "\n".join(each.err for each in ended)
    assert [each.out for each in ended[1:]] == [""] * (size - 1)


def in_ranks(size: int, function: Callable[..., Any], *arguments: Any, machines: int = 1, **environ: str) -> list[Any]:
    """What `function(world, *arguments)` returns in each of `size` ranks; arguments and answers are JSON values.

    It is a function of a module of the tests.
    """
    given = json.dumps([function.__module__, function.__qualname__, list(arguments)])
    found_in = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = together(
        size, [sys.executable, "-P", "-m", "tests.ranks", given], machines=machines, PYTHONPATH=found_in, **environ
    )
    for rank, each in enumerate(ended):
        assert each.exit_code == 0, f"rank {rank}: {each.err[-3000:]}"
    return [json.loads(each.out.splitlines()[-1]) for each in ended]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    module, name, values = json.loads(sys.argv[1])
    world = join(os.environ, PATIENCE_S)
    print(json.dumps(getattr(importlib.import_module(module), name)(world, *values)), flush=True)
