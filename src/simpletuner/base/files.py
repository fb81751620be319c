"""Atomic writes, hashes, messages about file errors, and a lock file that names its holder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from simpletuner.base.errors import CheckpointError, ConfigError, DiskError, Problem, UserError
from simpletuner.base.parts import locked_part

WRONG_FILE_TYPE = frozenset({errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO, errno.ENODEV})
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DISK = NO_SPACE | {errno.EROFS, errno.EIO, errno.ESTALE}
"""Errors of the disk itself. Whatever the access, they raise a `DiskError`."""
PERMISSION = frozenset({errno.EACCES, errno.EPERM})
FILE_FAULTS = (
    DISK
    | PERMISSION
    | WRONG_FILE_TYPE
    | {errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.EBUSY}
    | {errno.EXDEV, errno.EMLINK, errno.EINVAL}
)
"""Errors that are due to the user's files or file system, not to a bug in this program."""


def file_problem(error: OSError, path: Path | None = None, *, doing: str = "access") -> Problem | None:
    """The problem and remedy of a failed file access; None if `error` is not in `FILE_FAULTS`.

    The message names the file of the error, or `path` if the error has none; `doing` is the verb: write, read, list.
    """
    if error.errno not in FILE_FAULTS:
        return None
    # For a rename, name the target.
    error_file = error.filename2 or error.filename
    file_text = os.fsdecode(error_file) if isinstance(error_file, str | bytes | os.PathLike) else "a file"
    if path is not None and (error_file is None or _is_temporary(Path(file_text), path)):
        file_text = str(path)
    if error.errno in NO_SPACE:
        remedy = (
            "Free some space or set the option to another disk, then run the same command again: finished work is kept."
        )
    elif error.errno in PERMISSION:
        remedy = f"Give the user who runs this command permission to {doing} it, or name another path."
    elif error.errno in WRONG_FILE_TYPE:
        remedy = "Move away the file or folder there, or name another path."
    else:
        remedy = "Correct the path or make it accessible, then run the same command again."
    return Problem(f"cannot {doing} {file_text}: {os.strerror(error.errno)}", remedy=remedy)


def _is_temporary(name: Path, path: Path) -> bool:
    """Whether `name` is the hidden temporary file beside `path` that is renamed to `path` when complete."""
    return name.parent == path.parent and name.name.startswith(".") and path.name in name.name


@contextlib.contextmanager
def file_errors_reported(path: Path, stage: type[UserError] = DiskError, *, doing: str = "write") -> Iterator[None]:
    """Turn file errors inside this context into a `UserError` about `path`, of the class `stage`.

    Raises:
        DiskError: no space, no quota, a read-only or failing disk.
        UserError: of the class `stage`: not permitted, no such file, a folder instead of a file.
    """
    try:
        yield
    except OSError as error:
        problem = file_problem(error, path, doing=doing)
        if problem is None:
            raise
        raise (DiskError if error.errno in DISK else stage)(problem) from error


def with_home(text: str) -> str:
    """`text` with a leading `~` or `~user` replaced by the home folder; a `~` that names no user stays.

    Raises:
        ConfigError: `text` begins with `~/`, and this user's home folder is unknown.
    """
    path = os.path.expanduser(text)
    if path == "~" or path.startswith("~/"):
        raise ConfigError.of(f"{text}: no home folder is known", remedy="Set HOME, or write the path without ~.")
    return path


def sync_directory(folder: Path) -> None:
    """Sync `folder` to disk, so that renames inside it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """Write `data` so that `path` has either its old content or all of the new.

    `sync=False` does not wait until the data is on the disk; use it for caches, which are verified when read.

    Raises:
        DiskError: the file cannot be written: no space, no permission, or a folder of that name.
    """
    with file_errors_reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_part(path) as part:
            with part.open("wb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        if sync:
            sync_directory(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if that is not possible. Replaces an existing `target`.

    Raises:
        DiskError: no space for a copy.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with file_errors_reported(target):
        try:
            try:
                os.link(source, part)
            except OSError:
                shutil.copyfile(source, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON, in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """The JSON value in `path` (UTF-8, a byte-order mark is ignored)."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def open_regular_file(path: Path) -> BinaryIO:
    """Open the regular file at `path` for reading. A symbolic link is not followed.

    Raises:
        OSError: the file is missing, or is a link, a pipe or a folder.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    return os.fdopen(handle, "rb")


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of `value` as canonical JSON: key order does not matter."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


class DirectoryLock:
    """A lock on the file `path`, which contains the holder's pid. The system releases it when the process ends."""

    TRIES, EVERY_S = 10, 0.02
    """`take` retries, because `is_held` in another process holds the lock for an instant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def take(self) -> int:
        """Take the lock and return a handle. All processes that inherit the handle must close it to release the lock.

        Raises:
            CheckpointError: another process holds the lock.
            DiskError: the file cannot be created.
        """
        with file_errors_reported(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        for retries in reversed(range(self.TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if retries:
                    time.sleep(self.EVERY_S)
                    continue
                holder = os.read(file, 64).decode(errors="replace").strip() or "unknown"
                os.close(file)
                raise CheckpointError.of(
                    f"{self.path.parent} is in use by process {holder}",
                    remedy="Wait for it, stop it, or give this run another --output_dir.",
                ) from None
        return file

    def name_holder(self, file: int, pid: int | None) -> None:
        """Write the holder's pid into the file that `take` opened; None empties the file."""
        with file_errors_reported(self.path):
            os.ftruncate(file, 0)
            os.pwrite(file, b"" if pid is None else f"{pid}\n".encode(), 0)

    def __enter__(self) -> Self:
        self._file = self.take()
        self.name_holder(self._file, os.getpid())
        return self

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)

    def is_held(self) -> bool:
        """Whether any process, including this one, holds the lock now. Pids are not used: they may have been reused."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def pid(self) -> int | None:
        """The pid in the file; that of the holder if the lock `is_held`."""
        try:
            text = self.path.read_text(encoding="ascii", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(text) if text.isdecimal() else None
