"""A folder of tensors under content-derived keys: whole or absent, checked when read, never a pickle."""

import hashlib
import json
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
from simpletuner.base.files import write_atomic

HEADER_KEY = "simpletuner"
"""Our one entry in the safetensors header, a JSON object. One, because the library does not keep their order,
and the same content must give the same bytes."""

ABANDONED_S = 3600
"""A half-written file this old belongs to a process that is gone."""

CHECKING_THREADS = 4
"""Reading and hashing release Python's lock; more threads than this wait for the disk."""

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


def check_all(places: Sequence[tuple[Store, str]]) -> list[State]:
    """`store.check(key)` for each pair, several at a time."""
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        return list(pool.map(lambda place: place[0].check(place[1]), places))


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
