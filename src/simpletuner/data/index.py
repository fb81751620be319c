"""Scan index: the facts that earlier scans learned about each file. It is stored beside the latents, so that an image
is decoded once and not at every start.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import PIL

from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import Stamp, Storage
from simpletuner.data.ahead import prefetched_map
from simpletuner.data.pixels import PIXELS_VERSION, Remark, check_size, inspect, one_at_a_time, require_plugin
from simpletuner.data.rejected import OUT_OF_MEMORY, TRANSIENT, UNREADABLE_FILE, Rejected
from simpletuner.data.storages import SCAN_INDEX, read_memo, write_memo

SAVE_EVERY_S = 20.0
"""A long scan that is killed loses at most this much work."""

INDEX_VERSION = 2
"""Increase it when the same file would get another size, remark or rejection, so that all files are read again."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """Facts of an image that decodes."""

    content: str
    """sha256 of the file's bytes."""
    width: int
    """Pixels, upright."""
    height: int
    remarks: tuple[Remark, ...]


def read_images(
    stamps: Mapping[str, Stamp],
    images: Storage,
    cache: Storage,
    *,
    workers: int,
    report: Callable[[int, int], None],
) -> dict[str, IndexEntry | Rejected]:
    """Return the facts or the rejection of each image in `stamps`, by name. `workers` threads decode new and changed
    files.

    A file counts as unchanged if its stamp is the same. The index is saved in `cache` if that is writable.
    """
    index = _index_name(images)
    known_rows = _load(cache, index)
    saved_rows: dict[str, IndexRow] = {}
    results_by_name: dict[str, IndexEntry | Rejected] = {}
    unread: list[str] = []
    for name, stamp in stamps.items():
        try:
            require_plugin(name)
        except Rejected as rejected:  # not saved: the plug-in may be installed next time
            results_by_name[name] = rejected
        else:
            if _is_known(name, stamp, known_rows):
                saved_rows[name], results_by_name[name] = known_rows[name], _entry_of(known_rows[name])
            else:
                unread.append(name)
    report(len(results_by_name), len(stamps))
    decoded = prefetched_map(lambda name: _read(images, name, stamps[name]), unread, workers=workers, ahead=2 * workers)
    saved_at = time.monotonic()
    with contextlib.closing(decoded):
        for name, entry in zip(unread, decoded, strict=True):
            results_by_name[name] = entry
            if not (isinstance(entry, Rejected) and entry.reason in TRANSIENT):
                saved_rows[name] = _row_of(stamps[name], entry)
            report(len(results_by_name), len(stamps))
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(cache, index, saved_rows)
                saved_at = time.monotonic()
    if saved_rows != known_rows:
        _save(cache, index, saved_rows)
    return results_by_name


def count_unknown(stamps: Mapping[str, Stamp], images: Storage, cache: Storage) -> int:
    """Number of images in `stamps` that `read_images` would have to decode."""
    known_rows = _load(cache, _index_name(images))
    return sum(not _is_known(name, stamp, known_rows) for name, stamp in stamps.items())


IndexRow = dict[str, Any]


def _index_name(images: Storage) -> str:
    """Name of the index file: one per folder of images, since several datasets may share a cache folder."""
    path = images.local_path()
    location = images.text() if path is None else str(path.resolve())
    return SCAN_INDEX.format(sha256_bytes(os.fsencode(location))[:16])


def _header() -> IndexRow:
    """The versions that determine a file's facts and rejections besides the file itself."""
    return {"version": INDEX_VERSION, "pixels": PIXELS_VERSION, "pillow": PIL.__version__}


def _load(cache: Storage, index: str) -> dict[str, IndexRow]:
    stored = read_memo(cache, index)
    rows: dict[str, IndexRow] = stored.pop("files") if isinstance(stored, dict) and "files" in stored else {}
    return rows if stored == _header() else {}


def _save(cache: Storage, index: str, rows: dict[str, IndexRow]) -> None:
    write_memo(cache, index, _header() | {"files": rows})


def _is_known(name: str, stamp: Stamp, known_rows: Mapping[str, IndexRow]) -> bool:
    return name in known_rows and known_rows[name]["stamp"] == list(stamp)


def _entry_of(row: IndexRow) -> IndexEntry | Rejected:
    if "reason" in row:
        return Rejected(row["reason"], row["detail"])
    return IndexEntry(row["content"], row["width"], row["height"], tuple(row["remarks"]))


def _row_of(stamp: Stamp, entry: IndexEntry | Rejected) -> IndexRow:
    if isinstance(entry, Rejected):
        return {"stamp": list(stamp), "reason": entry.reason, "detail": entry.detail}
    size = {"width": entry.width, "height": entry.height}
    return {"stamp": list(stamp), "content": entry.content, **size, "remarks": list(entry.remarks)}


def _read(images: Storage, name: str, stamp: Stamp) -> IndexEntry | Rejected:
    """Read a file once, so that the decoded bytes are the hashed ones, and no more bytes than were listed."""
    size = int(stamp[0])
    try:
        check_size(size)
        with one_at_a_time(size):
            data = images.read(name, 0, size)
            facts = inspect(data)
            return IndexEntry(sha256_bytes(data), facts.width, facts.height, facts.remarks)
    except Rejected as rejected:
        return rejected
    except MemoryError:
        return Rejected(OUT_OF_MEMORY, f"{size} bytes do not fit")
    except OSError as error:
        return Rejected(UNREADABLE_FILE, str(error.strerror))
