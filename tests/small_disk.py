"""A disk of a few MiB that a run fills: each restart finds a little more room, until the run is finished."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import DiskError


class CannotMountError(Exception):
    """This process may not mount a disk; says why."""


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that is mounted at `folder`."""

    folder: Path

    def resize(self, kib: int) -> None:
        """Let it hold `kib` KiB in all."""
        _mount("-o", f"remount,size={kib}k", str(self.folder))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[SmallDisk]:
    """Mount a disk of `kib` KiB at `folder`, which is made.

    Raises:
        CannotMountError: this process may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotMountError(str(error)) from None
    if done.returncode != 0:
        raise CannotMountError(done.stderr.strip())


def restarted_until_it_fits(train: Callable[[], int], disk: SmallDisk, *, kib: int, more_kib: int) -> list[int]:
    """Run `train` on a disk of `kib` KiB, and again with `more_kib` more each time until it ends otherwise than with a
    full disk. Returns the exit codes; the last one is 0 if all is well.
    """
    codes = [DiskError.exit_code]
    while codes[-1] == DiskError.exit_code:
        disk.resize(kib)
        codes.append(train())
        kib += more_kib
    return codes[1:]


def half_written(folder: Path) -> list[Path]:
    """What lies below `folder` under a temporary name."""
    return sorted(path for path in folder.rglob(".*") if path.name.endswith(".part") or ".tmp" in path.name)
