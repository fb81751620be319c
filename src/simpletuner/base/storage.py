"""One interface to trees of files: a folder on this machine, or a URL that fsspec supports."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from simpletuner.base.files import file_errors_reported, write_atomic

Stamp = tuple[int | str, ...]
"""Fingerprint of a file from its listing: size in bytes, then times or a hash. An equal stamp means equal content."""

NO_FILE = "not a regular file"
"""Reason of an `UnlistedFile` whose read might block or never end."""
SKIPPED_FOLDER = "skipped, with everything in it"
"""Detail of an `UnlistedFile` that is a folder which was not entered."""

FSSPEC_STAMPS = ("ETag", "etag", "LastModified", "mtime", "created")
"""Keys of a stamp's parts in the listings of fsspec's file systems."""


class StoredFile(NamedTuple):
    """A file in a storage, as `list` and `stat` return it."""

    name: str
    """Path relative to the storage, with forward slashes."""
    size: int
    """Bytes."""
    stamp: Stamp
    changed_at: float
    """Time of the last change in seconds since the epoch; 0 if the stamp is a hash of the content."""


class UnlistedFile(NamedTuple):
    """A file or folder that `Storage.list` cannot read or does not enter."""

    name: str
    reason: str
    """Category of the problem, such as "broken link"."""
    detail: str


SkipReason = Callable[[Collection[str]], str | None]
"""Takes the names in a folder; returns why the folder is not entered, or None to enter it."""


def enter_all(_names: Collection[str]) -> str | None:
    """Enter every folder."""
    return None


@runtime_checkable  # the tests check signatures as they run
class Storage(Protocol):
    """A tree of files. Names are relative paths with forward slashes. Storages of the same folder or URL are equal."""

    def list(self, prefix: str = "", *, skip_reason: SkipReason = enter_all) -> Iterator[StoredFile | UnlistedFile]:
        """Yield every file below the folder `prefix`, one folder at a time.

        Hidden files and folders, whose names start with a dot, are left out. A folder for which `skip_reason` returns a
        reason becomes an `UnlistedFile`, even `prefix` itself; so does each pipe, socket and device.

        Raises:
            FileNotFoundError, NotADirectoryError: `prefix` is not a folder; raised by the call, not by the iteration.
        """
        ...

    def stat(self, name: str) -> StoredFile:
        """Size and stamp of a file, as `list` yields them.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read a file, or `length` bytes from `start`; fewer if the file ends before.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: the file cannot be read, or is a pipe, a socket or a device, which might never end.
        """
        ...

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        """Write a file atomically: it has either its old content or all of `data`. Creates missing folders.

        `sync=False` does not wait until the data is on the disk.

        Raises:
            DiskError: no space, no quota, or a read-only disk.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file; do nothing if it does not exist.

        Raises:
            DiskError: not permitted, or a read-only disk.
        """
        ...

    def local_path(self, name: str = "") -> Path | None:
        """The path of `name` on this machine; None if it has none."""
        ...

    def text(self, name: str = "") -> str:
        """The full path or URL of `name`, for messages."""
        ...


def storage_of(text: str) -> Storage:
    """The storage at `text`: a URL such as `memory://images`, or a path on this machine."""
    return FsspecStorage(text) if "://" in text else LocalStorage(Path(text))


@dataclass(frozen=True)
class LocalStorage:
    """The files of a folder on this machine."""

    folder: Path

    def list(self, prefix: str = "", *, skip_reason: SkipReason = enter_all) -> Iterator[StoredFile | UnlistedFile]:
        """`Storage.list`, following links.

        Links to folders and files are followed after all others, each target once: a link to something already listed
        becomes an `UnlistedFile`, so loops end. Folders that cannot be entered and files whose name is not UTF-8 become
        `UnlistedFile`s, too.
        """
        folder = self.folder / prefix
        if not folder.is_dir():
            raise _no_folder(str(folder), folder.exists())
        return self._walk(prefix, skip_reason)

    def _walk(self, prefix: str, skip_reason: SkipReason) -> Iterator[StoredFile | UnlistedFile]:
        visited = {_identity((self.folder / prefix).stat())}
        folders, links = deque([prefix]), deque[str]()
        while folders or links:
            name = folders.popleft() if folders else links.popleft()
            path = self.folder / name
            try:
                is_link, status = name != prefix and path.is_symlink(), path.stat()
            except OSError as error:  # a broken link, or a loop of links
                yield UnlistedFile(name, "broken link", str(error.strerror))
                continue
            if is_link:
                if _identity(status) in visited:
                    yield UnlistedFile(name, "link followed already", f"it leads to {path.resolve()}")
                    continue
                visited.add(_identity(status))
            if not stat.S_ISDIR(status.st_mode):
                yield _local_file(name, status)
                continue
            try:
                entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError as error:
                yield UnlistedFile(name, "unreadable folder", str(error.strerror))
                continue
            reason = skip_reason([entry.name for entry in entries])
            if reason is not None:
                yield UnlistedFile(name, reason, SKIPPED_FOLDER)
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                entry_name = f"{name}/{entry.name}" if name else entry.name
                if not is_utf8_name(entry_name):
                    printable = os.fsencode(entry_name).decode(errors="replace")
                    yield UnlistedFile(printable, "name is not UTF-8", "rename the file")
                    continue
                if entry.is_symlink():
                    links.append(entry_name)
                    continue
                try:
                    status = entry.stat()
                except OSError as error:  # deleted meanwhile, or the folder may be listed but not entered
                    yield UnlistedFile(entry_name, "unreadable", str(error.strerror))
                    continue
                visited.add(_identity(status))
                if entry.is_dir():
                    folders.append(entry_name)
                else:
                    yield _local_file(entry_name, status)

    def stat(self, name: str) -> StoredFile:
        return _stored_file(name, (self.folder / name).stat())

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`Storage.read`. If the file grows meanwhile, only the bytes that it had when it was opened."""
        path = self.folder / name
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # do not wait for a pipe's other end
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENODEV, "neither a file nor a link to one", str(path))
            if start:
                os.lseek(descriptor, start, os.SEEK_SET)
            available = status.st_size - start
            remaining = available if length is None else min(available, length)
            pieces = []
            while remaining > 0 and (piece := os.read(descriptor, remaining)):
                pieces.append(piece)
                remaining -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        write_atomic(self.folder / name, data, sync=sync)

    def remove(self, name: str) -> None:
        path = self.folder / name
        with file_errors_reported(path, doing="remove"):
            path.unlink(missing_ok=True)

    def local_path(self, name: str = "") -> Path:
        return self.folder / name

    def text(self, name: str = "") -> str:
        return str(self.folder / name)


