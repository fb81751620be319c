"""Images of a folder that are the same, or nearly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import LocalStorage
from simpletuner.data.ahead import map_ahead
from simpletuner.data.ownfolder import listed_images
from simpletuner.data.pixels import require_plugin, small_image
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Rejection

GRID = 9
"""An image is shrunk to 9x9 gray values: 8x9 differences to the right and 9x8 downwards."""
NEAR_BITS = 10
"""Of those 144 differences, how many may point the other way in images that count as nearly the same."""
NEAR_COLOR = 24
"""And how far their mean colors may lie apart, of 255 in each channel: gradients without detail have few signs."""
FLAT_SPAN = 8
"""An image whose gray values span less is plain: its differences are noise, and it is near to nothing."""


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are alike, by name."""

    kind: Literal["exact", "near"]
    """The same bytes; or similar by a hash of their differences, which may be wrong."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    content: str
    bits: UInt8[np.ndarray, "18"]
    color: UInt8[np.ndarray, "3"]
    is_flat: bool


def find_duplicates(
    folder: Path, *, workers: int, report: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[list[DuplicateGroup], list[Rejection]]:
    """Groups of images with the same bytes, then groups of images that look nearly the same (of those with the same
    bytes the first); and the images that cannot be read.

    Raises:
        DataError: no such folder.
    """
    images = LocalStorage(folder)
    names = list(listed_images(folder).images)
    looks: dict[str, _Look] = {}
    unread: list[Rejection] = []
    results = map_ahead(lambda name: _look(images, name), names, workers=workers, ahead=2 * workers)
    for done, (name, look) in enumerate(zip(names, results, strict=True), 1):
        if isinstance(look, Rejected):
            unread.append(Rejection(name, look.reason, look.detail))
        else:
            looks[name] = look
        report(done, len(names))
    by_content: dict[str, list[str]] = {}
    for name, look in looks.items():
        by_content.setdefault(look.content, []).append(name)
    exact = [DuplicateGroup("exact", tuple(same)) for same in by_content.values() if len(same) > 1]
    near = _near({same[0]: looks[same[0]] for same in by_content.values() if not looks[same[0]].is_flat})
    return exact + [DuplicateGroup("near", group) for group in near], unread


def _look(images: LocalStorage, name: str) -> _Look | Rejected:
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
    return _Look(sha256_bytes(data), np.packbits(signs), color, bool(gray.max() - gray.min() < FLAT_SPAN))


def _near(looks: dict[str, _Look]) -> list[tuple[str, ...]]:
    """Groups around the first image of each, by name: no chain of small differences joins what differs."""
    if not looks:
        return []
    names = list(looks)
    bits = np.stack([look.bits for look in looks.values()])
    colors = np.stack([look.color for look in looks.values()]).astype(np.int16)
    is_free = np.ones(len(names), dtype=bool)
    groups = []
    for index, name in enumerate(names):
        if not is_free[index]:
            continue
        differing = np.bitwise_count(bits[index + 1 :] ^ bits[index]).sum(axis=1)
        apart = np.abs(colors[index + 1 :] - colors[index]).max(axis=1)
        found = np.flatnonzero((differing <= NEAR_BITS) & (apart <= NEAR_COLOR) & is_free[index + 1 :]) + index + 1
        if found.size:
            is_free[found] = False
            groups.append((name, *(names[other] for other in found)))
    return groups
