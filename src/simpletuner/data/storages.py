"""Storages of a dataset's images and caches, and memos that save work at the next start."""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpletuner.base.errors import DiskError
from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage, storage_of
from simpletuner.config.datasets import FolderDataset, TextStore
from simpletuner.runs.layout import RunDirectory

LEDGER = "verified.json"
"""File beside a cache's files, with the stamps of the files that were verified."""

SCAN_INDEX = "scan-{}.json"
"""File beside the latents, with facts about the images of a folder; named by 16 digits of the hash of its path."""

_CACHE_FILE = re.compile(r"scan-[0-9a-f]{16}\.json|[0-9a-f]{64}\.safetensors")
_SHARD = re.compile(r"[0-9a-f]{2}")


def own_folder_kind(names: Collection[str]) -> str | None:
    """What a folder with these file names is, if this program wrote it: "a run directory" or "a cache of latents or
    text", which must not be trained on. None for any other folder."""
    run = RunDirectory(Path())
    if run.events.name in names and run.checkpoints.name in names:
        return "a run directory"
    is_cache = any(name.endswith((".json", ".safetensors")) and _CACHE_FILE.fullmatch(name) for name in names)
    if is_cache or (LEDGER in names and any(map(_SHARD.fullmatch, names))):
        return "a cache of latents or text"
    return None


def image_storage(dataset: FolderDataset) -> Storage:
    """The storage of a dataset's images and caption files."""
    return storage_of(dataset.instance_data_dir)


def latent_storage(dataset: FolderDataset) -> Storage:
    """The storage of a dataset's latents and scan index."""
    return storage_of(dataset.cache_dir_vae)


def text_storage(store: TextStore) -> Storage:
    """The storage of text contexts."""
    return storage_of(store.cache_dir)


def read_memo(storage: Storage, name: str) -> Any:
    """The JSON value of the memo `name`; None if it cannot be read. A memo only saves work."""
    try:
        return json.loads(storage.read(name))
    except (OSError, ValueError, RecursionError):
        return None


def write_memo(storage: Storage, name: str, value: Any) -> None:
    """Write a JSON value that saves work at the next start. If it cannot be written (for example to a shared read-only
    cache), the work is repeated.
    """
    with suppress(DiskError):
        storage.write(name, json_bytes(value))
