"""Checkpoints as folders: built aside, synced, renamed; sealed by a manifest of hashes; verified before use."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import file_errors_reported, read_json, sha256_file, sync_directory, write_json
from simpletuner.base.parts import discard
from simpletuner.runs.layout import RunDirectory

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

_NAME = re.compile(r"step-(\d{6,})")
_REPLACED = ".tmp-replaced-"
"""Before the name of a checkpoint that another one replaces."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint folder and what is wrong with it (nothing, if it can be used)."""

    step: int
    path: Path
    damage: str | None


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into; when the block ends it is sealed and appears at `final` whole.

    What was at `final` is set aside, and deleted once the new one is there. If the process is killed in between,
    `clear_unfinished` puts it back.

    Raises:
        DiskError: the disk is full; what was there before is untouched.
    """
    with file_errors_reported(final):
        part = begin(final)
        try:
            yield part
            finish(final, {})
        finally:
            discard(part)


def unfinished(final: Path) -> Path:
    """The folder in which the checkpoint that will be `final` is built."""
    return final.with_name(f".tmp-{final.name}")


def begin(final: Path) -> Path:
    """Make the empty folder in which the checkpoint that will be `final` is built. `finish` ends it, `discard` too.

    Raises:
        DiskError: it cannot be made.
    """
    part = unfinished(final)
    with file_errors_reported(final):
        discard(part)
        part.mkdir(parents=True)
    return part


def finish(final: Path, hashes: Mapping[str, str]) -> None:
    """Seal the folder that `begin` made, and rename it to `final`. `hashes` are the SHA-256 of files whose writer has
    read them back, by their names; the others are read here.

    Raises:
        DiskError: the disk is full; what was there before is untouched.
    """
    part, replaced = unfinished(final), final.with_name(f"{_REPLACED}{final.name}")
    with file_errors_reported(final):
        _seal(part, hashes)
        if os.path.lexists(final):  # a later attempt reaches the same step again
            discard(replaced)
            os.replace(final, replaced)
        try:
            os.replace(part, final)
        except OSError:
            if os.path.lexists(replaced):
                os.replace(replaced, final)
            raise
        sync_directory(final.parent)
        discard(replaced)


def _seal(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the manifest, and flush everything to the disk."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    entries = {
        name: {"sha256": hashes[name] if name in hashes else sha256_file(path), "bytes": path.stat().st_size}
        for name, path in files.items()
    }
    write_json(folder / MANIFEST, {"version": MANIFEST_VERSION, "files": entries})
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_directory(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest is there and has its hash."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["version"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if version != MANIFEST_VERSION:
        return f"{MANIFEST} is of version {version}, this program reads version {MANIFEST_VERSION}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} does not have the hash of its manifest"
    return None


def size(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps(run: RunDirectory) -> list[int]:
    """Steps of the checkpoints that are there, oldest first, damaged ones included."""
    if not run.checkpoints.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in run.checkpoints.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def newest_first(run: RunDirectory) -> Iterator[FoundCheckpoint]:
    """Each checkpoint with its verdict, newest first; verified lazily, since hashing takes time."""
    for step in reversed(steps(run)):
        folder = run.checkpoint(step)
        yield FoundCheckpoint(step, folder, damage(folder))


def prune(run: RunDirectory, keep: int, protect: frozenset[int]) -> list[int]:
    """Delete all but the newest `keep` checkpoints (0 keeps all); returns the steps that went.

    The newest that verifies stays, whatever `keep` says, and so do the steps in `protect`.
    """
    present = steps(run)
    if keep <= 0 or len(present) <= keep:
        return []
    newest_good = next((found.step for found in newest_first(run) if found.damage is None), None)
    gone = []
    for step in present[:-keep]:
        if step == newest_good or step in protect:
            continue
        remove(run, step)
        gone.append(step)
    return gone


def remove(run: RunDirectory, step: int) -> None:
    """Delete a checkpoint. Only the holder of the run's lock may.

    Raises:
        FileNotFoundError: there is none of that step.
    """
    # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint under its name.
    doomed = run.checkpoints / f".tmp-pruned-{step}"
    os.replace(run.checkpoint(step), doomed)
    shutil.rmtree(doomed)


def clear_unfinished(run: RunDirectory) -> None:
    """Remove what a killed process left half built, and put back what it was about to replace. Only the holder of the
    run's lock may.

    Raises:
        CheckpointError: the folder of the checkpoints cannot be read or changed.
    """
    with file_errors_reported(run.checkpoints, CheckpointError, doing="list"):
        names = sorted(os.listdir(run.checkpoints)) if run.checkpoints.is_dir() else []
        for name in names:
            final = run.checkpoints / name.removeprefix(_REPLACED)
            if name.startswith(_REPLACED) and not os.path.lexists(final):
                os.replace(run.checkpoints / name, final)
            elif name.startswith(".tmp-"):
                discard(run.checkpoints / name)
