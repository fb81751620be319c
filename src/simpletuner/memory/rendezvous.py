"""How several processes come to share a run. Whatever listens here listens on the loopback interface."""

import atexit
import datetime
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch's own stubs
from torch.distributed.rendezvous import rendezvous

from simpletuner.base.errors import ConfigError
from simpletuner.memory.device import choose_device
from simpletuner.memory.world import Signs, World, explained
from simpletuner.runs.ranks import RankErrors, RankPlace, place_of

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_NAMES = ("lo", "lo0")
"""The loopback interface on Linux, on macOS."""
NCCL_ON_ONE_MACHINE = {"NCCL_IB_DISABLE": "1"}
"""Between the GPUs of one machine, NCCL need not look for InfiniBand."""


def join(environ: Mapping[str, str], timeout_s: float) -> World:
    """The world that the environment asks for: that of one process, or a place among several on this machine.

    Our own supervisor's ranks meet in a file. Those of torchrun use its store, or where it leaves that to rank 0, a
    store on the loopback interface.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself, or asks for several machines.
        RanksError: the others did not come within `timeout_s`.
    """
    place = place_of(environ)
    if place is None:
        return World.single()
    hold_to_loopback()
    device = choose_device()
    if device.type == "cuda":
        _check_gpu(place)
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    with explained("waiting for all to start"):
        store = _store(place, environ, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
        errors = place.errors or RankErrors(_shared_folder(store, place.rank), place.rank, place.size)
    signs = Signs(PrefixStore("signs", store), place.rank, place.size, timeout_s, errors)
    signs.start()
    atexit.register(leave)
    return World(place.rank, place.size, device, signs)


def leave() -> None:
    """End the process group. A thread of gloo's that lets its last tensor go while the interpreter ends would abort the
    process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def hold_to_loopback() -> None:
    """Make gloo and NCCL of this process use the loopback interface, unless the user has named another.

    Raises:
        ConfigError: this machine has none.
    """
    there = {name for _, name in socket.if_nameindex()}
    interface = next((name for name in LOOPBACK_NAMES if name in there), None)
    wanted = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not os.environ.get(name)]
    if wanted and interface is None:
        raise ConfigError.of(
            f"this machine has no loopback interface, only {', '.join(sorted(there))}",
            "one through which its processes talk to each other",
            f"Set {' and '.join(wanted)} to the name of an interface.",
        )
    os.environ.update({name: interface for name in wanted if interface is not None})
    for name, value in NCCL_ON_ONE_MACHINE.items():
        os.environ.setdefault(name, value)


def _check_gpu(place: RankPlace) -> None:
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError.of(
            f"{place.size} processes on {count} visible GPUs",
            "at most one on each",
            f"Start {count}, or make more visible with CUDA_VISIBLE_DEVICES.",
        )


def _store(place: RankPlace, environ: Mapping[str, str], timeout: datetime.timedelta) -> Store:
    """Where the ranks find each other."""
    if place.folder is not None:
        return FileStore(str(place.folder / "store"), place.size)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(iter(rendezvous("env://", place.rank, place.size, timeout=timeout)))[0]
        return store
    port = int(environ["MASTER_PORT"])
    if place.rank > 0:
        return TCPStore(LOOPBACK_ADDRESS, port, place.size, is_master=False, timeout=timeout)
    # Left to itself, a store of torch listens on every interface.
    try:
        listener = socket.create_server((LOOPBACK_ADDRESS, port))
    except OSError as error:
        raise ConfigError.of(f"MASTER_PORT={port}: {error.strerror}", "a port that is free") from None
    return TCPStore(
        LOOPBACK_ADDRESS, port, place.size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )


def _shared_folder(store: Store, rank: int) -> Path:
    """A private temporary folder, the same one on every rank. It stays where rank 0 fails."""
    if rank == 0:
        folder = tempfile.mkdtemp(prefix="simpletuner-ranks-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        store.set("folder", folder)
    return Path(store.get("folder").decode())
