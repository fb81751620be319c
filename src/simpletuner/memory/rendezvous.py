"""How several processes come to share a run. Whatever listens here listens on the loopback interface, or on several
machines on the address of the first.
"""

import atexit
import contextlib
import datetime
import fcntl
import ipaddress
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch's own stubs
from torch.distributed.rendezvous import rendezvous

from simpletuner.base.errors import ConfigError
from simpletuner.base.machine import own_address
from simpletuner.memory.device import choose_device
from simpletuner.memory.world import (
    LOOK_FOR_RANKS_EVERY_S,
    ErrorKeys,
    KeyStore,
    PatientStore,
    Signs,
    World,
    explained,
)
from simpletuner.runs.ranks import RANKS_LISTENER, RankPlace, place_of

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_NAMES = ("lo", "lo0")
"""The loopback interface on Linux, on macOS."""
SIOCGIFADDR = 0x8915
"""Request of Linux for an interface's address (netdevice(7))."""
NCCL_ON_ONE_MACHINE = {"NCCL_IB_DISABLE": "1"}
"""Between the GPUs of one machine, NCCL need not look for InfiniBand."""


def join(environ: Mapping[str, str], timeout_s: float) -> World:
    """The world that the environment asks for: that of one process, or a place among several.

    Our own supervisor's ranks meet in a file, on several machines in a store of rank 0's. Those of torchrun use its
    store, or where it leaves that to rank 0, one of rank 0's.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself, or the network's interface is unknown.
        RanksError: the others did not come within `timeout_s`.
    """
    place = place_of(environ)
    if place is None:
        return World.single()
    address = LOOPBACK_ADDRESS if place.machines == 1 else environ["MASTER_ADDR"]
    hold_to_interface(address)
    device = choose_device()
    if device.type == "cuda":
        _check_gpu(place)
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    with explained("waiting for all to start"):
        store = _store(place, environ, address, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
        # A connection of its own: signs of life must not wait behind a collective that waits in the store.
        if not isinstance(store, FileStore):
            store = store.clone()  # type: ignore[attr-defined]  # torch's own stubs
        own: KeyStore = PrefixStore("signs", store)
    if place.machines > 1:
        own = PatientStore(own, timeout_s)
    errors = place.errors or ErrorKeys(place.rank, place.size, own, address)
    signs = Signs(own, place.rank, range(place.size), timeout_s, errors)
    signs.start()
    atexit.register(leave)
    world = World(place.rank, place.size, device, signs, place.machine, place.machines)
    return world if place.machines == 1 else replace(world, of_machine=_of_machine(world, place, timeout))


def _of_machine(world: World, place: RankPlace, timeout: datetime.timedelta) -> World:
    """`world` as the ranks of this machine share it."""
    with explained("waiting for all to start"):
        machines = [range(first, first + place.local_size) for first in range(0, place.size, place.local_size)]
        groups = [dist.new_group([*ranks], timeout) for ranks in machines]  # each rank makes all of them
    assert world.signs is not None
    signs = replace(world.signs, ranks=machines[place.machine], place=f"wait of machine {place.machine}")
    return World(place.local_rank, place.local_size, world.device, signs, place.machine, group=groups[place.machine])


def leave() -> None:
    """End the process group. A thread of gloo's that lets its last tensor go while the interpreter ends would abort the
    process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def hold_to_interface(address: str) -> None:
    """Make gloo and NCCL of this process use the interface through which this machine reaches `address`, unless the
    user has named another.

    Raises:
        ConfigError: there is none, or it cannot be told.
    """
    wanted = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not os.environ.get(name)]
    there = {name for _, name in socket.if_nameindex()}
    if address == LOOPBACK_ADDRESS:
        interface = next((name for name in LOOPBACK_NAMES if name in there), None)
        for name, value in NCCL_ON_ONE_MACHINE.items():
            os.environ.setdefault(name, value)
    else:
        interface = _interface_to(address)
    if wanted and interface is None:
        whom = "each other" if address == LOOPBACK_ADDRESS else f"the machine at {address}"
        raise ConfigError.of(
            f"no interface of this machine is known to reach {whom}; there are {', '.join(sorted(there))}",
            "one through which the processes talk to each other",
            f"Set {' and '.join(wanted)} to the name of an interface.",
        )
    os.environ.update({name: interface for name in wanted if interface is not None})


def _interface_to(address: str) -> str | None:
    """Name of the interface, by its IPv4 address, that leads to `address`; None where it is loopback or not found."""
    try:
        own = own_address(address)
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(asking, SIOCGIFADDR, request)[20:24]) == own:
                    return name
    return None


def _check_gpu(place: RankPlace) -> None:
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError.of(
            f"{place.local_size} processes on {count} visible GPUs",
            "at most one on each",
            f"Start {count}, or make more visible with CUDA_VISIBLE_DEVICES.",
        )


def _store(place: RankPlace, environ: Mapping[str, str], address: str, timeout: datetime.timedelta) -> Store:
    """Where the ranks find each other."""
    if place.folder is not None and place.machines == 1:
        return FileStore(str(place.folder / "store"), place.size)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(iter(rendezvous("env://", place.rank, place.size, timeout=timeout)))[0]
        return PrefixStore(start_name(store, place, timeout), store)
    port = int(environ["MASTER_PORT"])
    if place.rank > 0:
        return TCPStore(address, port, place.size, is_master=False, timeout=timeout)
    # Left to itself, a store of torch listens on every interface.
    descriptor = environ.get(RANKS_LISTENER) if place.folder else None
    try:
        listener = int(descriptor) if descriptor else socket.create_server((address, port)).detach()
    except OSError as error:
        raise ConfigError.of(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {error.strerror}",
            "an address of this machine and a port that is free",
        ) from None
    return TCPStore(address, port, place.size, is_master=True, timeout=timeout, master_listen_fd=listener)


def start_name(store: Store, place: RankPlace, timeout: datetime.timedelta) -> str:
    """A name that the ranks of this start share, and those of no earlier one: torchrun's store outlives a restart, and
    holds keys of ranks that are gone. Rank 0 names the start and lists who has answered, each by a number of its own.
    """
    own = secrets.token_hex(8)
    if place.rank == 0:
        store.set("start", own)
        answers = [store.get(f"{own}/{rank}").decode() for rank in range(1, place.size)]
        store.set(f"{own}/all", " ".join(answers))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("start").decode()  # perhaps that of an earlier start, before rank 0 is here
        store.set(f"{name}/{place.rank}", own)
        if store.check([f"{name}/all"]) and own in store.get(f"{name}/all").decode().split():
            return name
        time.sleep(LOOK_FOR_RANKS_EVERY_S)
    raise RuntimeError("rank 0 has not named this start")
