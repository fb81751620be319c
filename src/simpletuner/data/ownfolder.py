"""Work on the files of a folder of images: one process at a time, and never outside of the folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.base.errors import DataError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import OWN_FOLDER, ImageFolder, list_images
from simpletuner.data.rejected import Rejected

LOCK = "lock"


def listed_images(folder: Path) -> ImageFolder:
    """As `list_images`.

    Raises:
        DataError: it is no folder, or cannot be read.
    """
    with file_errors_reported(folder, DataError, doing="list"):
        return list_images(folder)


def check_names(folder: Path, listed: ImageFolder, names: Sequence[str]) -> None:
    """Raise a DataError if one of `names` is no image of the folder."""
    unknown = [name for name in names if name not in listed.images]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError.of(
            f"{unknown[0]}{more}: no such image in {folder}", "paths of images relative to the folder, a line each"
        )


def inside(folder: Path, name: str) -> Path:
    """The path of `name`, a link at its end not followed.

    Raises:
        Rejected: a link on the way to it leads out of the folder.
    """
    path = folder / name
    if "/" in name and not path.parent.resolve().is_relative_to(folder.resolve()):
        raise Rejected("outside", "a link leads out of the folder")
    return path


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Our hidden folder inside `folder`, made where it is missing; held until the end, so that others wait.

    Raises:
        DataError: a link or a file is in its place.
        DiskError: it cannot be made.
    """
    own = folder / OWN_FOLDER
    with file_errors_reported(own):
        if own.is_symlink():
            raise DataError.of(f"{own} is a link", "a folder", "Move it away.")
        own.mkdir(exist_ok=True)
        handle = os.open(own / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield own
    finally:
        os.close(handle)
