"""Files of a run on several machines: which folders they share, whether they hold the same, and what one sends."""

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
from simpletuner.memory.world import World, explained

SENT_BYTES = 32 * 2**20
"""Bytes of a file that are sent at once."""


def shared_folders(world: World, folders: Sequence[Path]) -> frozenset[Path]:
    """Those of `folders` that all machines share, which is each of them where there is one machine. Rank 0 leaves a
    file in each, and makes those that are missing; the first rank of each machine looks for it. A folder that rank 0
    may not write to counts as not shared.

    Raises:
        RanksError: a rank is gone, or is waited for in vain.
    """
    if world.of_machine is None:
        return frozenset(folders)
    mark = world.broadcast_json(f".simpletuner-{secrets.token_hex(16)}")
    marks = [folder / mark for folder in folders]
    looks = world.on_machine.is_main
    made: dict[Path, list[Path]] = {}
    try:
        if world.is_main:
            for path in marks:
                make_missing(path.parent)
                with contextlib.suppress(OSError):
                    path.touch()
        world.barrier("the marks in folders that machines may share")
        if looks and not world.is_main:
            # A client of NFS that has looked for a folder believes for up to a minute that it is missing, until it
            # makes it.
            made = {folder: make_missing(folder) for folder in folders}
        by_rank = world.gather_json([not looks or path.exists() for path in marks])
    finally:
        for path in marks if world.is_main else ():
            with contextlib.suppress(OSError):
                path.unlink()
    shared = frozenset(folder for folder, *seen in zip(folders, *by_rank, strict=True) if all(seen))
    remove_made(each for folder, new in made.items() if folder not in shared for each in new)
    return shared


def make_missing(folder: Path) -> list[Path]:
    """Make `folder`, if it may be made; returns those of it and its parents that were missing."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_made(folders: Iterable[Path]) -> None:
    """Remove those of `folders`, which `make_missing` made, that are empty."""
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def with_writers(world: World, folder: Path) -> World:
    """`world` with its `writers`: the ranks of machine 0 where the machines do not share `folder`, the run's.

    Raises:
        RanksError: a rank is gone, or is waited for in vain.
    """
    if folder in shared_folders(world, [folder]):
        return world
    return replace(world, writers=world.gather_json(world.machine).count(0))


def differing_machine(world: World, value: Any) -> tuple[int, tuple[Any, Any]] | None:
    """The first machine whose `value`, a JSON value, is not machine 0's, and both values; None where all are equal. All
    ranks call it, those of a machine with the same `value`, and get the same answer. Values travel only where their
    hashes differ.

    Raises:
        RanksError: a rank is gone, or is waited for in vain.
    """
    if world.of_machine is None:
        return None
    hashes = world.gather_json([world.machine, sha256_json(value)])
    other = next((rank for rank, (_, each) in enumerate(hashes) if each != hashes[0][1]), None)
    if other is None:
        return None
    values = world.gather_json(value if world.rank in (0, other) else None)
    return hashes[other][0], (values[0], values[other])


def send_folder(world: World, folder: Path, into: Path) -> None:
    """Copy the files of rank 0's `folder` to each other machine, whose first rank writes them into its folder `into`.
    All ranks call it.

    Raises:
        OSError: a file cannot be read or written. The other ranks then raise a RanksError.
        RanksError: a rank is gone, or is waited for in vain.
    """
    firsts = [rank for rank, is_first in enumerate(world.gather_json(world.on_machine.is_main)) if is_first]
    assert world.signs is not None  # of several ranks
    with explained("sending files to other machines"):
        patience = datetime.timedelta(seconds=world.signs.timeout_s)
        group = dist.new_group(firsts, timeout=patience, backend="gloo")
    if world.rank in firsts:
        between = World(firsts.index(world.rank), len(firsts), torch.device("cpu"), group=group)
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for name, size in between.broadcast_json(sizes).items():
            _send(between, (folder if world.is_main else into) / name, size)
        dist.destroy_process_group(group)
    world.barrier("files that are sent to other machines")


def _send(world: World, path: Path, size: int) -> None:
    """Send rank 0's file `path` of `size` bytes to the `path` of each other rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb" if world.is_main else "xb") as file:
        for start in range(0, size, SENT_BYTES):
            piece = torch.empty(min(SENT_BYTES, size - start), dtype=torch.uint8)
            if world.is_main:
                piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
            with explained("sending files to other machines"):
                dist.broadcast(piece, group=world.group, group_src=0)
            if not world.is_main:
                file.write(piece.numpy().data)