@dataclass(frozen=True)
class FsspecStorage:
    """The files below a URL that fsspec supports.

    A write is as atomic as the file system's uploads; object stores replace objects as a whole."""

    url: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # imported here, since most runs do not need it

        filesystem, root = url_to_fs(self.url)
        return filesystem, root

    @property
    def _filesystem(self) -> Any:
        return self._opened[0]

    def _path(self, name: str) -> str:
        root = self._opened[1]
        return f"{root}/{name}" if name else root

    def list(self, prefix: str = "", *, skip_reason: SkipReason = enter_all) -> Iterator[StoredFile | UnlistedFile]:
        path = self._path(prefix)
        if not self._filesystem.isdir(path):
            raise _no_folder(self.text(prefix), self._filesystem.exists(path))
        return self._walk(prefix, skip_reason)

    def _walk(self, prefix: str, skip_reason: SkipReason) -> Iterator[StoredFile | UnlistedFile]:
        folders = deque([prefix])
        while folders:
            folder = folders.popleft()
            try:
                infos = self._filesystem.ls(self._path(folder), detail=True)
            except OSError as error:
                yield UnlistedFile(folder, "unreadable folder", str(error.strerror))
                continue
            entry_names = [info["name"].rstrip("/").rpartition("/")[2] for info in infos]
            reason = skip_reason(entry_names)
            if reason is not None:
                yield UnlistedFile(folder, reason, SKIPPED_FOLDER)
                continue
            for entry_name, info in sorted(zip(entry_names, infos, strict=True), key=lambda pair: pair[0]):
                if entry_name.startswith("."):
                    continue
                name = f"{folder}/{entry_name}" if folder else entry_name
                if info["type"] == "directory":
                    folders.append(name)
                elif info["type"] == "file" or self._filesystem.isfile(self._path(name)):  # a link to a file
                    yield _fsspec_file(name, info)
                else:
                    yield UnlistedFile(name, NO_FILE, "a link to a folder, a pipe or a device")

    def stat(self, name: str) -> StoredFile:
        return _fsspec_file(name, self._filesystem.info(self._path(name)))

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        end = None if length is None else start + length
        return bytes(self._filesystem.cat_file(self._path(name), start=start or None, end=end))

    def write(self, name: str, data: bytes, *, sync: bool = True) -> None:
        path = self.local_path(name)
        if path is None:
            self._filesystem.pipe_file(self._path(name), data)
        else:
            write_atomic(path, data, sync=sync)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def local_path(self, name: str = "") -> Path | None:
        from fsspec.implementations.local import LocalFileSystem

        return Path(self._path(name)) if isinstance(self._filesystem, LocalFileSystem) else None

    def text(self, name: str = "") -> str:
        return f"{self.url.rstrip('/')}/{name}" if name else self.url


def _no_folder(folder_text: str, exists: bool) -> OSError:
    code = errno.ENOTDIR if exists else errno.ENOENT
    return OSError(code, os.strerror(code), folder_text)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_utf8_name(name: str) -> bool:
    """Whether a file's name can be stored as UTF-8 and used to open the file again."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _local_file(name: str, status: os.stat_result) -> StoredFile | UnlistedFile:
    if not stat.S_ISREG(status.st_mode):
        return UnlistedFile(name, NO_FILE, _kind(status.st_mode))
    return _stored_file(name, status)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _stored_file(name: str, status: os.stat_result) -> StoredFile:
    """The stamp includes the status change time too, since programs can set the modification time."""
    modified_ns, changed_ns = status.st_mtime_ns, status.st_ctime_ns
    stamp = (status.st_size, modified_ns, changed_ns)
    return StoredFile(name, status.st_size, stamp, max(modified_ns, changed_ns) / 1e9)


def _fsspec_file(name: str, info: dict[str, Any]) -> StoredFile:
    values = [info[key] for key in FSSPEC_STAMPS if key in info]
    marks = [value.timestamp() if isinstance(value, datetime) else value for value in values]
    times = [mark for mark in marks if not isinstance(mark, str)]
    return StoredFile(name, info["size"], (info["size"], *map(str, marks)), max(times, default=0.0))
