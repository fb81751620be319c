"""Delete a run: rename its directory in one step, then remove it. Remains of killed deletions are removed next time."""

import contextlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.commandline import command_text
from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.parts import delete_path
from simpletuner.runs.checkpoints import steps
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue
from simpletuner.runs.status import find_runs, is_run

_DELETED = re.compile(r"\..+\.[0-9a-f]{8}\.deleted")
_OWN = frozenset(
    [
        "adapter.json",
        "checkpoints",
        "config.json",
        "console.log",
        "control",
        "datasets.json",
        "ema",
        "events.jsonl",
        "finished.json",
        "lock",
        "model",
        "note.txt",
        "profile",
        "pytorch_lora_weights.safetensors",
        "run.log",
        "samples",
        "starting.json",
        "starting.lock",
        "tensorboard",
        "transformer.safetensors",
        "validation",
        "wandb",
        "weights.json",
    ]
)
"""Names that runs, trackers and the page write into a run's directory."""
_NAMED = 5
"""Maximum number of listed names of other files."""
_IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp"))


@dataclass(frozen=True)
class RunContents:
    """The contents of a run's directory."""

    bytes: int
    """Size on the disk; hard-linked files are counted once."""
    files: int
    checkpoints: int
    images: int
    has_result: bool
    """Whether it contains the finished LoRA or model."""
    others: tuple[str, ...]
    """Names in the directory that no run writes."""

    @property
    def text(self) -> str:
        """The contents in words: "the finished result, 3 checkpoints, 12 images, 40 files in all"."""
        counted = [(self.checkpoints, "checkpoint"), (self.images, "image"), (self.files, "file in all")]
        plural = {"file in all": "files in all"}
        words = ["the finished result"] if self.has_result else []
        words += [f"{n} {noun if n == 1 else plural.get(noun, noun + 's')}" for n, noun in counted if n]
        if self.others:
            more = len(self.others) - _NAMED
            names = ", ".join(self.others[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            words.append(f"also files that do not belong to the run: {names}")
        return ", ".join(words) or "no files"


def contents_of(run: RunDirectory) -> RunContents:
    """Count the contents of a run's directory. Links are not followed."""
    sizes: dict[tuple[int, int], int] = {}
    kinds: Counter[str] = Counter()
    for entry in _files_below(run.root):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that is pruned meanwhile
            file_status = entry.stat(follow_symlinks=False)
            sizes[file_status.st_dev, file_status.st_ino] = file_status.st_blocks * 512
            kinds["image" if Path(entry.name).suffix.lower() in _IMAGES else "other"] += 1
    has_result = run.lora.is_file() or run.model.is_dir()
    names = sorted(entry.name for entry in os.scandir(run.root))
    others = tuple(name for name in names if name not in _OWN and not name.startswith("."))
    return RunContents(sum(sizes.values()), kinds.total(), len(steps(run)), kinds["image"], has_result, others)


def delete_run(run: RunDirectory, workspace: Path) -> RunContents:
    """Delete a run's directory with all its contents, and return what they were.

    Links in it are removed, not followed; nothing outside is changed.

    Raises:
        CheckpointError: the run is active, is starting, or waits in the queue of `workspace`.
        ConfigError: the folder is not a run, is a link, or contains another run or `workspace`.
        DiskError: the directory or a file in it cannot be removed. The remains are hidden; they are removed when a
            sibling run is deleted or the runs are listed.
    """
    check_deletable(run, workspace)
    contents = contents_of(run)
    root = run.root.absolute()
    doomed = root.with_name(f".{root.name}.{secrets.token_hex(4)}.deleted")
    with run.starting_lock(), run.lock(), file_errors_reported(root, doing="delete"):
        os.rename(root, doomed)
        shutil.rmtree(doomed)
    finish_deletions(root.parent, depth=0)
    return contents


def check_deletable(run: RunDirectory, workspace: Path) -> None:
    """Raise the error with which `delete_run` would refuse to delete `run`, if any."""
    root = run.root
    if root.is_symlink():
        raise ConfigError.of(f"{root} is a link", "the folder itself", f"Name {root.resolve()}.")
    if not (is_run(run) or (run.control.is_dir() and run.checkpoints.is_dir())):
        raise ConfigError.of(f"{root} is not a run", remedy="`simpletuner run list` lists the runs.")
    if workspace.resolve().is_relative_to(root.resolve()):
        raise ConfigError.of(f"{root} contains the working directory", "a folder that contains only a run")
    nested = [other.root for below in root.iterdir() if below.is_dir() for other in find_runs(below)]
    if nested:
        raise ConfigError.of(f"{root} contains another run, {nested[0]}", "a folder that contains only a run")
    if run.lock().is_held() or run.starting_lock().is_held():
        pid = run.lock().pid() or run.starting_lock().pid() or "unknown"
        stop = command_text("simpletuner", "run", "stop", root, "--wait")
        raise CheckpointError.of(
            f"{root} is in use by process {pid}", "a run that is not active", f"`{stop}` stops it."
        )
    queue = Queue.of(workspace)
    for entry in queue.entries():
        entry_path = (queue.workspace / entry.output_dir).resolve()
        if entry.state in ("waiting", "running") and entry.output_dir and entry_path == root.resolve():
            raise CheckpointError.of(
                f"{root} belongs to queue entry {entry.id}, which is {entry.state}",
                remedy=f"`simpletuner run queue remove {entry.id}` removes the entry.",
            )


def finish_deletions(folder: Path, depth: int = 3) -> None:
    """Remove the remains of killed deletions in `folder` and at most `depth` levels below. Ignores what it cannot
    remove."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not entry.is_dir(follow_symlinks=False):
                continue
            if _DELETED.fullmatch(entry.name):
                delete_path(Path(entry.path))
            elif depth and not is_run(RunDirectory(Path(entry.path))):
                finish_deletions(Path(entry.path), depth - 1)


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all entries below `folder` that are not folders: files, links, pipes."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(Path(entry.path))
            else:
                yield entry
