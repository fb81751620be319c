"""Whose tensors lie under a cache's key: a note beside the caches of which weights made them.

A key names of each tensor of an encoder its name, dtype, shape and first 4 KiB, so that caches of every release are
found. The first weights that use a key in a cache are noted there, by a hash of all of their bytes; others with that
key, which differ further on, use a key of their own.

Keys of latents name the encoder's half of the VAE. Earlier releases named all of it: what lies under such a key is
used on, also with another decoder.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage
from simpletuner.data.storages import LEDGER

CLAIMS = "bases.json"
"""The note, in each storage of caches: `{key: key of the whole content}`. Of latents of an earlier release also
`{today's key of the whole content: key that they lie under}`."""


@dataclass(frozen=True)
class CacheKey:
    """The key of tensors by the heads of the weights that make them, and by the whole weights."""

    heads: str
    whole: str


def claim(storages: Sequence[Storage], key: str, whole: str) -> bool:
    """Whether what lies under `key` in `storages`, or will, is of the content that `whole` names; noted where nothing
    was known. False too where a note is damaged: nobody knows whose tensors lie there.
    """
    notes = [_read(storage) for storage in storages]
    if any(note is None or note.get(key, whole) != whole for note in notes):
        return False
    for storage, note in zip(storages, notes, strict=True):
        if note is not None and key not in note and _is_writable(storage):
            storage.write(CLAIMS, json_bytes(note | {key: whole}), sync=False)
    return True


def claimed(storages: Sequence[Storage], key: CacheKey, earlier: CacheKey | None = None) -> str:
    """The key of what lies in `storages`, or will: that of the heads, unless other weights had it there first.

    Where an earlier release used `storages`, what it left under `earlier` is used on. That is noted, so that weights
    for which `earlier` is another one, while `key` is the same, find it too.
    """
    notes = [_read(storage) for storage in storages]
    for note in notes:
        if note and isinstance(noted := note.get(key.whole), str):
            return noted
    if earlier is None or not any(map(lambda storage, note: _holds(storage, note, earlier), storages, notes)):
        return key.heads if claim(storages, key.heads, key.whole) else key.whole
    found = claimed(storages, earlier)
    for storage in storages:
        note = _read(storage)
        if note is not None and _is_writable(storage):
            storage.write(CLAIMS, json_bytes(note | {key.whole: found}), sync=False)
    return found


def _holds(storage: Storage, note: dict[str, Any] | None, earlier: CacheKey) -> bool:
    """Whether a storage with that note has tensors under `earlier`: by its note, or because it has tensors and no
    note, which releases before the notes left.
    """
    if note != {}:
        return note is not None and earlier.heads in note
    try:
        storage.stat(LEDGER)
    except FileNotFoundError:
        return False
    return True


def _read(storage: Storage) -> dict[str, Any] | None:
    """The note of a storage, empty where there is none; None where it is damaged."""
    try:
        note = json.loads(storage.read(CLAIMS))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) else None


def _is_writable(storage: Storage) -> bool:
    """Whether a note may be left: not in a cache that is shared and may only be read."""
    folder = storage.local_path()
    return folder is None or not folder.exists() or os.access(folder, os.W_OK)
