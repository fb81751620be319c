"""Connect the processes of a run.

Sockets listen only on the loopback interface, or with several machines on the address of the first machine.
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
from simpletuner.base.machine import source_address
from simpletuner.memory.device import choose_device
from simpletuner.memory.world import (
    LOOK_FOR_RANKS_EVERY_S,
    ErrorKeys,
    Heartbeats,
    KeyStore,
    PatientStore,
    World,
    collective_errors_reported,
)
from simpletuner.runs.ranks import RANKS_LISTENER, RankPlace, read_rank_place

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_NAMES = ("lo", "lo0")
"""Names of the loopback interface: on Linux, on macOS."""
SIOCGIFADDR = 0x8915
"""Linux's ioctl request for an interface's address (netdevice(7))."""
NCCL_ON_ONE_MACHINE = {"NCCL_IB_DISABLE": "1"}
"""Environment that keeps NCCL from searching for InfiniBand, which GPUs of one machine do not use."""


def join(environ: Mapping[str, str], timeout_s: float) -> World:
    """Join the ranks that the environment describes; without any, return the world of a single process.

    Ranks of our own supervisor rendezvous in a file, or with several machines in a store of rank 0. Ranks of torchrun
    use its store, or if it has none, a store of rank 0.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself, or no network interface is known.
        RanksError: the other ranks did not join within `timeout_s`.
    """
    rank_place = read_rank_place(environ)
    if rank_place is None:
        return World.single()
    address = LOOPBACK_ADDRESS if rank_place.machines == 1 else environ["MASTER_ADDR"]
    restrict_to_interface(address)
    device = choose_device()
    if device.type == "cuda":
        _check_gpu(rank_place)
        device = torch.device("cuda", rank_place.local_rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    with collective_errors_reported("waiting for all to start"):
        store = _store(rank_place, environ, address, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank_place.rank,
            world_size=rank_place.size,
            timeout=timeout,
        )
        # A separate connection: heartbeats must not queue behind a collective that blocks in the store.
        if not isinstance(store, FileStore):
            store = store.clone()  # type: ignore[attr-defined]  # torch's own stubs
        heartbeat_store: KeyStore = PrefixStore("signs", store)
    if rank_place.machines > 1:
        heartbeat_store = PatientStore(heartbeat_store, timeout_s)
    errors = rank_place.errors or ErrorKeys(rank_place.rank, rank_place.size, heartbeat_store, address)
    heartbeats = Heartbeats(heartbeat_store, rank_place.rank, range(rank_place.size), timeout_s, errors)
    heartbeats.start()
    atexit.register(destroy_group)
    world = World(rank_place.rank, rank_place.size, device, heartbeats, rank_place.machine, rank_place.machines)
    return world if rank_place.machines == 1 else replace(world, machine_world=_of_machine(world, rank_place, timeout))


def _of_machine(world: World, rank_place: RankPlace, timeout: datetime.timedelta) -> World:
    """The world of this machine's ranks."""
    with collective_errors_reported("waiting for all to start"):
        machines = [
            range(first, first + rank_place.local_size) for first in range(0, rank_place.size, rank_place.local_size)
        ]
        groups = [dist.new_group([*ranks], timeout) for ranks in machines]  # every rank must create all groups
    assert world.heartbeats is not None
    heartbeats = replace(
        world.heartbeats, ranks=machines[rank_place.machine], key_prefix=f"wait of machine {rank_place.machine}"
    )
    return World(
        rank_place.local_rank,
        rank_place.local_size,
        world.device,
        heartbeats,
        rank_place.machine,
        group=groups[rank_place.machine],
    )


def destroy_group() -> None:
    """Destroy the process group.

    Otherwise a gloo thread that frees its last tensor while the interpreter shuts down would abort the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def restrict_to_interface(address: str) -> None:
    """Make gloo and NCCL use the interface through which this machine reaches `address`, unless the user chose one.

    Raises:
        ConfigError: there is no such interface, or it cannot be determined.
    """
    unset_names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not os.environ.get(name)]
    interfaces = {name for _, name in socket.if_nameindex()}
    if address == LOOPBACK_ADDRESS:
        interface = next((name for name in LOOPBACK_NAMES if name in interfaces), None)
        for name, value in NCCL_ON_ONE_MACHINE.items():
            os.environ.setdefault(name, value)
    else:
        interface = _interface_to(address)
    if unset_names and interface is None:
        target = "each other" if address == LOOPBACK_ADDRESS else f"the machine at {address}"
        raise ConfigError.of(
            f"no network interface is known to reach {target}; there are {', '.join(sorted(interfaces))}",
            "one through which the processes talk to each other",
            f"Set {' and '.join(unset_names)} to the name of an interface.",
        )
    os.environ.update({name: interface for name in unset_names if interface is not None})


def _interface_to(address: str) -> str | None:
    """Name of the IPv4 interface through which `address` is reached; None if it is loopback or not found."""
    try:
        local_address = source_address(address)
    except OSError:
        return None
    if ipaddress.ip_address(local_address).is_loopback:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no address
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(query_socket, SIOCGIFADDR, request)[20:24]) == local_address:
                    return name
    return None


def _check_gpu(rank_place: RankPlace) -> None:
    count = torch.cuda.device_count()
    if rank_place.local_rank >= count:
        raise ConfigError.of(
            f"{rank_place.local_size} processes on {count} visible GPUs",
            "at most one on each",
            f"Start {count}, or make more visible with CUDA_VISIBLE_DEVICES.",
        )


def _store(rank_place: RankPlace, environ: Mapping[str, str], address: str, timeout: datetime.timedelta) -> Store:
    """The store in which the ranks rendezvous."""
    if rank_place.folder is not None and rank_place.machines == 1:
        return FileStore(str(rank_place.folder / "store"), rank_place.size)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(iter(rendezvous("env://", rank_place.rank, rank_place.size, timeout=timeout)))[0]
        return PrefixStore(start_name(store, rank_place, timeout), store)
    port = int(environ["MASTER_PORT"])
    if rank_place.rank > 0:
        return TCPStore(address, port, rank_place.size, is_master=False, timeout=timeout)
    # By default torch's store listens on every interface.
    descriptor = environ.get(RANKS_LISTENER) if rank_place.folder else None
    try:
        listener = int(descriptor) if descriptor else socket.create_server((address, port)).detach()
    except OSError as error:
        raise ConfigError.of(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {error.strerror}",
            "an address of this machine and a free port",
        ) from None
    return TCPStore(address, port, rank_place.size, is_master=True, timeout=timeout, master_listen_fd=listener)


def start_name(store: Store, rank_place: RankPlace, timeout: datetime.timedelta) -> str:
    """A key prefix that all ranks of this start share, and no earlier start has.

    torchrun's store outlives a restart, and has keys of ranks that are gone. Rank 0 creates the name. Each other rank
    writes a random number under that name, and rank 0 confirms the name by writing the list of these numbers.
    """
    number = secrets.token_hex(8)
    if rank_place.rank == 0:
        store.set("start", number)
        answers = [store.get(f"{number}/{rank}").decode() for rank in range(1, rank_place.size)]
        store.set(f"{number}/all", " ".join(answers))
        return number
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("start").decode()  # may be an earlier start's until rank 0 has set its own
        store.set(f"{name}/{rank_place.rank}", number)
        if store.check([f"{name}/all"]) and number in store.get(f"{name}/all").decode().split():
            return name
        time.sleep(LOOK_FOR_RANKS_EVERY_S)
    raise RuntimeError("rank 0 has not named this start")
