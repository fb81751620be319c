"""List images and their caption files and partner files, by name, without reading them."""

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.storage import LocalStorage, Stamp, StoredFile

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga", ".ppm", ".pgm", ".pnm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files; the first that exists is read."""

NUMBERED_KEY = re.compile(r"(.+)\.([0-9]{1,9})", re.DOTALL)
"""Key of one of several references of an image: the image's key, a dot and a number."""
UNNUMBERED = -1
"""Number of a partner with the same key as the image."""

SIMPLETUNER_FOLDER = ".simpletuner"
"""Hidden folder in a folder of images, for deleted images and the captions before the last change."""
UNDO_FILE = "captions.json"
TRASH_FOLDER = "trash"
"""Folder in `SIMPLETUNER_FOLDER` with one numbered folder per deletion."""


def caption_key(name: str) -> str:
    """The key that an image shares with its caption: the name without suffix, in Unicode's form NFC.

    Systems compose accents differently when they store names; NFC makes such names equal."""
    return unicodedata.normalize("NFC", name[: len(name) - len(_suffix(name))])


def find_partners(
    names: Collection[str], files: Iterable[str], *, is_numbered: bool
) -> dict[str, list[tuple[int, str]]]:
    """Find the partners of the images `names` among `files`: sorted (number, name) pairs by `caption_key`.

    The partner of `a/cat.jpg` is `a/cat.png`, with any suffix. With `is_numbered`, `a/cat.1.png` and `a/cat.2.png` are
    partners too, in the order of their numbers, unless there is an image `a/cat.1.jpg`.
    """
    keys = {caption_key(name) for name in names}
    partners: dict[str, list[tuple[int, str]]] = {}
    for name in files:
        key = caption_key(name)
        numbered = NUMBERED_KEY.fullmatch(key)
        if key in keys:
            partners.setdefault(key, []).append((UNNUMBERED, name))
        elif is_numbered and numbered is not None and numbered[1] in keys:
            partners.setdefault(numbered[1], []).append((int(numbered[2]), name))
    return {key: sorted(pairs) for key, pairs in partners.items()}


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder. Names are paths relative to it, with forward slashes."""

    images: dict[str, Stamp]
    """Stamps of the images by name, sorted by name."""
    captions: dict[str, tuple[StoredFile, ...]]
    """Caption files by `caption_key`; the first file of a key is read."""

    def caption_of(self, name: str) -> StoredFile | None:
        """The caption file that is read for an image; None if it has none."""
        files = self.captions.get(caption_key(name))
        return files[0] if files else None


def list_images(folder: Path) -> ImageFolder:
    """All images and caption files below `folder`. Hidden files and folders are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: `folder` is not a folder.
    """
    images: dict[str, Stamp] = {}
    captions: dict[str, tuple[StoredFile, ...]] = {}
    for file in LocalStorage(folder).list():
        if not isinstance(file, StoredFile):
            continue
        suffix = _suffix(file.name)
        if suffix in IMAGE_SUFFIXES:
            images[file.name] = file.stamp
        elif suffix in CAPTION_SUFFIXES:
            key = caption_key(file.name)
            others = captions.get(key, ())
            captions[key] = (file, *others) if suffix == CAPTION_SUFFIXES[0] else (*others, file)
    return ImageFolder(dict(sorted(images.items())), captions)


def trashed_files(folder: Path) -> int:
    """Number of files in the trash of a folder of images, of all deletions."""
    trash = folder / SIMPLETUNER_FOLDER / TRASH_FOLDER
    return sum(each.is_symlink() or not each.is_dir() for each in trash.rglob("*"))


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if name.rfind("/") + 1 < dot < len(name) - 1 else ""
