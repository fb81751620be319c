"""Which storage holds the images of a set, and which ones its caches; memos that spare work at the next start."""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpletuner.base.errors import DiskError
from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage, storage_of
from simpletuner.config.datasets import PictureSet, TextStore
from simpletuner.runs.layout import RunDirectory

LEDGER = "verified.json"
"""Beside a cache's files: the stamps of those that were read and found sound."""

SCAN_INDEX = "scan-{}.json"
"""Beside latents: what was learned about the images of a folder, by 16 digits of the hash of its path."""

_CACHE_FILE = re.compile(r"scan-[0-9a-f]{16}\.json|[0-9a-f]{64}\.safetensors")
_SHARD = re.compile(r"[0-9a-f]{2}")


def ours(names: Collection[str]) -> str | None:
    """What a folder that holds these names is to us and not to be trained on: a run, or a cache."""
    run = RunDirectory(Path())
    if run.events.name in names and run.checkpoints.name in names:
        return "a run directory"
    is_cache = any(name.endswith((".json", ".safetensors")) and _CACHE_FILE.fullmatch(name) for name in names)
    if is_cache or (LEDGER in names and any(map(_SHARD.fullmatch, names))):
        return "a cache of latents or text"
    return None


def image_storage(picture_set: PictureSet) -> Storage:
    """The storage of a set's images and caption files."""
    return storage_of(picture_set.instance_data_dir)


def latent_storage(picture_set: PictureSet) -> Storage:
    """The storage of a set's latents, and of what was learned about its images."""
    return storage_of(picture_set.cache_dir_vae)


def text_storage(store: TextStore) -> Storage:
    """The storage of text contexts."""
    return storage_of(store.cache_dir)


def read_memo(storage: Storage, name: str) -> Any:
    """The JSON value of the file `name`, which spares work and nothing else; None where it cannot be read."""
    try:
        return json.loads(storage.read(name))
    except (OSError, ValueError, RecursionError):
        return None


def write_memo(storage: Storage, name: str, value: Any) -> None:
    """Keep a JSON value that spares work at the next start. Where it cannot be written (a cache that is shared and may
    only be read), that work is done again.
    """
    with suppress(DiskError):
        storage.write(name, json_bytes(value))
