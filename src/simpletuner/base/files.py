"""Files that are whole or absent: atomic writes, hashes, and a lock that names its holder."""

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

KIND_OF_FILE = frozenset({errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO, errno.ENODEV})
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DISK = NO_SPACE | {errno.EROFS, errno.EIO, errno.ESTALE}
"""The disk is at fault, whatever is done there: always a `DiskError`."""
PERMISSION = frozenset({errno.EACCES, errno.EPERM})
FILE_FAULTS = (
    DISK
    | PERMISSION
    | KIND_OF_FILE
    | {errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.EBUSY}
    | {errno.EXDEV, errno.EMLINK, errno.EINVAL}
)
"""What the user's file system answers, rather than a bug of ours."""


def file_problem(error: OSError, path: Path | None = None, *, doing: str = "access") -> Problem | None:
    """What a failed access to a file says: found and remedy. None if it is no answer of a file system.

    `path` is named where the error itself names no file; `doing` is the verb: write, read, list.
    """
    if error.errno not in FILE_FAULTS:
        return None
    # A rename is about its target.
    named = error.filename2 or error.filename
    place = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else "a file"
    if path is not None and (named is None or _is_temporary(Path(place), path)):
        place = str(path)
    if error.errno in NO_SPACE:
        remedy = (
            "Free some space or point the option to another disk, then run the same command again: what is finished "
            "is kept."
        )
    elif error.errno in PERMISSION:
        remedy = f"Give the user that runs this command the right to {doing} it, or name another path."
    elif error.errno in KIND_OF_FILE:
        remedy = "Move away what lies there, or name another path."
    else:
        remedy = "Correct the path or make it accessible, then run the same command again."
    return Problem(f"cannot {doing} {place}: {os.strerror(error.errno)}", remedy=remedy)


def _is_temporary(name: Path, path: Path) -> bool:
    """Whether `name` is a hidden one beside `path` under which that is built before it is renamed."""
    return name.parent == path.parent and name.name.startswith(".") and path.name in name.name


@contextlib.contextmanager
def file_errors_reported(path: Path, stage: type[UserError] = DiskError, *, doing: str = "write") -> Iterator[None]:
    """Turn what the file system answers below this block into the `UserError` of a stage, about `path`.

    Raises:
        DiskError: no space, no quota, a read-only or failing disk.
        UserError: of the class `stage`: not permitted, no such file, a folder where a file belongs.
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
        ConfigError: `text` begins with `~/`, and nothing says where this user's home is.
    """
    path = os.path.expanduser(text)
    if path == "~" or path.startswith("~/"):
        raise ConfigError.of(f"{text}: no home folder is known", remedy="Set HOME, or write the path without ~.")
    return path


def sync_directory(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """Write `data` so that `path` holds either its old content or all of the new.

    `sync=False` leaves the flush to the system: right for caches, which are verified when read.

    Raises:
        DiskError: the file cannot be written: no space, no permission, a folder of that name.
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
    """Make `target` the same file as `source`, or, where the disk has no hard links, a copy. Replaces what was there.

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


def open_unlinked(path: Path) -> BinaryIO:
    """The regular file at `path`, open for reading. A symbolic link in its place is not followed.

    Raises:
        OSError: a link, a pipe or a folder has that name, or nothing.
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
    """Holds `path` for this process; the file names the holder's pid. The system lets go when the process ends."""

    TRIES, EVERY_S = 10, 0.02
    """Whoever looks whether it is held (`is_held`) holds it for an instant: no reason to give up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def take(self) -> int:
        """A handle that holds it until it is closed, in every process that inherits it.

        Raises:
            CheckpointError: another process holds it.
            DiskError: the file cannot be made.
        """
        with file_errors_reported(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        for left in reversed(range(self.TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if left:
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
        """Write who holds it into the file that `take` opened; None empties it."""
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
        """Whether a process holds it now, this one included. Never by its pid: another may have that by now."""
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
        """The process that the file names; the holder, where it `is_held`."""
        try:
            text = self.path.read_text(encoding="ascii", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(text) if text.isdecimal() else None
