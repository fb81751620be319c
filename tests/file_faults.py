"""Faults of a file system: what makes a path unreadable, and the rights of an ordinary user for a test run by root."""

import contextlib
import ctypes
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Fault = Callable[[Path], None]

_IGNORES_MODES = 0b1110
"""Linux' CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER, as a mask."""
_CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def rights_of_a_user() -> Iterator[None]:
    """Inside, modes of files bind this thread, and those that it starts, although it may be root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_CAPABILITY_VERSION_3, 0), (_Data * 2)()

    def call(function: str) -> None:
        if getattr(libc, function)(ctypes.byref(header), data):
            raise OSError(ctypes.get_errno(), function)

    call("capget")
    before = data[0].effective
    data[0].effective = before & ~_IGNORES_MODES
    call("capset")
    try:
        yield
    finally:
        data[0].effective = before
        call("capset")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond `size` bytes: the write that would ends there, the next one fails.
    It is how a disk fills up, for one file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def forbidden(path: Path) -> None:
    """Nobody may read, list or write it."""
    path.chmod(0)


def read_only(path: Path) -> None:
    """It can be read, and nothing in it made or changed."""
    path.chmod(0o555 if path.is_dir() else 0o444)


def not_entered(path: Path) -> None:
    """A folder whose names can be read, and nothing else."""
    path.chmod(0o600)


def a_folder(path: Path) -> None:
    """A folder, that holds something, of that name."""
    remove(path)
    (path / "inside").mkdir(parents=True)


def a_file(path: Path) -> None:
    """A file of that name, in place of a folder."""
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way\n")


def broken_link(path: Path) -> None:
    """A link to nothing."""
    remove(path)
    path.symlink_to("/nonexistent/target")


def link_loop(path: Path) -> None:
    """Two links that lead to each other."""
    remove(path)
    other = path.with_name(f"{path.name}-other")
    remove(other)
    path.symlink_to(other)
    other.symlink_to(path)


def foreign(path: Path) -> None:
    """It belongs to another user, who keeps it private."""
    path.chmod(0o700 if path.is_dir() else 0o600)
    os.chown(path, 65534, 65534)


def a_pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    remove(path)
    os.mkfifo(path)
