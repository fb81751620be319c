"""What comes in from outside: names made safe, kinds told by content, archives unpacked within bounds."""

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
from simpletuner.base.parts import locked_part, sweep_parts
from simpletuner.base.sizes import GIB
from simpletuner.server.roots import Roots

MIB = 1024**2
LARGEST_FILE = 256 * MIB
LARGEST_ZIP = 4 * GIB
"""As it comes, and unpacked."""
LARGEST_TEXT = MIB
LARGEST_PIXELS = 150_000_000
MOST_ENTRIES = 10_000
MOST_PACKED = 100
"""How many times its own size a zip may hold; what compresses better is no pictures."""
ALWAYS_SMALL = MIB
"""Up to here a zip may hold whatever its own size is."""
LONGEST_NAME = 200
"""Bytes, which leaves room for what is written beside it."""

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
UPLOAD_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
"""What Pillow calls them, where it has been built with them."""
TEXT, ZIP = ".txt", ".zip"
TEXTS = frozenset({TEXT, ".caption"})

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
"""What reading a damaged or hostile zip raises."""

DAMAGED_PICTURE = (
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
"""What Pillow and its libraries raise for a damaged or hostile picture, besides its `DecompressionBombError`."""

_PARTS = f".{'[0-9a-f]' * 16}.*.part"
"""Names of uploads that are not yet whole."""
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")


class Refused(Exception):
    """A file that is not taken, and why."""


@dataclass
class Outcome:
    """What came of an upload."""

    saved: list[Path] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason."""


def check_name(name: str) -> None:
    """Whether `name` is one that a file or folder may get from outside.

    Raises:
        Refused: it leads elsewhere, hides, or is trouble on some system.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise Refused("the name is not text") from None
    if not name or name.isspace():
        raise Refused("it has no name")
    if length > LONGEST_NAME:
        raise Refused(f"the name is longer than {LONGEST_NAME} bytes")
    if "/" in name or "\\" in name:
        raise Refused("the name holds a slash")
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name) or _TURNS_TEXT.search(name):
        raise Refused("the name holds signs that cannot be seen")
    if name.startswith("."):
        raise Refused("hidden files are left out")
    if name.endswith((" ", ".")) or name.startswith(" "):
        raise Refused("the name begins or ends with a space or dot")
    if _RESERVED.fullmatch(name):
        raise Refused("some systems keep this name for a device")


def kind_of(name: str) -> str:
    """The suffix that says what `name` is taken for.

    Raises:
        Refused: neither a picture, a text nor a zip.
    """
    suffix = Path(name).suffix.lower()
    if suffix in PICTURES | TEXTS or suffix == ZIP:
        return suffix
    raise Refused("neither an image nor a caption file (.txt, .caption)")


def check_content(path: Path, suffix: str) -> None:
    """Whether the file holds what its name says.

    Raises:
        Refused: it does not.
    """
    if suffix in TEXTS:
        _check_text(path)
    elif suffix in PICTURES:
        _check_picture(path)


def known_formats() -> list[str]:
    """Those of `UPLOAD_FORMATS` that this machine's Pillow opens."""
    # An idle server does without Pillow.
    from PIL import Image

    Image.init()
    return [name for name in UPLOAD_FORMATS if name in Image.OPEN]


def _check_text(path: Path) -> None:
    if path.stat().st_size > LARGEST_TEXT:
        raise Refused(f"a text of more than {LARGEST_TEXT:,} bytes")
    data = path.read_bytes()
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"no UTF-8 text: byte {error.start}") from None
    if b"\0" in data:
        raise Refused("no text: it holds a zero byte")


def _check_picture(path: Path) -> None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and of sizes below our limit
            with Image.open(path, formats=known_formats()) as image:
                # Pillow's own limit is a global, which others in this process may have lifted.
                too_large = image.width * image.height > LARGEST_PIXELS
                if not too_large:
                    image.verify()
    except Image.DecompressionBombError:
        too_large = True
    except DAMAGED_PICTURE:
        raise Refused("no picture that can be read") from None
    if too_large:
        raise Refused("more pixels than a picture has")


