"""Partial files and folders: hidden, locked by the process that writes them, and removed once that process is gone.

The lock is the system's (`flock`), which is released whenever the process ends. Pids are not trusted, since the same
pid may belong to another process on another machine or in another container.
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
"""Errors of a lock call on a file system that has no locks."""

_RETRY_EVERY_S = 0.005

ABANDONED_S = 3600
"""Seconds. On a file system without locks, a part that has not been modified for this long counts as abandoned."""


@contextlib.contextmanager
def locked_part(path: Path, *, is_folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Create an empty, locked file or folder beside `path`, to be filled and renamed to `path`.

    It is removed on exit if it was not renamed. `mode` applies to a folder, less the process's umask.

    Raises:
        OSError: it cannot be created.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    handle = _create_locked(part, is_folder, mode)
    try:
        yield part
    finally:
        if _is_same(handle, part):
            delete_path(part)
        os.close(handle)


@contextlib.contextmanager
def folder_locked(path: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Lock out other processes that edit files in the folder of `path`. Read, decide and replace inside this context.

    It locks the folder itself, or the nearest parent that exists, so no lock file remains, and the lock ends with the
    process. Do not nest it for two files of one folder. On a file system without locks it does nothing.

    Raises:
        ConfigError: another process held the lock for `wait_s` seconds.
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
                    message = f"{path.name} is being changed by another process"
                    raise ConfigError.of(message, remedy="Try again.") from None
                time.sleep(_RETRY_EVERY_S)
        yield
    finally:
        os.close(handle)


def remove_abandoned_parts(folder: Path, pattern: str) -> None:
    """Remove parts in `folder` that no process has locked: leftovers of killed processes.

    `pattern` must match only our parts, and no file of another program. Parts that cannot be removed stay.
    """
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError):
            _sweep(part)


def delete_path(path: Path) -> None:
    """Delete a file, a link or a folder with its content, if it exists. Errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _create_locked(part: Path, is_folder: bool, mode: int) -> int:
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
        if _is_same(handle, part):  # otherwise it was removed or renamed before the lock
            return handle
        os.close(handle)


def _sweep(part: Path) -> None:
    handle = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR | os.O_NONBLOCK)
    try:
        has_locks = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (has_locks or time.time() - os.fstat(handle).st_mtime > ABANDONED_S) and _is_same(handle, part):
            delete_path(part)
    finally:
        os.close(handle)


def _lock(handle: int, operation: int) -> bool:
    """Lock an open file with the flags `operation` of `flock`; False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `operation` has LOCK_NB.
    """
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _is_same(handle: int, path: Path) -> bool:
    """Whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
