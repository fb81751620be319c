"""How several processes come to share a run."""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]  # torch's own stubs
from torch.distributed.rendezvous import rendezvous

from simpletuner.memory.device import choose_device
from simpletuner.memory.world import Signs, World

RANKS_FOLDER = "RANKS_FOLDER"
"""Environment variable: the private folder in which the processes of a run meet."""


def join(environ: Mapping[str, str], timeout_s: float) -> World:
    """The world that the environment asks for: that of one process, or a place among several.

    Raises:
        RanksError: the others did not come within `timeout_s`.
    """
    size = int(environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World.single()
    rank = int(environ["RANK"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = choose_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    if RANKS_FOLDER in environ:
        store = FileStore(str(Path(environ[RANKS_FOLDER]) / "store"), size)
    else:
        store = next(iter(rendezvous("env://", rank, size, timeout=timeout)))[0]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    signs = Signs(PrefixStore("signs", store), rank, size, timeout_s)
    signs.start()
    return World(rank, size, device, signs)
