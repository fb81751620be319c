"""Which files a folder holds, sorted into pictures, captions and the rest."""

import os
import unicodedata
from collections import deque
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from simpletuner.base.errors import DataError
from simpletuner.data.sample import Rejection

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga", ".ppm", ".pgm", ".pnm"}
)
CAPTION_SUFFIX = ".txt"


@dataclass(frozen=True)
class Found:
    """The files of a folder. Names are paths relative to it, with forward slashes."""

    pictures: tuple[str, ...]
    """Sorted."""
    captions: dict[str, str]
    """Text files by `caption_key`."""
    rejections: tuple[Rejection, ...]


def caption_key(name: str) -> str:
    """What a picture and its caption have in common: the name without suffix. Systems that compose accents
    differently mean the same name."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def discover(folder: Path) -> Found:
    """All files below `folder`, subfolders included.

    Hidden files and folders (a leading dot: `.DS_Store`, `._x.jpg`, `.git`) are passed over in silence, and
    text files are captions; every other file that is not a picture is rejected by name. A link to a folder or
    file is followed once: one that leads to something already found is rejected, so a loop ends. Real entries
    go before links.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        found = f"instance_data_dir = {str(folder)!r}: " + ("not a folder" if folder.exists() else "no such folder")
        raise DataError.of(
            found,
            "a folder of pictures",
            f"Relative paths are against {Path.cwd()}: correct the path or make it.",
        )
    pictures: list[str] = []
    captions: dict[str, str] = {}
    rejections: list[Rejection] = []
    seen = {_identity(folder.stat())}
    folders, links = deque([""]), deque[str]()
    while folders or links:
        name = folders.popleft() if folders else links.popleft()
        path = folder / name
        try:
            is_link, status = path.is_symlink(), path.stat()
        except OSError as error:  # a broken link, or a loop of links
            rejections.append(Rejection(name, "broken link", str(error.strerror)))
            continue
        if is_link:
            if _identity(status) in seen:
                rejections.append(Rejection(name, "link followed already", f"it leads to {path.resolve()}"))
                continue
            seen.add(_identity(status))
        if not path.is_dir():
            _sort_file(name, pictures, captions, rejections)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            rejections.append(Rejection(name, "unreadable folder", str(error.strerror)))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            inner = f"{name}/{entry.name}" if name else entry.name
            if not _is_text(inner):
                shown = os.fsencode(inner).decode(errors="replace")
                rejections.append(Rejection(shown, "name is not UTF-8", "rename the file"))
            elif entry.is_symlink():
                links.append(inner)
            elif entry.is_dir():
                seen.add(_identity(entry.stat()))
                folders.append(inner)
            else:
                seen.add(_identity(entry.stat()))
                _sort_file(inner, pictures, captions, rejections)
    return Found(tuple(sorted(pictures)), captions, tuple(rejections))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sort_file(name: str, pictures: list[str], captions: dict[str, str], rejections: list[Rejection]) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        pictures.append(name)
    elif suffix == CAPTION_SUFFIX:
        captions.setdefault(caption_key(name), name)
    else:
        rejections.append(Rejection(name, "not an image", f"{suffix or 'no suffix'} is not a picture's"))
