"""The images of a folder as the page lists them, found by their captions too."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.base.imagefiles import OWN_FOLDER, TRASH_FOLDER, UNDO_FILE, ImageFolder, list_images
from simpletuner.base.storage import Stamp, StoredFile
from simpletuner.base.text import is_visible

FOLDERS_KEPT = 4
READ_AT_MOST = 64 * 1024
"""Bytes of a caption that are searched."""

CaptionTexts = dict[str, tuple[Stamp, str]]
"""The text of each caption file as it was at a stamp, with its case folded."""


@dataclass(frozen=True)
class ImageMatches:
    """What a folder holds, and which of its images were asked for."""

    total: int
    without_caption: frozenset[str]
    names: list[str]


@dataclass
class ImageLists:
    """Searches folders of images. The captions of the last few are kept, those that changed are read again."""

    _kept: OrderedDict[Path, CaptionTexts] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def search(
        self, folder: Path, *, holds: Callable[[Path], bool], only_missing: bool = False, text: str = ""
    ) -> ImageMatches:
        """The images of `folder`: with `only_missing` those without a caption, with `text` those in whose name or
        caption it stands, in whatever case. What a link leads to where `holds` is false is left out.

        Raises:
            FileNotFoundError, NotADirectoryError: it is no folder.
        """
        listed = held_images(folder, holds)
        captions = self._captions(folder, listed)
        by_name = {name: captions[file.name][1] if (file := listed.caption_of(name)) else "" for name in listed.images}
        missing = frozenset(name for name, caption in by_name.items() if not is_visible(caption))
        wanted = text.casefold()
        names = [
            name
            for name, caption in by_name.items()
            if (not only_missing or name in missing) and (wanted in caption or wanted in name.casefold())
        ]
        return ImageMatches(len(by_name), missing, names)

    def _captions(self, folder: Path, listed: ImageFolder) -> CaptionTexts:
        with self._lock:
            known = self._kept.get(folder, {})
        read = {}
        for file, *_ in listed.captions.values():
            there = known.get(file.name)
            read[file.name] = there if there and there[0] == file.stamp else (file.stamp, _text(folder, file))
        with self._lock:
            self._kept[folder] = read
            self._kept.move_to_end(folder)
            while len(self._kept) > FOLDERS_KEPT:
                self._kept.popitem(last=False)
        return read


def trashed(folder: Path) -> int:
    """How many files were deleted from a folder and can come back."""
    return sum(not path.is_dir() for path in (folder / OWN_FOLDER / TRASH_FOLDER).rglob("*"))


def can_undo(folder: Path) -> bool:
    """Whether the last change of captions in a folder can be taken back."""
    return (folder / OWN_FOLDER / UNDO_FILE).is_file()


def held_images(folder: Path, holds: Callable[[Path], bool]) -> ImageFolder:
    """The images below `folder`, without what a link leads to where `holds` is false.

    Raises:
        FileNotFoundError, NotADirectoryError: it is no folder.
    """
    listed = list_images(folder)
    files = (file for beside in listed.captions.values() for file in beside)
    parents = {name.rpartition("/")[0] for name in (*listed.images, *(file.name for file in files))}
    outside = {parent for parent in parents if not holds((folder / parent).resolve())}
    for parent in parents - outside:
        with os.scandir(folder / parent) as entries:
            links = [entry.name for entry in entries if entry.is_symlink()]
        outside |= {f"{parent}/{name}".lstrip("/") for name in links if not holds((folder / parent / name).resolve())}
    if not outside:
        return listed

    def is_held(name: str) -> bool:
        return name not in outside and name.rpartition("/")[0] not in outside

    captions = {key: tuple(file for file in beside if is_held(file.name)) for key, beside in listed.captions.items()}
    images = {name: stamp for name, stamp in listed.images.items() if is_held(name)}
    return ImageFolder(images, {key: beside for key, beside in captions.items() if beside})


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
