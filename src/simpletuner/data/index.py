"""What earlier scans learned about each file, kept beside the latents, so that a picture is decoded once and
not at every start."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import PIL

from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import Stamp, Storage
from simpletuner.data.ahead import map_ahead
from simpletuner.data.pixels import PIXELS_VERSION, Remark, check_size, inspect, one_at_a_time, require_plugin
from simpletuner.data.rejected import OUT_OF_MEMORY, PASSING, UNREADABLE_FILE, Rejected
from simpletuner.data.storages import SCAN_INDEX, read_memo, write_memo

SAVE_EVERY_S = 20.0
"""A scan of many pictures that is killed loses at most this much work."""

INDEX_VERSION = 2
"""Raised when the same file would have another size, remark or rejection, so that all are looked at again."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A picture that decodes."""

    content: str
    """sha256 of the file's bytes."""
    width: int
    """Pixels, upright."""
    height: int
    remarks: tuple[Remark, ...]


def read_pictures(
    pictures: Mapping[str, Stamp],
    images: Storage,
    cache: Storage,
    *,
    workers: int,
    report: Callable[[int, int], None],
) -> dict[str, IndexEntry | Rejected]:
    """What is known of each of `pictures`, by name; those that are new or changed are decoded by `workers` threads.

    A file counts as unchanged while its stamp is the same. The index is kept in `cache`, where that can be written.
    """
    index = _index_name(images)
    known = _load(cache, index)
    kept: dict[str, IndexRow] = {}
    found: dict[str, IndexEntry | Rejected] = {}
    unread: list[str] = []
    for name, stamp in pictures.items():
        try:
            require_plugin(name)
        except Rejected as rejected:  # not kept: the plug-in may be there next time
            found[name] = rejected
        else:
            if _is_known(name, stamp, known):
                kept[name], found[name] = known[name], _entry_of(known[name])
            else:
                unread.append(name)
    report(len(found), len(pictures))
    results = map_ahead(lambda name: _read(images, name, pictures[name]), unread, workers=workers, ahead=2 * workers)
    saved_at = time.monotonic()
    with contextlib.closing(results):
        for name, entry in zip(unread, results, strict=True):
            found[name] = entry
            if not (isinstance(entry, Rejected) and entry.reason in PASSING):
                kept[name] = _row_of(pictures[name], entry)
            report(len(found), len(pictures))
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(cache, index, kept)
                saved_at = time.monotonic()
    if kept != known:
        _save(cache, index, kept)
    return found


def count_unknown(pictures: Mapping[str, Stamp], images: Storage, cache: Storage) -> int:
    """How many of `pictures` `read_pictures` would have to decode."""
    known = _load(cache, _index_name(images))
    return sum(not _is_known(name, stamp, known) for name, stamp in pictures.items())


IndexRow = dict[str, Any]


def _index_name(images: Storage) -> str:
    """One file a folder of pictures, since several sets may share their cache."""
    path = images.local_path()
    place = images.shown() if path is None else str(path.resolve())
    return SCAN_INDEX.format(sha256_bytes(os.fsencode(place))[:16])


def _header() -> IndexRow:
    """What a verdict depends on besides the file."""
    return {"version": INDEX_VERSION, "pixels": PIXELS_VERSION, "pillow": PIL.__version__}


def _load(cache: Storage, index: str) -> dict[str, IndexRow]:
    stored = read_memo(cache, index)
    rows: dict[str, IndexRow] = stored.pop("files") if isinstance(stored, dict) and "files" in stored else {}
    return rows if stored == _header() else {}


def _save(cache: Storage, index: str, rows: dict[str, IndexRow]) -> None:
    write_memo(cache, index, _header() | {"files": rows})


def _is_known(name: str, stamp: Stamp, known: Mapping[str, IndexRow]) -> bool:
    return name in known and known[name]["stamp"] == list(stamp)


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
    """Read once, so that the hash is that of the bytes that were decoded, and no more bytes than were listed."""
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
