"""Hashes of all bytes of a base model's tensors: computed once for a file, and found again while it is what it was.

A file counts as what it was while its size, modification time and inode are, and 64 pieces of 4 KiB, spread over all
of it, have the hash that they had. The list of hashes is one small JSON file in the user's cache folder.
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
"""The newest are kept."""
PIECES, PIECE_BYTES = 64, 4096
_THREADS = 4
_BLOCK_BYTES = 4 << 20
_TOLD_BYTES = 1 << 30
"""Less is hashed without a word: it takes a second at most."""
_SETTLED_S = 2.0
"""A file younger than this is not entered: it could change once more within the same tick of the clock."""


@dataclass
class ContentHashes:
    """The sha256 of tensors in files."""

    ledger: Path | None = None
    """Where hashes are kept between starts; None keeps them for this process only."""
    report: Callable[[str], None] = lambda _: None
    """Told in a sentence before much is read, and when the ledger cannot be written."""
    verify: bool = False
    """Read every file once in this process, whatever the ledger has."""
    _known: dict[str, "_KnownFile"] = field(default_factory=dict, repr=False)
    """By stamp; of this process."""

    def of(self, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
        """The sha256 of all bytes of each of `tensors`, by name.

        Raises:
            AccessError: a file cannot be read, or changes meanwhile.
        """
        files = {entry.file: _Sampled.of(entry.file) for entry in tensors.values()}
        kept = {} if self.verify or not files else self._kept()
        for file in files.values():
            known = self._known.get(file.stamp) or kept.get(file.stamp)
            if known is None or known.samples != file.samples:
                known = _KnownFile(file.samples, {})
            self._known[file.stamp] = known

        def digests(file: Path) -> dict[str, str]:
            return self._known[files[file].stamp].digests

        # A place in a file names a tensor: names differ between releases of one file.
        missing = {
            (entry.file, _span(entry)): entry for entry in tensors.values() if _span(entry) not in digests(entry.file)
        }
        if missing:
            self._hash(missing.values(), files, digests)
        return {name: digests(entry.file)[_span(entry)] for name, entry in tensors.items()}

    def _hash(
        self,
        missing: Iterable[TensorEntry],
        files: Mapping[Path, "_Sampled"],
        digests: Callable[[Path], dict[str, str]],
    ) -> None:
        """Read `missing`, several at a time, and keep their hashes."""
        entries = list(missing)
        size = sum(entry.stop - entry.start for entry in entries)
        read = dict.fromkeys(entry.file for entry in entries)
        if size >= _TOLD_BYTES:
            why = "as --verify_base asks" if self.verify else "once, until a file changes"
            files_read = f"{len(read)} file{'s' if len(read) > 1 else ''}"
            self.report(f"Hashing {format_size(size)} of the base model in {files_read}, {why}.")
        executor = ThreadPoolExecutor(min(_THREADS, len(entries)))
        try:
            for entry, digest in zip(entries, executor.map(_digest, entries), strict=True):
                digests(entry.file)[_span(entry)] = digest
        finally:
            executor.shutdown(cancel_futures=True)
        for file in read:
            if _Sampled.of(file) != files[file]:
                raise AccessError.of(f"{file} changes while it is read", "a file that is whole", "Start again.")
        settled = [files[file].stamp for file in read if time.time() - files[file].modified_at > _SETTLED_S]
        self._keep({stamp: self._known[stamp] for stamp in settled})

    def _kept(self) -> dict[str, "_KnownFile"]:
        """What the ledger has; nothing where it is missing, damaged or not to be read."""
        try:
            stored: Any = read_json(self.ledger) if self.ledger is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        rows = stored.get("files") if isinstance(stored, dict) and stored.get("version") == _LEDGER_VERSION else None
        known = {stamp: _KnownFile.read(row) for stamp, row in rows.items()} if isinstance(rows, dict) else {}
        return {stamp: file for stamp, file in known.items() if file is not None}

    def _keep(self, files: Mapping[str, "_KnownFile"]) -> None:
        """Add `files` to the ledger. Of two processes the last one wins, and the other's files are hashed again."""
        if self.ledger is None or not files:
            return
        kept = self._kept()
        for stamp, file in files.items():
            before = kept.pop(stamp, None)
            same = before is not None and before.samples == file.samples
            kept[stamp] = _KnownFile(file.samples, (before.digests if before and same else {}) | file.digests)
        newest = dict(list(kept.items())[-_LEDGER_FILES:])
        rows = {stamp: {"samples": file.samples, "tensors": file.digests} for stamp, file in newest.items()}
        try:
            write_atomic(self.ledger, json_bytes({"version": _LEDGER_VERSION, "files": rows}), sync=False)
        except DiskError as error:
            self.report(f"The base model's hashes are not kept, and are made again at the next start: {error}")
            self.ledger = None  # said once


@dataclass(frozen=True)
class _KnownFile:
    """What was found in a file: the hash of its pieces, and those of tensors by their place."""

    samples: str
    digests: dict[str, str]

    @classmethod
    def read(cls, row: object) -> "_KnownFile | None":
        """A row of the ledger; None if it is damaged."""
        fields = row if isinstance(row, dict) else {}
        samples, digests = fields.get("samples"), fields.get("tensors")
        if not isinstance(samples, str) or not isinstance(digests, dict):
            return None
        is_whole = all(isinstance(digest, str) and len(digest) == 64 for digest in digests.values())
        return cls(samples, digests) if is_whole else None


@dataclass(frozen=True)
class _Sampled:
    """What tells a file from another without reading all of it."""

    stamp: str
    """Size, modification time in nanoseconds, inode."""
    modified_at: float
    samples: str

    @classmethod
    def of(cls, path: Path) -> "_Sampled":
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
    return f"{entry.start}-{entry.stop}"


def _digest(entry: TensorEntry) -> str:
    """The sha256 of a tensor's bytes."""
    digest, left = hashlib.sha256(), entry.stop - entry.start
    block = memoryview(bytearray(min(_BLOCK_BYTES, max(1, left))))
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            count = file.readinto(block[: min(left, len(block))])
            if not count:
                raise AccessError.of(f"{entry.file} ends early", "a file that is whole", "Get the file again.")
            digest.update(block[:count])
            left -= count
    return digest.hexdigest()
