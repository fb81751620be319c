"""Text files that people edit too: read with a revision, written only over what that revision says."""

import asyncio
import contextlib
import glob
import stat
from collections.abc import Iterator
from pathlib import Path

from simpletuner.base.files import file_errors_reported, sha256_bytes, write_atomic
from simpletuner.base.parts import editing, sweep_parts
from simpletuner.server.faults import Fault

LARGEST_DOCUMENT = 1_000_000
"""Bytes of a config, a list of datasets or of prompts, a caption."""


def read_text(path: Path) -> tuple[str | None, str]:
    """A document's text and its revision; (None, "") where it is absent.

    Raises:
        Fault: 422, it is too large, no file or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise Fault.of(422, f"{path.name} is no file")
        if status.st_size > LARGEST_DOCUMENT:
            raise Fault.of(
                422, f"{path.name} has {status.st_size:,} bytes", f"at most {LARGEST_DOCUMENT:,} of a document"
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


async def write_text(path: Path, text: str, revision: str, writing: asyncio.Lock) -> None:
    """Replace a document that still is what `revision` says, whichever process edits it: other servers wait, and the
    tasks of this one for `writing`, so that one thread at most does.

    Raises:
        Fault: 409, it was changed meanwhile; 413, it is too large; 422, it is not text.
        DiskError: no space.
    """
    data = encoded(text)
    async with writing:
        await asyncio.to_thread(_replace, path, data, revision)


def _replace(path: Path, data: bytes, revision: str) -> None:
    real = path.resolve()
    with permissions_are_reported(path), editing(real):
        _, there = read_text(path)
        if there != revision:
            raise Fault.of(
                409,
                f"{path.name} was changed by someone else",
                remedy="Load it again, then make your change once more.",
            )
        sweep_parts(real.parent, f".{glob.escape(real.name)}.*.part")
        write_bytes(path, data)


def encoded(text: str) -> bytes:
    """A document's bytes.

    Raises:
        Fault: 413, too large; 422, half a surrogate pair, which is no text.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise Fault.of(422, "the document holds half a character", "text that UTF-8 can hold") from None
    if len(data) > LARGEST_DOCUMENT:
        raise Fault.of(413, f"the document has {len(data):,} bytes", f"at most {LARGEST_DOCUMENT:,}")
    return data


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file, or what a link at its place leads to.

    Raises:
        Fault: 403 or 422, the system refuses.
        DiskError: no space.
    """
    with permissions_are_reported(path):
        write_atomic(path.resolve(), data)


@contextlib.contextmanager
def permissions_are_reported(path: Path) -> Iterator[None]:
    """Turn what the system refuses below this block into a fault about `path`.

    Raises:
        Fault: 403 or 422.
        DiskError: no space, or a read-only disk.
    """
    with file_errors_reported(path):
        try:
            yield
        except PermissionError:
            raise Fault.of(403, f"{path.name}: the server may not write there") from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise Fault.of(422, f"{path.name}: a file of another kind is in its place") from None
