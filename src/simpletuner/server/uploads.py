"""Uploads: check file names and contents, and unpack archives within limits."""

import contextlib
import fnmatch
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.base.files import file_errors_reported
from simpletuner.base.parts import locked_part, remove_abandoned_parts
from simpletuner.base.sizes import GIB
from simpletuner.server.roots import Roots

MIB = 1024**2
LARGEST_FILE = 256 * MIB
LARGEST_ZIP = 4 * GIB
"""Bytes; limits both the archive and its unpacked content."""
LARGEST_TEXT = MIB
LARGEST_PIXELS = 150_000_000
MOST_ENTRIES = 10_000
MOST_PACKED = 100
"""Highest compression ratio of a zip; images never compress better."""
ALWAYS_SMALL = MIB
"""Unpacked bytes up to which the ratio does not matter."""
LONGEST_NAME = 200
"""Bytes; leaves room for the suffixes of files derived from it."""

UPLOAD_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
UPLOAD_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
"""The same formats by Pillow's names; a given build of Pillow may lack some."""
TEXT, ZIP = ".txt", ".zip"
UPLOAD_TEXT_SUFFIXES = frozenset({TEXT, ".caption"})

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
"""Exceptions that reading a damaged or hostile zip raises."""

DAMAGED_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)
"""Exceptions that Pillow and its libraries raise for a damaged or hostile image, besides `DecompressionBombError`."""

_PARTS = f".{'[0-9a-f]' * 16}.*.part"
"""Glob for the temporary names of unfinished uploads."""
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")


class RefusedUpload(Exception):
    """An uploaded file is refused; the message says why."""


@dataclass
class UploadOutcome:
    """Files that an upload saved and refused."""

    saved: list[Path] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason."""


def check_name(name: str) -> None:
    """Check that `name` is safe for an uploaded file or a new folder.

    Raises:
        RefusedUpload: it leaves the folder, is hidden, or causes trouble on some system.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise RefusedUpload("the name is not text") from None
    if not name or name.isspace():
        raise RefusedUpload("the name is empty")
    if length > LONGEST_NAME:
        raise RefusedUpload(f"the name is longer than {LONGEST_NAME} bytes")
    if "/" in name or "\\" in name:
        raise RefusedUpload("the name contains a slash or backslash")
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name) or _BIDI_CONTROLS.search(name):
        raise RefusedUpload("the name contains invisible characters")
    if name.startswith("."):
        raise RefusedUpload("the name begins with a dot: hidden files are skipped")
    if name.endswith((" ", ".")) or name.startswith(" "):
        raise RefusedUpload("the name begins or ends with a space or dot")
    if _RESERVED.fullmatch(name):
        raise RefusedUpload("some systems reserve this name for a device")


def upload_suffix(name: str) -> str:
    """Return the suffix by which `name` counts as an image, a text or a zip.

    Raises:
        RefusedUpload: it is none of them.
    """
    suffix = Path(name).suffix.lower()
    if suffix in UPLOAD_IMAGE_SUFFIXES | UPLOAD_TEXT_SUFFIXES or suffix == ZIP:
        return suffix
    raise RefusedUpload("neither an image nor a caption file (.txt, .caption)")


def check_content(path: Path, suffix: str) -> None:
    """Check that the file's content matches its suffix.

    Raises:
        RefusedUpload: it does not.
    """
    if suffix in UPLOAD_TEXT_SUFFIXES:
        _check_text(path)
    elif suffix in UPLOAD_IMAGE_SUFFIXES:
        _check_picture(path)


def known_formats() -> list[str]:
    """Return those of `UPLOAD_FORMATS` that this installation's Pillow opens."""
    # Imported only when needed: Pillow is slow to import.
    from PIL import Image

    Image.init()
    return [name for name in UPLOAD_FORMATS if name in Image.OPEN]


def _check_text(path: Path) -> None:
    if path.stat().st_size > LARGEST_TEXT:
        raise RefusedUpload(f"a text of more than {LARGEST_TEXT:,} bytes")
    data = path.read_bytes()
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedUpload(f"not UTF-8 text: byte {error.start}") from None
    if b"\0" in data:
        raise RefusedUpload("not text: it contains a zero byte")


def _check_picture(path: Path) -> None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes below our limit
            with Image.open(path, formats=known_formats()) as image:
                # Pillow's own limit is a global that other code in this process may have lifted.
                too_large = image.width * image.height > LARGEST_PIXELS
                if not too_large:
                    image.verify()
    except Image.DecompressionBombError:
        too_large = True
    except DAMAGED_IMAGE_ERRORS:
        raise RefusedUpload("not a readable image") from None
    if too_large:
        raise RefusedUpload(f"more than {LARGEST_PIXELS:,} pixels")


