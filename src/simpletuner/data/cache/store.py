"""A storage of tensors under content-derived keys: whole or absent, checked when read, never a pickle."""

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
from simpletuner.base.machine import disk_room
from simpletuner.base.parts import sweep_parts
from simpletuner.base.sizes import format_size
from simpletuner.base.storage import Stamp, Storage
from simpletuner.base.tensorfile import file_pieces
from simpletuner.data.ahead import map_ahead
from simpletuner.data.storages import LEDGER, read_memo, write_memo
from simpletuner.memory.tensors import as_written

HEADER_KEY = "simpletuner"
"""Our one entry in the safetensors header, a JSON object."""

CHECKING_THREADS = 4
"""Reading and hashing release Python's lock; more threads than this wait for the disk."""

LEDGER_VERSION = 1

SETTLED_S = 2.0
"""A file younger than this is not entered: it could change once more within the same tick of the file system's
clock."""

CHUNK = 16
"""Keys that a thread checks at a time."""

CacheState = Literal["sound", "missing", "damaged"]


@dataclass(frozen=True)
class Store:
    """Tensors by key in `storage`, one safetensors file each. Several runs may share it."""

    storage: Storage

    def name(self, key: str) -> str:
        """Where `key` is kept; a level of folders keeps each of them small."""
        return f"{key[:2]}/{key}.safetensors"

    def check(self, key: str) -> CacheState:
        """Read and verify `key`. What is damaged is removed, so that it is made again."""
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
        """The tensors of `key`, on the CPU, verified against their checksum.

        Raises:
            DataError: missing, or damaged (then removed): the next fill makes it again.
        """
        name = self.name(key)
        try:
            data = self._content(name)
        except FileNotFoundError:
            raise _lost(self.storage.shown(name), "missing") from None
        tensors = _verified(data)
        if tensors is None:
            self.storage.remove(name)
            raise _lost(self.storage.shown(name), "damaged, and was removed")
        return tensors

    def _content(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: it is not there.
            DiskError: it is there, and cannot be read.
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
        """Keep `tensors` under `key`, atomically. The same tensors and metadata give the same bytes.

        Raises:
            DiskError: no space.
        """
        own = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        header = json.dumps({**metadata, "sha256": _checksum(own, metadata)}, sort_keys=True)
        pieces = file_pieces({name: as_written(tensor) for name, tensor in own.items()}, {HEADER_KEY: header})
        # Not flushed to the disk file by file: that is slow, and what a power cut tears is found by the
        # checksum.
        self.storage.write(self.name(key), b"".join(pieces), sync=False)

    def check_room(self, size: int, what: str, key: str) -> None:
        """Raise a DiskError if the disk has no `size` bytes left for `what`, the plural subject of a sentence. `key` of
        a data set names another folder.
        """
        folder = self.storage.local_path()
        if folder is None:
            return
        free = disk_room(folder)
        if size > free:
            raise DiskError.of(
                f"{what} take {format_size(size)}, and {format_size(free)} are free for {folder}",
                remedy=f"Free some space, or give the data set a {key} on another disk.",
            )

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        folder = self.storage.local_path()
        if folder is not None:
            sweep_parts(folder, "*/.*.safetensors.*.part")
            sweep_parts(folder, f".{LEDGER}.*.part")


def check_all(keys: Iterable[tuple[Store, str]], *, verify: bool = False) -> list[CacheState]:
    """`store.check(key)` for each pair, several at a time. Holds a bounded number of the pairs, and of each the state.

    A file whose stamp is what it was when it was last read counts as sound without being read, unless `verify`. What
    a disk changes without a trace is found by `Store.read`, which always compares the checksum.

    Raises:
        DiskError: a file cannot be read, or a damaged one not removed.
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

    checked = map_ahead(check, chunks(), workers=CHECKING_THREADS, ahead=4 * CHECKING_THREADS)
    states = [state for chunk in checked for state in chunk]
    for ledger in ledgers.values():
        ledger.save()
    return states


class _Ledger:
    """What was read and found sound in a store. Several runs may keep it: what one overwrites is read again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known = self._load()
        self._read: dict[str, Stamp] = {}
        """Since then, by key; threads add to it."""

    def check(self, key: str, *, verify: bool) -> CacheState:
        """The state of `key`, which is read if it is not known as it is now, or with `verify`."""
        try:
            file = self._store.storage.stat(self._store.name(key))
        except OSError:
            return self._store.check(key)
        if self._known.get(key) == list(file.stamp) and not verify:
            return "sound"
        state = self._store.check(key)
        if state == "sound" and time.time() - file.changed_at > SETTLED_S:
            self._read[key] = file.stamp
        return state

    def _load(self) -> dict[str, list[int | str]]:
        stored = read_memo(self._store.storage, LEDGER)
        is_ours = isinstance(stored, dict) and stored.get("version") == LEDGER_VERSION
        files: dict[str, list[int | str]] = stored["files"] if is_ours else {}
        return files

    def save(self) -> None:
        """Add what was read to the list of the store."""
        read = {key: list(stamp) for key, stamp in self._read.items()}
        if any(self._known.get(key) != stamp for key, stamp in read.items()):
            write_memo(self._store.storage, LEDGER, {"version": LEDGER_VERSION, "files": self._load() | read})


def _lost(shown: str, how: str) -> DataError:
    return DataError.of(
        f"cache file {shown} is {how}", remedy="Run the same command again: what is missing is made first."
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
