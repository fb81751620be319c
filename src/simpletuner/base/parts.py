"""Files and folders that are not yet whole: hidden, locked while their process lives, swept once it is gone.

The lock is the system's (`flock`) and ends with the process, however that ends: no pid is trusted, which another
machine or container may have given to something else.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from simpletuner.base.errors import ConfigError

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF})
"""What a file system without locks answers."""

_LOOK_EVERY_S = 0.005

ABANDONED_S = 3600
"""On a file system without locks, a part that nobody has written to for this long belongs to a process that is gone."""


@contextlib.contextmanager
def locked_part(path: Path, *, is_folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """An empty file or folder beside `path`, to be filled and renamed to it. Removed at the end if it was not renamed.

    `mode` is a folder's, less what the process's mask takes away.

    Raises:
        OSError: it cannot be made.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    handle = _made_and_locked(part, is_folder, mode)
    try:
        yield part
    finally:
        if _is_same(handle, part):
            discard(part)
        os.close(handle)


@contextlib.contextmanager
def editing(path: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Keep every other process that edits a file in the folder of `path` waiting: look, decide and replace below this.

    The folder itself is locked (the first above that is there), so nothing is left beside the file, and the lock ends
    with the process. Not for two files of one folder, one inside the other. A file system without locks has none.

    Raises:
        ConfigError: another process held it for `wait_s` seconds.
        OSError: the folder cannot be opened.
    """
    folder = next(above for above in path.absolute().parents if above.is_dir())
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    found = f"{path.name} is being changed by another process"
                    raise ConfigError.of(found, remedy="Try again.") from None
                time.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(handle)


def sweep_parts(folder: Path, pattern: str) -> None:
    """Remove the parts that no process holds: what killed processes left half-written in `folder`.

    `pattern` names them, and nothing that another program may have put there. What may not be removed stays.
    """
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError):
            _sweep(part)


def discard(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _made_and_locked(part: Path, is_folder: bool, mode: int) -> int:
    while True:
        if is_folder:
            part.mkdir(mode, exist_ok=True)
            handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
        else:
            handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            raise
        if _is_same(handle, part):  # else it was swept, or renamed, before it was locked
            return handle
        os.close(handle)


def _sweep(part: Path) -> None:
    handle = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR | os.O_NONBLOCK)
    try:
        has_locks = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (has_locks or time.time() - os.fstat(handle).st_mtime > ABANDONED_S) and _is_same(handle, part):
            discard(part)
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Lock an open file. False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `how` says not to wait.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _is_same(handle: int, path: Path) -> bool:
    """Whether the open file still lies at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
