"""The images of a folder and the caption files beside them, by name, without reading any of them."""

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.storage import LocalStorage, Stamp, StoredFile

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga", ".ppm", ".pgm", ".pnm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")
"""The first that is there is read."""

NUMBERED_KEY = re.compile(r"(.+)\.([0-9]{1,9})", re.DOTALL)
"""The key of one of several references of an image: the image's, a dot and a number."""
UNNUMBERED = -1
"""The number of a partner whose key is the image's."""

OWN_FOLDER = ".simpletuner"
"""Hidden, in a folder of images: what was deleted there, and the captions before the last change."""
UNDO_FILE = "captions.json"
TRASH_FOLDER = "trash"
"""In it a numbered folder for each deletion."""


def caption_key(name: str) -> str:
    """What a picture and its caption have in common: the name without suffix. Systems that compose accents
    differently mean the same name."""
    return unicodedata.normalize("NFC", name[: len(name) - len(_suffix(name))])


def find_partners(
    names: Collection[str], files: Iterable[str], *, is_numbered: bool
) -> dict[str, list[tuple[int, str]]]:
    """Which of `files` belong to which of the images `names`: by the `caption_key` of an image that has partners, their
    numbers and names, sorted.

    The partner of `a/cat.jpg` is `a/cat.png`, whatever its suffix. With `is_numbered`, `a/cat.1.png` and `a/cat.2.png`
    are partners too, in the order of their numbers, unless there is an image `a/cat.1.jpg`.
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
    return {key: sorted(found) for key, found in partners.items()}


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder. Names are paths relative to it, with forward slashes."""

    images: dict[str, Stamp]
    """Sorted by name."""
    captions: dict[str, tuple[StoredFile, ...]]
    """The caption files by `caption_key`; the first of each is the one that is read."""

    def caption_of(self, name: str) -> StoredFile | None:
        """The caption file that is read for an image; None where there is none."""
        files = self.captions.get(caption_key(name))
        return files[0] if files else None


def list_images(folder: Path) -> ImageFolder:
    """All images and caption files below `folder`. Hidden files and folders are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: it is no folder.
    """
    images: dict[str, Stamp] = {}
    captions: dict[str, tuple[StoredFile, ...]] = {}
    for file in LocalStorage(folder).list():
        if not isinstance(file, StoredFile):
            continue
        suffix = _suffix(file.name)
        if suffix in PICTURE_SUFFIXES:
            images[file.name] = file.stamp
        elif suffix in CAPTION_SUFFIXES:
            key = caption_key(file.name)
            others = captions.get(key, ())
            captions[key] = (file, *others) if suffix == CAPTION_SUFFIXES[0] else (*others, file)
    return ImageFolder(dict(sorted(images.items())), captions)


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if name.rfind("/") + 1 < dot < len(name) - 1 else ""
