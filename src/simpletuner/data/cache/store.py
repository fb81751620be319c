"""A folder of tensors under content-derived keys: whole or absent, checked when read, never a pickle."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.files import read_json, write_atomic, write_json

HEADER_KEY = "simpletuner"
"""Our one entry in the safetensors header, a JSON object. One, because the library does not keep their order,
and the same content must give the same bytes."""

ABANDONED_S = 3600
"""A half-written file this old belongs to a process that is gone."""

CHECKING_THREADS = 4
"""Reading and hashing release Python's lock; more threads than this wait for the disk."""

LEDGER = "verified.json"
"""In a store's folder: size and times of the files that were read and found sound."""

LEDGER_VERSION = 1

SETTLED_S = 2.0
"""A file younger than this is not entered: it could change once more within the same tick of the file system's
clock."""

State = Literal["sound", "missing", "damaged"]


class Store:
    """Tensors by key below `folder`, one safetensors file each. Several runs may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where `key` is kept; a level of folders keeps each of them small."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def check(self, key: str) -> State:
        """Read and verify `key`. What is damaged is removed, so that it is made again."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return "missing"
        if _verified(data) is None:
            path.unlink(missing_ok=True)
            return "damaged"
        return "sound"

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key`, on the CPU, verified against their checksum.

        Raises:
            DataError: missing, or damaged (then removed): the next fill makes it again.
        """
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise _lost(path, "missing") from None
        tensors = _verified(data)
        if tensors is None:
            path.unlink(missing_ok=True)
            raise _lost(path, "damaged, and was removed")
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep `tensors` under `key`, atomically. The same tensors and metadata give the same bytes.

        Raises:
            DiskError: no space.
        """
        own = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        header = json.dumps({**metadata, "sha256": _checksum(own, metadata)}, sort_keys=True)
        # Not flushed to the disk file by file: that is slow, and what a power cut tears is found by the
        # checksum.
        write_atomic(self.path(key), safetensors.torch.save(own, {HEADER_KEY: header}), sync=False)

    def sweep(self) -> None:
        """Remove what interrupted processes left half-written."""
        for part in self.folder.glob("*/.*.part"):
            try:
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink()
            except FileNotFoundError:  # another process was quicker
                continue


def check_all(places: Sequence[tuple[Store, str]], *, verify: bool = False) -> list[State]:
    """`store.check(key)` for each pair, several at a time.

    A file whose size and times of modification and of status change are what they were when it was last read counts
    as sound without being read, unless `verify`. What a disk changes without a trace is found by `Store.read`, which
    always compares the checksum.

    Raises:
        DiskError: no space for the list of what was read.
    """
    ledgers = {folder: _Ledger(folder) for folder in {store.folder for store, _ in places}}

    def state(place: tuple[Store, str]) -> State:
        store, key = place
        ledger = ledgers[store.folder]
        stamp = _stamp(store.path(key))
        if stamp is not None and ledger.known.get(key) == stamp and not verify:
            return "sound"
        found = store.check(key)
        if found == "sound" and stamp is not None and time.time() - max(stamp[1:]) / 1e9 > SETTLED_S:
            ledger.read[key] = stamp
        return found

    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        states = list(pool.map(state, places))
    for ledger in ledgers.values():
        ledger.save()
    return states


class _Ledger:
    """What was read and found sound in `folder`. Several runs may keep it: what one overwrites is read again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        self.known = self._load()
        self.read: dict[str, list[int]] = {}
        """Since then, by key; threads add to it."""

    def _load(self) -> dict[str, list[int]]:
        try:
            stored = read_json(self._path)
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        is_ours = isinstance(stored, dict) and stored.get("version") == LEDGER_VERSION
        files: dict[str, list[int]] = stored["files"] if is_ours else {}
        return files

    def save(self) -> None:
        # A cache that is shared and may only be read has no list, and is read at each start.
        if os.access(self._path.parent, os.W_OK) and any(
            self.known.get(key) != stamp for key, stamp in self.read.items()
        ):
            write_json(self._path, {"version": LEDGER_VERSION, "files": self._load() | self.read})


def _stamp(path: Path) -> list[int] | None:
    """Size, and times of modification and of status change in nanoseconds; None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _lost(path: Path, how: str) -> DataError:
    return DataError.of(
        f"cache file {path} is {how}", remedy="Run the same command again: what is missing is made first."
    )


def _verified(data: bytes) -> dict[str, Tensor] | None:
    """The tensors of a file, or None if it is not exactly as it was written."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER_KEY])
        return tensors if header.pop("sha256") == _checksum(tensors, header) else None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over the metadata, and the tensors' names, formats, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
