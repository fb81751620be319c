"""Whose tensors lie under a cache's key: a note beside the caches of which weights made them.

A key names of each tensor of an encoder its name, dtype, shape and first 4 KiB, so that caches of every release are
found. The first weights that use a key in a cache are noted there, by a hash of all of their bytes; others with that
key, which differ further on, use a key of their own.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage

CLAIMS = "bases.json"
"""The note, in each storage of caches: `{key: key of the whole content}`."""


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
