"""A store of tensors under content-derived keys: safetensors files, written atomically and verified when read."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from simpletuner.base.errors import DataError, DiskError
from simpletuner.base.files import file_problem
from simpletuner.base.machine import free_disk_bytes
from simpletuner.base.parts import remove_abandoned_parts
from simpletuner.base.sizes import format_size
from simpletuner.base.storage import Stamp, Storage
from simpletuner.base.tensorfile import file_pieces
from simpletuner.data.ahead import prefetched_map
from simpletuner.data.storages import LEDGER, read_memo, write_memo
from simpletuner.memory.tensors import tensor_data

HEADER_KEY = "simpletuner"
"""Our only entry in the safetensors header, a JSON object."""

CHECKING_THREADS = 4
"""Reading and hashing release the GIL; more threads than this would only wait for the disk."""

LEDGER_VERSION = 1

SETTLED_S = 2.0
"""A younger file is not entered in the ledger: it could change again within the same tick of the file system's
clock."""

CHUNK = 16
"""Number of keys that a thread checks at a time."""

CacheState = Literal["sound", "missing", "damaged"]


@dataclass(frozen=True)
class Store:
    """Tensors by key in `storage`, one safetensors file per key. Several runs may share a store."""

    storage: Storage

    def name(self, key: str) -> str:
        """File name of `key`. A level of subfolders keeps folders small."""
        return f"{key[:2]}/{key}.safetensors"

    def check(self, key: str) -> CacheState:
        """Read and verify the file of `key`. A damaged file is removed, so that it is made again."""
        name = self.name(key)
        try:
            data = self._content(name)
        except FileNotFoundError:
            return "missing"
        if _verified(data) is None:
            self.storage.remove(name)
            return "damaged"
        return "sound"

    def read(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of `key` to the CPU and verify their checksum.

        Raises:
            DataError: the file is missing, or damaged and now removed; the next fill makes it again.
        """
        name = self.name(key)
        try:
            data = self._content(name)
        except FileNotFoundError:
            raise _lost(self.storage.text(name), "missing") from None
        tensors = _verified(data)
        if tensors is None:
            self.storage.remove(name)
            raise _lost(self.storage.text(name), "damaged, and was removed")
        return tensors

    def _content(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: it does not exist.
            DiskError: it exists but cannot be read.
        """
        try:
            return self.storage.read(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            problem = file_problem(error, doing="read")
            if problem is None:
                raise
            raise DiskError(problem) from error

    def write(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Store `tensors` under `key`, atomically. Equal tensors and metadata result in equal bytes.

        Raises:
            DiskError: no space.
        """
        cpu_tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        header = json.dumps({**metadata, "sha256": _checksum(cpu_tensors, metadata)}, sort_keys=True)
        pieces = file_pieces({name: tensor_data(tensor) for name, tensor in cpu_tensors.items()}, {HEADER_KEY: header})
        # No fsync per file: it is slow, and the checksum detects files that a power failure damages.
        self.storage.write(self.name(key), b"".join(pieces), sync=False)

    def check_room(self, size: int, subject: str, key: str) -> None:
        """Raise a DiskError if the disk has less than `size` bytes free.

        `subject` is the plural subject of the message, `key` the dataset's option for the folder.
        """
        folder = self.storage.local_path()
        if folder is None:
            return
        free = free_disk_bytes(folder)
        if size > free:
            raise DiskError.of(
                f"{subject} take {format_size(size)}, and {format_size(free)} are free for {folder}",
                remedy=f"Free some space, or set the dataset's {key} to a folder on another disk.",
            )

    def sweep(self) -> None:
        """Remove incomplete files of killed processes."""
        folder = self.storage.local_path()
        if folder is not None:
            remove_abandoned_parts(folder, "*/.*.safetensors.*.part")
            remove_abandoned_parts(folder, f".{LEDGER}.*.part")


def check_all(keys: Iterable[tuple[Store, str]], *, verify: bool = False) -> list[CacheState]:
    """Return `store.check(key)` for each pair, in order; threads check several pairs at a time. Holds a bounded number
    of pairs in memory, and all states.

    A file with the same stamp as when it was last verified counts as sound without being read, unless `verify`. Silent
    changes of the disk are detected by `Store.read`, which always compares the checksum.

    Raises:
        DiskError: a file cannot be read, or a damaged file cannot be removed.
    """
    ledgers: dict[Store, _Ledger] = {}

    def chunks() -> Iterator[list[tuple[_Ledger, str]]]:
        remaining = iter(keys)
        while chunk := list(islice(remaining, CHUNK)):
            for store in {store for store, _ in chunk} - ledgers.keys():
                ledgers[store] = _Ledger(store)
            yield [(ledgers[store], key) for store, key in chunk]

    def check(chunk: list[tuple[_Ledger, str]]) -> list[CacheState]:
        return [ledger.check(key, verify=verify) for ledger, key in chunk]

    checked = prefetched_map(check, chunks(), workers=CHECKING_THREADS, ahead=4 * CHECKING_THREADS)
    states = [state for chunk in checked for state in chunk]
    for ledger in ledgers.values():
        ledger.save()
    return states


class _Ledger:
    """The stamps of a store's verified files. If several runs overwrite each other's ledger, files are only read
    again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._verified_before = self._load()
        self._verified_now: dict[str, Stamp] = {}
        """Stamps of the files verified since loading, by key; threads add to it."""

    def check(self, key: str, *, verify: bool) -> CacheState:
        """The state of `key`. The file is read if the ledger lacks its current stamp, or with `verify`."""
        try:
            file = self._store.storage.stat(self._store.name(key))
        except OSError:
            return self._store.check(key)
        if self._verified_before.get(key) == list(file.stamp) and not verify:
            return "sound"
        state = self._store.check(key)
        if state == "sound" and time.time() - file.changed_at > SETTLED_S:
            self._verified_now[key] = file.stamp
        return state

    def _load(self) -> dict[str, list[int | str]]:
        stored = read_memo(self._store.storage, LEDGER)
        is_ours = isinstance(stored, dict) and stored.get("version") == LEDGER_VERSION
        files: dict[str, list[int | str]] = stored["files"] if is_ours else {}
        return files

    def save(self) -> None:
        """Add the newly verified files to the store's ledger file."""
        verified = {key: list(stamp) for key, stamp in self._verified_now.items()}
        if any(self._verified_before.get(key) != stamp for key, stamp in verified.items()):
            write_memo(self._store.storage, LEDGER, {"version": LEDGER_VERSION, "files": self._load() | verified})


def _lost(path: str, state: str) -> DataError:
    return DataError.of(
        f"cache file {path} is {state}", remedy="Run the same command again: it makes missing files first."
    )


def _verified(data: bytes) -> dict[str, Tensor] | None:
    """The tensors of a file; None if the bytes differ from the written ones."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER_KEY])
        return tensors if header.pop("sha256") == _checksum(tensors, header) else None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of the metadata and of the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
