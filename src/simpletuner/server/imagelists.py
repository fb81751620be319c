"""List and search the images of a folder by name and caption."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.base.imagefiles import SIMPLETUNER_FOLDER, UNDO_FILE, ImageFolder, list_images
from simpletuner.base.storage import Stamp, StoredFile
from simpletuner.base.text import is_visible

FOLDERS_KEPT = 4
READ_AT_MOST = 64 * 1024
"""Bytes from the start of a caption that a search reads."""

CaptionTexts = dict[str, tuple[Stamp, str]]
"""Case-folded text of each caption file, with the file's stamp when it was read."""


@dataclass(frozen=True)
class ImageMatches:
    """Counts of a folder's images, and those that match a search."""

    total: int
    without_caption: frozenset[str]
    names: list[str]


@dataclass
class ImageLists:
    """Searches image folders. Caches the captions of the last few; changed ones are read again."""

    _cache: OrderedDict[Path, CaptionTexts] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def search(
        self, folder: Path, *, is_allowed: Callable[[Path], bool], only_missing: bool = False, text: str = ""
    ) -> ImageMatches:
        """Return the images of `folder`: with `only_missing` those without a caption, with `text` those whose name or
        caption contains it, ignoring case. Leaves out links whose targets `is_allowed` rejects.

        Raises:
            FileNotFoundError, NotADirectoryError: `folder` is not a folder.
        """
        listed = allowed_images(folder, is_allowed)
        captions = self._captions(folder, listed)
        by_name = {name: captions[file.name][1] if (file := listed.caption_of(name)) else "" for name in listed.images}
        missing = frozenset(name for name, caption in by_name.items() if not is_visible(caption))
        needle = text.casefold()
        names = [
            name
            for name, caption in by_name.items()
            if (not only_missing or name in missing) and (needle in caption or needle in name.casefold())
        ]
        return ImageMatches(len(by_name), missing, names)

    def _captions(self, folder: Path, listed: ImageFolder) -> CaptionTexts:
        with self._lock:
            cached = self._cache.get(folder, {})
        texts = {}
        for file, *_ in listed.captions.values():
            entry = cached.get(file.name)
            texts[file.name] = entry if entry and entry[0] == file.stamp else (file.stamp, _text(folder, file))
        with self._lock:
            self._cache[folder] = texts
            self._cache.move_to_end(folder)
            while len(self._cache) > FOLDERS_KEPT:
                self._cache.popitem(last=False)
        return texts


def can_undo(folder: Path) -> bool:
    """Whether the last change of captions in a folder can be undone."""
    return (folder / SIMPLETUNER_FOLDER / UNDO_FILE).is_file()


def allowed_images(folder: Path, is_allowed: Callable[[Path], bool]) -> ImageFolder:
    """Return the images below `folder`, without links whose targets `is_allowed` rejects.

    Raises:
        FileNotFoundError, NotADirectoryError: `folder` is not a folder.
    """
    listed = list_images(folder)
    files = (file for group in listed.captions.values() for file in group)
    parents = {name.rpartition("/")[0] for name in (*listed.images, *(file.name for file in files))}
    outside = {parent for parent in parents if not is_allowed((folder / parent).resolve())}
    for parent in parents - outside:
        with os.scandir(folder / parent) as entries:
            links = [entry.name for entry in entries if entry.is_symlink()]
        outside |= {
            f"{parent}/{name}".lstrip("/") for name in links if not is_allowed((folder / parent / name).resolve())
        }
    if not outside:
        return listed

    def is_inside(name: str) -> bool:
        return name not in outside and name.rpartition("/")[0] not in outside

    captions = {key: tuple(file for file in group if is_inside(file.name)) for key, group in listed.captions.items()}
    images = {name: stamp for name, stamp in listed.images.items() if is_inside(name)}
    return ImageFolder(images, {key: group for key, group in captions.items() if group})


def _text(folder: Path, file: StoredFile) -> str:
    if file.size == 0:
        return ""
    try:
        with (folder / file.name).open("rb") as opened:
            data = opened.read(READ_AT_MOST)
    except OSError:
        return ""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return data.decode(encoding, errors="replace").casefold()
