"""Safe changes to the files of an image folder: one process at a time, and never outside the folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.base.errors import DataError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import SIMPLETUNER_FOLDER, ImageFolder, list_images
from simpletuner.data.rejected import Rejected

LOCK = "lock"


def listed_images(folder: Path) -> ImageFolder:
    """List the images and captions of `folder`, as `list_images` does.

    Raises:
        DataError: it is not a folder, or cannot be read.
    """
    with file_errors_reported(folder, DataError, doing="list"):
        return list_images(folder)


def check_names(folder: Path, listed: ImageFolder, names: Sequence[str]) -> None:
    """Raise a DataError if one of `names` is not an image of the folder."""
    unknown = [name for name in names if name not in listed.images]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError.of(
            f"{unknown[0]}{more}: no such image in {folder}", "paths of images relative to the folder, one per line"
        )


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. If the file itself is a link, it is not followed.

    Raises:
        Rejected: a link in its parent folders leads out of `folder`.
    """
    path = folder / name
    if "/" in name and not path.parent.resolve().is_relative_to(folder.resolve()):
        raise Rejected("outside", "a link leads out of the folder")
    return path


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Lock our hidden folder inside `folder`, created if missing, and yield it. Other processes wait for the lock.

    Raises:
        DataError: a link or a file has its name.
        DiskError: it cannot be created.
    """
    hidden = folder / SIMPLETUNER_FOLDER
    with file_errors_reported(hidden):
        if hidden.is_symlink():
            raise DataError.of(f"{hidden} is a link", "a folder", "Move it away.")
        hidden.mkdir(exist_ok=True)
        handle = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield hidden
    finally:
        os.close(handle)
