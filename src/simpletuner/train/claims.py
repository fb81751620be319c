"""Record which weights made the tensors under a cache key, in a JSON file beside the caches.

A cache key covers the name, dtype, shape and first 4 KiB of each tensor of an encoder, as in earlier releases, so their
caches stay valid. The first encoder that uses a key in a cache claims it with a hash of all its bytes. Another encoder
with the same key, whose tensors differ after 4 KiB, uses a different key.

Keys of latents cover all bytes of the VAE encoder, so they never collide. In earlier releases they covered the first
4 KiB of each tensor, the decoder's too. The latents of those releases stay in use, even with another decoder.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from simpletuner.base.files import json_bytes
from simpletuner.base.storage import Storage
from simpletuner.data.storages import LEDGER

CLAIMS = "bases.json"
"""The file of claims in each cache storage: `{key: content key}`, where the content key covers all bytes of the
encoder. For latents also `{key: key in use}`: the same key, or that of an earlier release.
"""


def claim(storages: Sequence[Storage], key: str, content_key: str) -> bool:
    """Claim `key` in `storages` for the encoder that `content_key` identifies. Returns False if another encoder has
    claimed it, or if a file of claims is damaged, so that the owner is unknown.
    """
    all_claims = [_read(storage) for storage in storages]
    if any(claims is None or claims.get(key, content_key) != content_key for claims in all_claims):
        return False
    for storage, claims in zip(storages, all_claims, strict=True):
        if claims is not None and key not in claims and _is_writable(storage):
            storage.write(CLAIMS, json_bytes(claims | {key: content_key}), sync=False)
    return True


def key_of_latents(storages: Sequence[Storage], key: str, earlier: str, earlier_whole: str) -> str:
    """The key under which `storages` keep the latents of `key`. If an earlier release cached them, it is that release's
    key: `earlier`, or `earlier_whole` if other weights have claimed `earlier`. The result is recorded under `key`,
    which does not depend on the decoder as `earlier` does, so a model with another decoder finds the latents too.
    """
    all_claims = [_read(storage) for storage in storages]
    key_in_use = next((claims[key] for claims in all_claims if claims and isinstance(claims.get(key), str)), None)
    if key_in_use is None and any(map(lambda storage, claims: _holds(storage, claims, earlier), storages, all_claims)):
        key_in_use = earlier if claim(storages, earlier, earlier_whole) else earlier_whole
    for storage in storages:
        claims = _read(storage)
        if claims is not None and key not in claims and _is_writable(storage):
            storage.write(CLAIMS, json_bytes(claims | {key: key_in_use or key}), sync=False)
    return key_in_use or key


def _holds(storage: Storage, claims: dict[str, Any] | None, key: str) -> bool:
    """Whether `storage` has tensors under `key`: `claims` names it, or there are tensors but no claims, because a
    release without claims wrote them.
    """
    if claims != {}:
        return claims is not None and key in claims
    try:
        storage.stat(LEDGER)
    except FileNotFoundError:
        return False
    return True


def _read(storage: Storage) -> dict[str, Any] | None:
    """The claims in a storage, empty if it has no file of them; None if that file is damaged."""
    try:
        claims = json.loads(storage.read(CLAIMS))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def _is_writable(storage: Storage) -> bool:
    """Whether claims can be written into `storage`, which may be a shared, read-only cache."""
    folder = storage.local_path()
    return folder is None or not folder.exists() or os.access(folder, os.W_OK)
