"""SHA-256 of all bytes of each tensor of a base model, computed once and reused while the file is unchanged.

A file counts as unchanged while its size, modification time, inode, and the hash over 64 pieces of 4 KiB, evenly
spaced over the file, stay the same. The ledger of hashes is one small JSON file in the user's cache folder.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.files import file_errors_reported, json_bytes, read_json, write_atomic
from simpletuner.base.sizes import format_size
from simpletuner.base.tensorfile import TensorEntry

LEDGER_NAME = "base-hashes.json"
_LEDGER_VERSION = 1
_LEDGER_FILES = 256
"""Maximum number of files in the ledger; the oldest entries are dropped."""
PIECES, PIECE_BYTES = 64, 4096
_THREADS = 4
_BLOCK_BYTES = 4 << 20
_REPORTED_BYTES = 1 << 30
"""Hashing fewer bytes is not reported: it takes a second at most."""
_SETTLED_S = 2.0
"""Files modified more recently than this are not recorded: they could change within the same clock tick."""


@dataclass
class ContentHashes:
    """SHA-256 of tensors in files, with a ledger of earlier results."""

    ledger: Path | None = None
    """File that stores hashes between runs; None keeps them in this process only."""
    report: Callable[[str], None] = lambda _: None
    """Called with a sentence before hashing many bytes, and when the ledger cannot be written."""
    verify: bool = False
    """Hash every file once in this process, ignoring the ledger."""
    _hashed: dict[str, "_HashedFile"] = field(default_factory=dict, repr=False)
    """Files hashed or looked up by this process, by stamp."""

    def of(self, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
        """The SHA-256 of each of `tensors`, over all its bytes, by name.

        Raises:
            AccessError: a file cannot be read, or changes while it is read.
        """
        files = {entry.file: _SampledFile.of(entry.file) for entry in tensors.values()}
        ledger = {} if self.verify or not files else self._read_ledger()
        for file in files.values():
            hashed = self._hashed.get(file.stamp) or ledger.get(file.stamp)
            if hashed is None or hashed.samples != file.samples:
                hashed = _HashedFile(file.samples, {})
            self._hashed[file.stamp] = hashed

        def digests(file: Path) -> dict[str, str]:
            return self._hashed[files[file].stamp].digests

        # Tensors are identified by their byte range: the same file has other tensor names in other releases.
        missing = {
            (entry.file, _span(entry)): entry for entry in tensors.values() if _span(entry) not in digests(entry.file)
        }
        if missing:
            self._hash(missing.values(), files, digests)
        return {name: digests(entry.file)[_span(entry)] for name, entry in tensors.items()}

    def _hash(
        self,
        missing: Iterable[TensorEntry],
        files: Mapping[Path, "_SampledFile"],
        digests: Callable[[Path], dict[str, str]],
    ) -> None:
        """Hash the `missing` tensors, several at a time, and store the results."""
        entries = list(missing)
        size = sum(entry.stop - entry.start for entry in entries)
        files_to_read = dict.fromkeys(entry.file for entry in entries)
        if size >= _REPORTED_BYTES:
            reason = "as --verify_base asks" if self.verify else "which is repeated only if a file changes"
            file_count = f"{len(files_to_read)} file{'s' if len(files_to_read) > 1 else ''}"
            self.report(f"Hashing {format_size(size)} of the base model in {file_count}, {reason}.")
        executor = ThreadPoolExecutor(min(_THREADS, len(entries)))
        try:
            for entry, digest in zip(entries, executor.map(_digest, entries), strict=True):
                digests(entry.file)[_span(entry)] = digest
        finally:
            executor.shutdown(cancel_futures=True)
        for file in files_to_read:
            if _SampledFile.of(file) != files[file]:
                raise AccessError.of(f"{file} changes while it is read", "a complete file", "Run the command again.")
        settled = [files[file].stamp for file in files_to_read if time.time() - files[file].modified_at > _SETTLED_S]
        self._update_ledger({stamp: self._hashed[stamp] for stamp in settled})

    def _read_ledger(self) -> dict[str, "_HashedFile"]:
        """Files in the ledger; empty if it is missing, damaged or unreadable."""
        try:
            stored: Any = read_json(self.ledger) if self.ledger is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        rows = stored.get("files") if isinstance(stored, dict) and stored.get("version") == _LEDGER_VERSION else None
        hashed_files = {stamp: _HashedFile.read(row) for stamp, row in rows.items()} if isinstance(rows, dict) else {}
        return {stamp: file for stamp, file in hashed_files.items() if file is not None}

    def _update_ledger(self, files: Mapping[str, "_HashedFile"]) -> None:
        """Add `files` to the ledger. If two processes write at once, only the last one's files are added."""
        if self.ledger is None or not files:
            return
        ledger = self._read_ledger()
        for stamp, file in files.items():
            earlier = ledger.pop(stamp, None)
            is_same = earlier is not None and earlier.samples == file.samples
            ledger[stamp] = _HashedFile(file.samples, (earlier.digests if earlier and is_same else {}) | file.digests)
        newest = dict(list(ledger.items())[-_LEDGER_FILES:])
        rows = {stamp: {"samples": file.samples, "tensors": file.digests} for stamp, file in newest.items()}
        try:
            write_atomic(self.ledger, json_bytes({"version": _LEDGER_VERSION, "files": rows}), sync=False)
        except DiskError as error:
            self.report(f"The base model's hashes cannot be stored, so the next run computes them again: {error}")
            self.ledger = None  # report this once


@dataclass(frozen=True)
class _HashedFile:
    """Hashes of a file: that over its sampled pieces, and that of each tensor, by byte range."""

    samples: str
    digests: dict[str, str]

    @classmethod
    def read(cls, row: object) -> "_HashedFile | None":
        """The file that a ledger row describes; None if the row is damaged."""
        fields = row if isinstance(row, dict) else {}
        samples, digests = fields.get("samples"), fields.get("tensors")
        if not isinstance(samples, str) or not isinstance(digests, dict):
            return None
        is_valid = all(isinstance(digest, str) and len(digest) == 64 for digest in digests.values())
        return cls(samples, digests) if is_valid else None


@dataclass(frozen=True)
class _SampledFile:
    """Identity of a file, determined without reading all of it."""

    stamp: str
    """Size, modification time in nanoseconds, inode."""
    modified_at: float
    samples: str
    """SHA-256 of the sampled pieces."""

    @classmethod
    def of(cls, path: Path) -> "_SampledFile":
        with file_errors_reported(path, AccessError, doing="read"), path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256()
            last = max(0, status.st_size - PIECE_BYTES)
            for start in sorted({last * piece // (PIECES - 1) for piece in range(PIECES)}):
                file.seek(start)
                digest.update(file.read(PIECE_BYTES))
        stamp = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
        return cls(stamp, status.st_mtime, digest.hexdigest())


def _span(entry: TensorEntry) -> str:
    """Byte range of a tensor in its file, as a ledger key."""
    return f"{entry.start}-{entry.stop}"


def _digest(entry: TensorEntry) -> str:
    """SHA-256 of a tensor's bytes."""
    digest, remaining = hashlib.sha256(), entry.stop - entry.start
    block = memoryview(bytearray(min(_BLOCK_BYTES, max(1, remaining))))
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while remaining:
            count = file.readinto(block[: min(remaining, len(block))])
            if not count:
                raise AccessError.of(f"{entry.file} ends early", "a complete file", "Get the file again.")
            digest.update(block[:count])
            remaining -= count
    return digest.hexdigest()
