"""Whose tensors lie under a cache's key: a note beside the caches of which weights made them.

A key names of each tensor of an encoder its name, dtype, shape and first 4 KiB, so that caches of every release are
found. The first weights that use a key in a cache are noted there, by a hash of all of their bytes; others with that
key, which differ further on, use a key of their own.

Keys of latents name all of the VAE's encoder, and nobody else has them. Earlier releases named VAEs as text encoders:
what lies under such a key is used on, also with another decoder.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage
from simpletuner.data.storages import LEDGER

CLAIMS = "bases.json"
"""The note, in each storage of caches: `{key: key of the whole content}`. Of latents also `{key: key that they lie
under}`: the same one, or that of an earlier release."""


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


def key_of_latents(storages: Sequence[Storage], key: str, earlier: str, earlier_whole: str) -> str:
    """The key that the latents named by `key` have in `storages`: where an earlier release used them, what it left
    under `earlier`, or under `earlier_whole` if `earlier` was another's, is used on. Either is noted: another decoder,
    with which `earlier` is another one and `key` is the same, then finds it too.
    """
    notes = [_read(storage) for storage in storages]
    found = next((note[key] for note in notes if note and isinstance(note.get(key), str)), None)
    if found is None and any(map(lambda storage, note: _holds(storage, note, earlier), storages, notes)):
        found = earlier if claim(storages, earlier, earlier_whole) else earlier_whole
    for storage in storages:
        note = _read(storage)
        if note is not None and key not in note and _is_writable(storage):
            storage.write(CLAIMS, json_bytes(note | {key: found or key}), sync=False)
    return found or key


def _holds(storage: Storage, note: dict[str, Any] | None, key: str) -> bool:
    """Whether a storage with that note has tensors under `key`: by its note, or because it has tensors and no note, as
    releases before the notes left it.
    """
    if note != {}:
        return note is not None and key in note
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
