"""Files of a run on several machines: detect shared folders, compare values, send folders."""

import contextlib
import datetime
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from simpletuner.base.files import sha256_json
from simpletuner.memory.world import World, collective_errors_reported

SENT_BYTES = 32 * 2**20
"""Bytes of a file per message."""


def shared_folders(world: World, folders: Sequence[Path]) -> frozenset[Path]:
    """Those of `folders` that all machines share; with one machine, all of them.

    Rank 0 writes a marker file into each folder, and creates missing folders. The first rank of each machine checks
    whether it sees the marker. A folder to which rank 0 may not write counts as not shared.

    Raises:
        RanksError: a rank is gone or timed out.
    """
    if world.machine_world is None:
        return frozenset(folders)
    marker = world.broadcast_json(f".simpletuner-{secrets.token_hex(16)}")
    marker_paths = [folder / marker for folder in folders]
    is_checking = world.on_machine.is_main
    created: dict[Path, list[Path]] = {}
    try:
        if world.is_main:
            for path in marker_paths:
                create_missing(path.parent)
                with contextlib.suppress(OSError):
                    path.touch()
        world.barrier("the markers in folders that machines may share")
        if is_checking and not world.is_main:
            # An NFS client caches for up to a minute that a folder is missing, unless it creates the folder.
            created = {folder: create_missing(folder) for folder in folders}
        by_rank = world.gather_json([not is_checking or path.exists() for path in marker_paths])
    finally:
        for path in marker_paths if world.is_main else ():
            with contextlib.suppress(OSError):
                path.unlink()
    shared = frozenset(folder for folder, *sightings in zip(folders, *by_rank, strict=True) if all(sightings))
    remove_created(each for folder, new_folders in created.items() if folder not in shared for each in new_folders)
    return shared


def create_missing(folder: Path) -> list[Path]:
    """Create `folder` and its parents, as far as permitted; return those of them that were missing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_created(folders: Iterable[Path]) -> None:
    """Remove those of `folders`, as returned by `create_missing`, that are empty."""
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def with_writers(world: World, folder: Path) -> World:
    """`world` with its `writers`: the ranks of machine 0 if the machines do not share the run's `folder`, else all.

    Raises:
        RanksError: a rank is gone or timed out.
    """
    if folder in shared_folders(world, [folder]):
        return world
    return replace(world, writers=world.gather_json(world.machine).count(0))


def differing_machine(world: World, value: Any) -> tuple[int, tuple[Any, Any]] | None:
    """The first machine whose `value` differs from machine 0's, with both values; None if all are equal.

    All ranks call it and get the same result. `value` is a JSON value, the same on all ranks of a machine. Values are
    sent only if their hashes differ.

    Raises:
        RanksError: a rank is gone or timed out.
    """
    if world.machine_world is None:
        return None
    hashes = world.gather_json([world.machine, sha256_json(value)])
    differing_rank = next((rank for rank, (_, each) in enumerate(hashes) if each != hashes[0][1]), None)
    if differing_rank is None:
        return None
    values = world.gather_json(value if world.rank in (0, differing_rank) else None)
    return hashes[differing_rank][0], (values[0], values[differing_rank])


def send_folder(world: World, folder: Path, into: Path) -> None:
    """Copy the files of rank 0's `folder` to each other machine, into its folder `into`. All ranks call it.

    The first rank of each machine writes the files.

    Raises:
        OSError: a file cannot be read or written. The other ranks then raise a RanksError.
        RanksError: a rank is gone or timed out.
    """
    firsts = [rank for rank, is_first in enumerate(world.gather_json(world.on_machine.is_main)) if is_first]
    assert world.heartbeats is not None  # there are several ranks
    with collective_errors_reported("sending files to other machines"):
        timeout = datetime.timedelta(seconds=world.heartbeats.timeout_s)
        group = dist.new_group(firsts, timeout=timeout, backend="gloo")
    if world.rank in firsts:
        first_ranks = World(firsts.index(world.rank), len(firsts), torch.device("cpu"), group=group)
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for name, size in first_ranks.broadcast_json(sizes).items():
            _send(first_ranks, (folder if world.is_main else into) / name, size)
        dist.destroy_process_group(group)
    world.barrier("the files sent to other machines")


def _send(world: World, path: Path, size: int) -> None:
    """Send rank 0's file `path` of `size` bytes to the `path` of each other rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb" if world.is_main else "xb") as file:
        for start in range(0, size, SENT_BYTES):
            piece = torch.empty(min(SENT_BYTES, size - start), dtype=torch.uint8)
            if world.is_main:
                piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
            with collective_errors_reported("sending files to other machines"):
                dist.broadcast(piece, group=world.group, group_src=0)
            if not world.is_main:
                file.write(piece.numpy().data)