def sweep_uploads(folder: Path, names: Iterable[str]) -> None:
    """Remove unfinished uploads that a killed server left in `folder`; `names` are its files."""
    if fnmatch.filter(names, _PARTS):
        remove_abandoned_parts(folder, _PARTS)


@contextlib.contextmanager
def part_beside(folder: Path) -> Iterator[Path]:
    """Create an empty file in `folder` and remove it on exit. Files that a killed server left are removed first."""
    remove_abandoned_parts(folder, _PARTS)
    with locked_part(folder / secrets.token_hex(8)) as path:
        yield path


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Create an empty folder in `folder`, created if missing, and remove it with its content on exit. Folders that a
    killed server left are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned_parts(folder, _PARTS)
    with locked_part(folder / secrets.token_hex(8), is_folder=True) as path:
        yield path


def finish_part(part: Path, target: Path) -> None:
    """Move a complete file to its final name without overwriting.

    Raises:
        RefusedUpload: a file with this name exists.
    """
    try:
        os.link(part, target)
    except FileExistsError:
        raise RefusedUpload("a file with this name exists") from None
    except OSError:  # a disk without hard links
        try:
            target.open("xb").close()
        except FileExistsError:
            raise RefusedUpload("a file with this name exists") from None
        os.replace(part, target)


def unpack(archive: Path, name: str, folder: Path, roots: Roots) -> UploadOutcome:
    """Extract images and texts of a zip into `folder`, with its subfolders. An archive beyond a limit is refused before
    any file is extracted; after an error, no extracted file stays.

    Raises:
        DiskError: no space left.
    """
    outcome = UploadOutcome()
    created_folders: list[Path] = []
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            _check_bounds(entries, archive.stat().st_size)
            for entry in entries:
                try:
                    outcome.saved.append(_extract(opened, entry, folder, roots, created_folders))
                except RefusedUpload as reason:
                    outcome.refused.append((_printable(entry.filename), str(reason)))
    except RefusedUpload as reason:
        outcome.refused.append((name, str(reason)))
    except UNREADABLE as error:
        _undo(outcome, created_folders)
        return UploadOutcome(refused=[(name, f"the zip cannot be read ({_printable(str(error))})")])
    except BaseException:
        _undo(outcome, created_folders)
        raise
    return outcome


def _check_bounds(entries: list[zipfile.ZipInfo], packed: int) -> None:
    if len(entries) > MOST_ENTRIES:
        raise RefusedUpload(f"{len(entries):,} files: more than {MOST_ENTRIES:,}")
    size = sum(entry.file_size for entry in entries)
    if size > LARGEST_ZIP:
        raise RefusedUpload(f"it unpacks to {size:,} bytes: more than {LARGEST_ZIP:,}")
    if size > ALWAYS_SMALL and size > MOST_PACKED * packed:
        raise RefusedUpload(f"it unpacks to more than {MOST_PACKED} times its size")


def _extract(
    opened: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, roots: Roots, created_folders: list[Path]
) -> Path:
    """Extract one entry of a zip and return its path."""
    if entry.flag_bits & 1:
        raise RefusedUpload("it is encrypted")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        raise RefusedUpload("it is a link or device, not a regular file")
    *folders, name = entry.filename.split("/")
    for component in (*folders, name):
        check_name(component)
    suffix = upload_suffix(name)
    if suffix == ZIP:
        raise RefusedUpload("it is a zip inside a zip")
    if entry.file_size > LARGEST_FILE:
        raise RefusedUpload(f"more than {LARGEST_FILE:,} bytes")
    target_folder = folder.joinpath(*folders).resolve()
    if not roots.contains(target_folder):
        raise RefusedUpload("a link leads outside the folders of this page")
    with file_errors_reported(target_folder):
        try:
            _make_folders(target_folder, created_folders)
        except (FileExistsError, NotADirectoryError):
            raise RefusedUpload("a file has the name of its folder") from None
        with part_beside(target_folder) as part:
            with opened.open(entry) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
            check_content(part, suffix)
            finish_part(part, target_folder / name)
    return target_folder / name


def _make_folders(folder: Path, created_folders: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir()
        created_folders.append(path)


def _undo(outcome: UploadOutcome, created_folders: list[Path]) -> None:
    for path in outcome.saved:
        path.unlink(missing_ok=True)
    for path in reversed(created_folders):
        with contextlib.suppress(OSError):
            path.rmdir()


def _printable(text: str) -> str:
    """Make text from an archive printable in a message: replace unprintable characters and limit the length."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)[:LONGEST_NAME]
