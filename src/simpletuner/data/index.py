"""What earlier scans learned about each file, kept beside the latents, so that a picture is decoded once and
not at every start."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from simpletuner.base.files import read_json, sha256_bytes, write_json
from simpletuner.config.datasets import ImageSet
from simpletuner.data.ahead import map_ahead
from simpletuner.data.pixels import PIXELS_VERSION, Remark, inspect, require_plugin
from simpletuner.data.rejected import Rejected

SAVE_EVERY_S = 20.0
"""A scan of many pictures that is killed loses at most this much work."""


@dataclass(frozen=True)
class Entry:
    """A picture that decodes."""

    content: str
    """sha256 of the file's bytes."""
    width: int
    """Pixels, upright."""
    height: int
    remarks: tuple[Remark, ...]


def read_pictures(
    names: Sequence[str], image_set: ImageSet, *, workers: int, report: Callable[[int, int], None]
) -> dict[str, Entry | Rejected]:
    """What is known of each picture, by name; those that are new or changed are decoded by `workers` threads.

    A file counts as unchanged while its size and its times of modification and of status change are the same.

    Raises:
        DiskError: the index cannot be written.
    """
    folder = Path(image_set.instance_data_dir)
    path = _path(image_set)
    known = _load(path)
    kept: dict[str, Row] = {}
    found: dict[str, Entry | Rejected] = {}
    unread: dict[str, list[int]] = {}
    for name in names:
        try:
            require_plugin(name)
            stamp = _stamp(folder / name)
        except Rejected as rejected:  # not kept: the plug-in may be there next time
            found[name] = rejected
        except OSError as error:
            found[name] = Rejected("unreadable", str(error.strerror))
        else:
            if name in known and known[name]["stamp"] == stamp:
                kept[name], found[name] = known[name], _entry_of(known[name])
            else:
                unread[name] = stamp
    report(len(found), len(names))
    results = map_ahead(lambda name: _read(folder / name), unread, workers=workers, ahead=2 * workers)
    saved_at = time.monotonic()
    with contextlib.closing(results):
        for (name, stamp), entry in zip(unread.items(), results, strict=True):
            kept[name], found[name] = _row_of(stamp, entry), entry
            report(len(found), len(names))
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(path, kept)
                saved_at = time.monotonic()
    if kept != known:
        _save(path, kept)
    return found


def unknown(names: Sequence[str], image_set: ImageSet) -> int:
    """How many of the pictures `names` a scan would have to decode."""
    folder, known = Path(image_set.instance_data_dir), _load(_path(image_set))
    return sum(name not in known or known[name]["stamp"] != _stamp(folder / name) for name in names)


Row = dict[str, Any]


def _path(image_set: ImageSet) -> Path:
    """One file a folder of pictures, since several sets may share their cache."""
    folder = str(Path(image_set.instance_data_dir).resolve())
    return Path(image_set.cache_dir_vae) / f"scan-{sha256_bytes(os.fsencode(folder))[:16]}.json"


def _header() -> Row:
    """What a verdict depends on besides the file."""
    return {"version": 1, "pixels": PIXELS_VERSION, "pillow": PIL.__version__}


def _load(path: Path) -> dict[str, Row]:
    try:
        stored = read_json(path)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    rows: dict[str, Row] = stored.pop("files") if isinstance(stored, dict) and "files" in stored else {}
    return rows if stored == _header() else {}


def _save(path: Path, rows: dict[str, Row]) -> None:
    write_json(path, _header() | {"files": rows})


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _entry_of(row: Row) -> Entry | Rejected:
    if "reason" in row:
        return Rejected(row["reason"], row["detail"])
    return Entry(row["content"], row["width"], row["height"], tuple(row["remarks"]))


def _row_of(stamp: list[int], entry: Entry | Rejected) -> Row:
    if isinstance(entry, Rejected):
        return {"stamp": stamp, "reason": entry.reason, "detail": entry.detail}
    size = {"width": entry.width, "height": entry.height}
    return {"stamp": stamp, "content": entry.content, **size, "remarks": list(entry.remarks)}


def _read(path: Path) -> Entry | Rejected:
    """Read once, so that the hash is that of the bytes that were decoded."""
    try:
        data = path.read_bytes()
        facts = inspect(data)
    except Rejected as rejected:
        return rejected
    except OSError as error:
        return Rejected("unreadable", str(error.strerror))
    return Entry(sha256_bytes(data), facts.width, facts.height, facts.remarks)
