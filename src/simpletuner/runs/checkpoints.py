"""Checkpoint folders: written to a temporary folder with a manifest of hashes, synced, renamed, verified before use."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import file_errors_reported, read_json, sha256_file, sync_directory, write_json
from simpletuner.base.parts import delete_path
from simpletuner.runs.layout import RunDirectory

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

_NAME = re.compile(r"step-(\d{6,})")
_REPLACED = ".tmp-replaced-"
"""Name prefix of a checkpoint while another one replaces it."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A verified checkpoint folder. `damage` is None if it can be used."""

    step: int
    path: Path
    damage: str | None


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into. At the end of the block it is sealed and renamed to `final`.

    An existing folder at `final` is moved away, and deleted after the rename. If the process is killed in between,
    `clear_unfinished` restores it.

    Raises:
        DiskError: the disk is full; an existing folder at `final` is unchanged.
    """
    with file_errors_reported(final):
        folder = begin(final)
        try:
            yield folder
            finish(final, {})
        finally:
            delete_path(folder)


def unfinished(final: Path) -> Path:
    """The temporary folder of the checkpoint that will be renamed to `final`."""
    return final.with_name(f".tmp-{final.name}")


def begin(final: Path) -> Path:
    """Create the empty temporary folder of the checkpoint `final`. End it with `finish` or `delete_path`.

    Raises:
        DiskError: it cannot be created.
    """
    folder = unfinished(final)
    with file_errors_reported(final):
        delete_path(folder)
        folder.mkdir(parents=True)
    return folder


def finish(final: Path, hashes: Mapping[str, str]) -> None:
    """Seal the folder that `begin` made, and rename it to `final`. `hashes` are SHA-256 by file name, of files that
    their writer has read back; other files are read and hashed here.

    Raises:
        DiskError: the disk is full; an existing folder at `final` is unchanged.
    """
    folder, replaced = unfinished(final), final.with_name(f"{_REPLACED}{final.name}")
    with file_errors_reported(final):
        _seal(folder, hashes)
        if os.path.lexists(final):  # a later attempt has reached the same step again
            delete_path(replaced)
            os.replace(final, replaced)
        try:
            os.replace(folder, final)
        except OSError:
            if os.path.lexists(replaced):
                os.replace(replaced, final)
            raise
        sync_directory(final.parent)
        delete_path(replaced)


def _seal(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the manifest, and sync all files and folders to the disk."""
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
    """The first damage found in a checkpoint; None if every file of its manifest exists and has its hash."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["version"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if version != MANIFEST_VERSION:
        return f"{MANIFEST} has version {version}, this program reads version {MANIFEST_VERSION}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} does not have the hash in its manifest"
    return None


def size(folder: Path) -> int:
    """Total size of a checkpoint's files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps(run: RunDirectory) -> list[int]:
    """Steps of the existing checkpoints, oldest first, damaged ones included."""
    if not run.checkpoints.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in run.checkpoints.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def newest_first(run: RunDirectory) -> Iterator[VerifiedCheckpoint]:
    """Yield each checkpoint with its damage, newest first. It is verified when it is yielded, since hashing is slow."""
    for step in reversed(steps(run)):
        folder = run.checkpoint(step)
        yield VerifiedCheckpoint(step, folder, damage(folder))


def prune(run: RunDirectory, keep: int, protect: frozenset[int]) -> list[int]:
    """Delete all but the newest `keep` checkpoints (0 keeps all). Returns the deleted steps.

    The newest sound checkpoint and the steps in `protect` are kept regardless of `keep`.
    """
    present = steps(run)
    if keep <= 0 or len(present) <= keep:
        return []
    newest_good = next((checkpoint.step for checkpoint in newest_first(run) if checkpoint.damage is None), None)
    deleted = []
    for step in present[:-keep]:
        if step == newest_good or step in protect:
            continue
        remove(run, step)
        deleted.append(step)
    return deleted


def remove(run: RunDirectory, step: int) -> None:
    """Delete a checkpoint. The caller must hold the run's lock.

    Raises:
        FileNotFoundError: there is no checkpoint of that step.
    """
    # Rename first, so that a kill during the deletion does not leave part of a checkpoint under its name.
    doomed = run.checkpoints / f".tmp-pruned-{step}"
    os.replace(run.checkpoint(step), doomed)
    shutil.rmtree(doomed)


def clear_unfinished(run: RunDirectory) -> None:
    """Remove incomplete checkpoints of a killed process, and restore a checkpoint that it was about to replace. The
    caller must hold the run's lock.

    Raises:
        CheckpointError: the checkpoints' folder cannot be read or changed.
    """
    with file_errors_reported(run.checkpoints, CheckpointError, doing="list"):
        names = sorted(os.listdir(run.checkpoints)) if run.checkpoints.is_dir() else []
        for name in names:
            final = run.checkpoints / name.removeprefix(_REPLACED)
            if name.startswith(_REPLACED) and not os.path.lexists(final):
                os.replace(run.checkpoints / name, final)
            elif name.startswith(".tmp-"):
                delete_path(run.checkpoints / name)
