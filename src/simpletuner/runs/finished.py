"""The results of a finished run, listed with hashes in `finished.json`. It is written last, so a run that has it is
complete."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.base.errors import DiskError
from simpletuner.base.files import file_errors_reported, read_json, sha256_file, write_json
from simpletuner.runs.checkpoints import MANIFEST
from simpletuner.runs.layout import RunDirectory

FINISHED_VERSION = 1

HASHED_BYTES = 4 * 2**30
"""A larger file is not hashed again at each start if it has the size and time of its entry."""


def write_finished(run: RunDirectory, step: int, checkpoint: Path, products: Mapping[Path, Path | None]) -> None:
    """Write `finished.json` for `products`: result files with the file of `checkpoint` that each must equal, if any.

    Every file is read back, unless it is a hard link to the checkpoint's file, whose hash is known.

    Raises:
        DiskError: a file reads back differently, or the disk is full.
    """
    manifest = read_json(checkpoint / MANIFEST)
    hashes = {checkpoint / name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
    entries: dict[str, Any] = {}
    for path, source in sorted(products.items()):
        with file_errors_reported(path, doing="read"):
            file_status = path.stat()
            is_link = source is not None and path.samefile(source)
            digest = hashes[source] if source is not None and is_link else sha256_file(path)
        if source is not None and digest != hashes[source]:
            raise DiskError.of(
                f"{path} reads back differently from {source}",
                remedy="Check the disk, then run the same command again.",
            )
        name = path.relative_to(run.root).as_posix()
        entries[name] = {"sha256": digest, "bytes": file_status.st_size, "mtime_ns": file_status.st_mtime_ns}
    write_json(run.finished, {"version": FINISHED_VERSION, "step": step, "products": entries})


def missing_result(run: RunDirectory, step: int) -> str | None:
    """The first missing or damaged result of a run that is trained to `step`; None if all are as listed."""
    try:
        value = read_json(run.finished)
        version, listed_step = value["version"], value["step"]
        products = {
            str(name): (str(entry["sha256"]), int(entry["bytes"]), int(entry["mtime_ns"]))
            for name, entry in value["products"].items()
        }
    except FileNotFoundError:
        return f"{run.finished.name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{run.finished.name} cannot be read"
    if version != FINISHED_VERSION:
        return f"{run.finished.name} has version {version}, this program reads version {FINISHED_VERSION}"
    if listed_step != step:
        return f"{run.finished.name} belongs to step {listed_step}, the last checkpoint to step {step}"
    for name, expected in products.items():
        reason = _damage(run.root / name, *expected) if _is_inside(name) else "is outside the run directory"
        if reason is not None:
            return f"{name} {reason}"
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _damage(path: Path, digest: str, size: int, mtime_ns: int) -> str | None:
    if not path.is_file():
        return "is missing"
    with file_errors_reported(path, doing="read"):
        file_status = path.stat()
        if file_status.st_size == size and size > HASHED_BYTES and file_status.st_mtime_ns == mtime_ns:
            return None
        return None if file_status.st_size == size and sha256_file(path) == digest else "differs from the exported file"