def sweep_uploads(folder: Path, names: Iterable[str]) -> None:
    """Remove what a killed server left of uploads in a folder with files of these names."""
    if fnmatch.filter(names, _PARTS):
        sweep_parts(folder, _PARTS)


@contextlib.contextmanager
def part_beside(folder: Path) -> Iterator[Path]:
    """An empty file in `folder`, removed at the end. Those that a killed server left there are removed first."""
    sweep_parts(folder, _PARTS)
    with locked_part(folder / secrets.token_hex(8)) as path:
        yield path


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, which is made; removed at the end with all that is in it. Those that a killed server
    left there are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep_parts(folder, _PARTS)
    with locked_part(folder / secrets.token_hex(8), is_folder=True) as path:
        yield path


def name_part(part: Path, target: Path) -> None:
    """Give a whole file its name.

    Raises:
        Refused: there is a file of that name.
    """
    try:
        os.link(part, target)
    except FileExistsError:
        raise Refused("there is a file of this name") from None
    except OSError:  # a disk without hard links
        try:
            target.open("xb").close()
        except FileExistsError:
            raise Refused("there is a file of this name") from None
        os.replace(part, target)


def unpack(archive: Path, name: str, folder: Path, roots: Roots) -> Outcome:
    """Take the pictures and texts out of a zip into `folder`, its subfolders kept. An archive that breaks a bound is
    refused whole, and then, as after an error, nothing of it stays.

    Raises:
        DiskError: no space.
    """
    outcome = Outcome()
    made: list[Path] = []
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            _check_bounds(entries, archive.stat().st_size)
            for entry in entries:
                try:
                    outcome.saved.append(_take(opened, entry, folder, roots, made))
                except Refused as reason:
                    outcome.refused.append((_printable(entry.filename), str(reason)))
    except Refused as reason:
        outcome.refused.append((name, str(reason)))
    except UNREADABLE as error:
        _undo(outcome, made)
        return Outcome(refused=[(name, f"the zip cannot be read ({_printable(str(error))})")])
    except BaseException:
        _undo(outcome, made)
        raise
    return outcome


def _check_bounds(entries: list[zipfile.ZipInfo], packed: int) -> None:
    if len(entries) > MOST_ENTRIES:
        raise Refused(f"{len(entries):,} files: more than {MOST_ENTRIES:,}")
    size = sum(entry.file_size for entry in entries)
    if size > LARGEST_ZIP:
        raise Refused(f"unpacked it has {size:,} bytes: more than {LARGEST_ZIP:,}")
    if size > ALWAYS_SMALL and size > MOST_PACKED * packed:
        raise Refused(f"unpacked it is more than {MOST_PACKED} times as large")


def _take(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, roots: Roots, made: list[Path]) -> Path:
    """One entry of a zip, in its place."""
    if entry.flag_bits & 1:
        raise Refused("it is encrypted")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        raise Refused("a link or device, and no file")
    *folders, name = entry.filename.split("/")
    for word in (*folders, name):
        check_name(word)
    suffix = kind_of(name)
    if suffix == ZIP:
        raise Refused("a zip in a zip")
    if entry.file_size > LARGEST_FILE:
        raise Refused(f"more than {LARGEST_FILE:,} bytes")
    place_in = folder.joinpath(*folders).resolve()
    if not roots.holds(place_in):
        raise Refused("a link leads out of the folders of this page")
    with file_errors_reported(place_in):
        try:
            _make_folders(place_in, made)
        except (FileExistsError, NotADirectoryError):
            raise Refused("a file is in the place of its folder") from None
        with part_beside(place_in) as part:
            with opened.open(entry) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, MIB)
            check_content(part, suffix)
            name_part(part, place_in / name)
    return place_in / name


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir()
        made.append(path)


def _undo(outcome: Outcome, made: list[Path]) -> None:
    for path in outcome.saved:
        path.unlink(missing_ok=True)
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir()


def _printable(text: str) -> str:
    """A name from outside, for a message."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)[:LONGEST_NAME]
