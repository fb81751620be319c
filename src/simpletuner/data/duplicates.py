"""Find exact and near duplicates among a folder's images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import LocalStorage
from simpletuner.data.ahead import prefetched_map
from simpletuner.data.ownfolder import listed_images
from simpletuner.data.pixels import require_plugin, small_image
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Rejection

GRID = 9
"""Side of the grid of gray values to which an image is shrunk: 8x9 differences to the right and 9x8 downwards."""
NEAR_BITS = 10
"""Near duplicates differ in the sign of at most this many of the 144 differences."""
NEAR_COLOR = 24
"""Near duplicates' mean colors differ by at most this much (of 255) in each channel. The signs alone do not tell smooth
gradients apart."""
FLAT_SPAN = 8
"""An image whose gray values span less is flat: its differences are noise, so it never counts as a near duplicate."""


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are alike, by name."""

    kind: Literal["exact", "near"]
    """`exact`: the same bytes. `near`: a similar difference hash, which may be wrong."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Fingerprint:
    content: str
    bits: UInt8[np.ndarray, "18"]
    color: UInt8[np.ndarray, "3"]
    is_flat: bool


def find_duplicates(
    folder: Path, *, workers: int, report: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[list[DuplicateGroup], list[Rejection]]:
    """Groups of images with the same bytes, then groups of images that look nearly the same, and the images that cannot
    be read. Of exact duplicates, only the first takes part in the second search.

    Raises:
        DataError: no such folder.
    """
    images = LocalStorage(folder)
    names = list(listed_images(folder).images)
    fingerprints: dict[str, _Fingerprint] = {}
    unread: list[Rejection] = []
    results = prefetched_map(lambda name: _fingerprint(images, name), names, workers=workers, ahead=2 * workers)
    for done, (name, fingerprint) in enumerate(zip(names, results, strict=True), 1):
        if isinstance(fingerprint, Rejected):
            unread.append(Rejection(name, fingerprint.reason, fingerprint.detail))
        else:
            fingerprints[name] = fingerprint
        report(done, len(names))
    by_content: dict[str, list[str]] = {}
    for name, fingerprint in fingerprints.items():
        by_content.setdefault(fingerprint.content, []).append(name)
    exact = [DuplicateGroup("exact", tuple(same)) for same in by_content.values() if len(same) > 1]
    near = _near({same[0]: fingerprints[same[0]] for same in by_content.values() if not fingerprints[same[0]].is_flat})
    return exact + [DuplicateGroup("near", group) for group in near], unread


def _fingerprint(images: LocalStorage, name: str) -> _Fingerprint | Rejected:
    try:
        require_plugin(name)
        data = images.read(name)
        image = small_image(data, 4 * GRID)
    except Rejected as rejected:
        return rejected
    except OSError as error:
        return Rejected("unreadable", str(error.strerror))
    gray = np.asarray(image.convert("L").resize((GRID, GRID), Image.Resampling.BOX)).astype(np.int16)
    signs = np.concatenate([(gray[:, 1:] > gray[:, :-1]).ravel(), (gray[1:] > gray[:-1]).ravel()])
    color = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]
    return _Fingerprint(sha256_bytes(data), np.packbits(signs), color, bool(gray.max() - gray.min() < FLAT_SPAN))


def _near(fingerprints: dict[str, _Fingerprint]) -> list[tuple[str, ...]]:
    """Groups of images that are each near the group's first image by name, so that no chain of small differences joins
    different images.
    """
    if not fingerprints:
        return []
    names = list(fingerprints)
    bits = np.stack([fingerprint.bits for fingerprint in fingerprints.values()])
    colors = np.stack([fingerprint.color for fingerprint in fingerprints.values()]).astype(np.int16)
    is_free = np.ones(len(names), dtype=bool)
    groups = []
    for index, name in enumerate(names):
        if not is_free[index]:
            continue
        differing = np.bitwise_count(bits[index + 1 :] ^ bits[index]).sum(axis=1)
        color_distance = np.abs(colors[index + 1 :] - colors[index]).max(axis=1)
        members = (
            np.flatnonzero((differing <= NEAR_BITS) & (color_distance <= NEAR_COLOR) & is_free[index + 1 :]) + index + 1
        )
        if members.size:
            is_free[members] = False
            groups.append((name, *(names[other] for other in members)))
    return groups
