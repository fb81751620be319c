"""The images of a folder and the caption files beside them, by name, without reading any of them."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.storage import LocalStorage, Stamp, StoredFile

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".jxl", ".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".tga", ".ppm", ".pgm", ".pnm"}
)
CAPTION_SUFFIXES = (".txt", ".caption")
"""The first that is there is read."""

OWN_FOLDER = ".simpletuner"
"""Hidden, in a folder of images: what was deleted there, and the captions before the last change."""
UNDO_FILE = "captions.json"
TRASH_FOLDER = "trash"
"""In it a numbered folder for each deletion."""


def caption_key(name: str) -> str:
    """What a picture and its caption have in common: the name without suffix. Systems that compose accents
    differently mean the same name."""
    return unicodedata.normalize("NFC", name[: len(name) - len(_suffix(name))])


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
