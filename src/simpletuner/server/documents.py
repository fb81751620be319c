"""Text files that people also edit by hand: a write must name the revision that it replaces."""

import asyncio
import contextlib
import glob
import stat
from collections.abc import Iterator
from pathlib import Path

from simpletuner.base.files import file_errors_reported, sha256_bytes, write_atomic
from simpletuner.base.parts import folder_locked, remove_abandoned_parts
from simpletuner.server.faults import Fault

LARGEST_DOCUMENT = 1_000_000
"""Most bytes of a config, a dataset list, a prompt library or a caption."""


def read_text(path: Path) -> tuple[str | None, str]:
    """Return a document's text and revision; (None, "") if the file does not exist.

    Raises:
        Fault: 422, it is too large, not a regular file, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise Fault.of(422, f"{path.name} is not a regular file")
        if status.st_size > LARGEST_DOCUMENT:
            raise Fault.of(
                422, f"{path.name} has {status.st_size:,} bytes", f"a document of at most {LARGEST_DOCUMENT:,}"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise Fault.of(422, f"{path.name} cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig"), sha256_bytes(data)
    except UnicodeDecodeError as error:
        raise Fault.of(
            422, f"{path.name}: byte {error.start} is not UTF-8", remedy="Save it as UTF-8 in an editor."
        ) from None


async def write_text(path: Path, text: str, revision: str, write_lock: asyncio.Lock) -> None:
    """Replace a document if it still has `revision`. A file lock makes other servers wait; the lock `write_lock` makes
    tasks of this server wait, so that at most one thread blocks on the file lock.

    Raises:
        Fault: 409, the document changed meanwhile; 413, the text is too large; 422, it cannot be encoded.
        DiskError: no space left.
    """
    data = encoded(text)
    async with write_lock:
        await asyncio.to_thread(_replace, path, data, revision)


def _replace(path: Path, data: bytes, revision: str) -> None:
    real = path.resolve()
    with permissions_are_reported(path), folder_locked(real):
        _, current_revision = read_text(path)
        if current_revision != revision:
            raise Fault.of(
                409,
                f"{path.name} was changed by someone else",
                remedy="Load it again, then repeat your change.",
            )
        remove_abandoned_parts(real.parent, f".{glob.escape(real.name)}.*.part")
        write_bytes(path, data)


def encoded(text: str) -> bytes:
    """Encode a document as UTF-8.

    Raises:
        Fault: 413, it is too large; 422, it holds an unpaired surrogate.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise Fault.of(422, "the document holds an unpaired surrogate", "text that UTF-8 can encode") from None
    if len(data) > LARGEST_DOCUMENT:
        raise Fault.of(413, f"the document has {len(data):,} bytes", f"at most {LARGEST_DOCUMENT:,}")
    return data


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file; a symbolic link is followed.

    Raises:
        Fault: 403, no permission; 422, a file of another kind is in the way.
        DiskError: no space left.
    """
    with permissions_are_reported(path):
        write_atomic(path.resolve(), data)


@contextlib.contextmanager
def permissions_are_reported(path: Path) -> Iterator[None]:
    """Turn the system's errors inside this block into faults about `path`.

    Raises:
        Fault: 403, no permission; 422, a file of another kind is in the way.
        DiskError: no space left, or a read-only disk.
    """
    with file_errors_reported(path):
        try:
            yield
        except PermissionError:
            raise Fault.of(403, f"{path.name}: the server has no permission to write it") from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise Fault.of(422, f"{path.name}: a file of another kind is in its place") from None
