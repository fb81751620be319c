"""Which files a storage holds, sorted into pictures, captions and the rest."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from simpletuner.base.errors import DataError
from simpletuner.base.storage import Stamp, Storage, UnlistedFile
from simpletuner.data.sample import Rejection

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga", ".ppm", ".pgm", ".pnm"}
)
CAPTION_SUFFIX = ".txt"


@dataclass(frozen=True)
class FoundFiles:
    """The files of an image set, by name."""

    pictures: dict[str, Stamp]
    """Sorted by name."""
    captions: dict[str, str]
    """Text files by `caption_key`."""
    rejections: tuple[Rejection, ...]


def caption_key(name: str) -> str:
    """What a picture and its caption have in common: the name without suffix. Systems that compose accents
    differently mean the same name."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def discover(images: Storage) -> FoundFiles:
    """All files of a storage, subfolders included.

    Hidden files and folders (a leading dot: `.DS_Store`, `._x.jpg`, `.git`) are passed over in silence, and
    text files are captions; every other file that is not a picture is rejected by name, as is what the storage
    cannot list.

    Raises:
        DataError: no such folder.
    """
    try:
        files = images.list()
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        raise DataError.of(
            f"instance_data_dir = {images.shown()!r}: {reason}",
            "a folder of pictures",
            f"Relative paths are against {Path.cwd()}: correct the path or make it.",
        ) from error
    pictures: dict[str, Stamp] = {}
    captions: dict[str, str] = {}
    rejections: list[Rejection] = []
    for file in files:
        if isinstance(file, UnlistedFile):
            rejections.append(Rejection(file.name, file.reason, file.detail))
            continue
        suffix = PurePosixPath(file.name).suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            pictures[file.name] = file.stamp
        elif suffix == CAPTION_SUFFIX:
            captions.setdefault(caption_key(file.name), file.name)
        else:
            rejections.append(Rejection(file.name, "not an image", f"{suffix or 'no suffix'} is not a picture's"))
    return FoundFiles(dict(sorted(pictures.items())), captions, tuple(rejections))
