"""Batch edits of a folder's captions: plan the changes, apply them, undo them."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from simpletuner.base.errors import ConfigError, DataError
from simpletuner.base.files import file_errors_reported, sha256_bytes, sha256_json, write_atomic
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, UNDO_FILE, ImageFolder, caption_key
from simpletuner.base.parts import folder_locked
from simpletuner.base.text import is_visible
from simpletuner.data.ownfolder import check_names, inside, listed_images, own_folder
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Rejection

LARGEST_CAPTION_FILE = 1024 * 1024
"""In bytes; `data.captions` reads no larger file."""
CHANGED_SINCE = "changed since"
"""Reason for a file that another process changed between planning and writing."""
CLINGING = tuple(",.;:!?)")
"""No space is inserted before an appended text that begins with one of these."""


@dataclass(frozen=True)
class TextEdit:
    """An edit of each caption: find and replace, then prepend, then append."""

    find: str = ""
    replace: str = ""
    is_regex: bool = False
    prepend: str = ""
    append: str = ""
    is_whole: bool = False
    """Whether a file is one caption; otherwise each line with visible text is one."""

    def __post_init__(self) -> None:
        if self.find and self.is_regex:
            try:
                self._pattern.sub(self.replace, "")
            except (re.error, IndexError) as error:
                raise ConfigError.of(
                    f"--find = {self.find!r}, --replace = {self.replace!r}: not a regular expression and its "
                    f"replacement ({error})",
                    remedy=r"Leave out --regex to find the text literally, or put \ before special characters.",
                ) from None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.find if self.is_regex else re.escape(self.find), re.MULTILINE)

    @property
    def is_empty(self) -> bool:
        """Whether the edit changes nothing."""
        return not (self.find or self.prepend or self.append)

    def applied(self, text: str) -> str:
        """`text` after the edit. An empty text becomes the prepended and the appended text."""
        if self.find:
            text = self._pattern.sub(self.replace if self.is_regex else lambda _: self.replace, text)
        if not (self.prepend or self.append):
            return text
        if self.is_whole or not is_visible(text):
            stripped = text.strip()
            return self._joined(stripped) + text[len(text.rstrip()) :] if stripped else self._joined("")
        lines = text.splitlines(keepends=True)
        return "".join(self._line(line) for line in lines)

    def _line(self, line: str) -> str:
        content = line.strip()
        return self._joined(content) + line[len(line.rstrip()) :] if is_visible(content) else line

    def _joined(self, text: str) -> str:
        for added, is_first in ((self.prepend, True), (self.append, False)):
            if not added:
                continue
            first, second = (added, text) if is_first else (text, added)
            needs_space = first and second and not (first[-1].isspace() or second[0].isspace())
            clings = not is_first and added.startswith(CLINGING)
            text = f"{first}{' ' if needs_space and not clings else ''}{second}"
        return text


@dataclass(frozen=True)
class CaptionChange:
    """One caption file, its current bytes and its new bytes."""

    file: str
    images: tuple[str, ...]
    before: bytes | None
    """None if the file does not exist yet."""
    after: bytes

    @property
    def text_before(self) -> str:
        """`before` as text for display."""
        return (self.before or b"").decode(errors="replace")


@dataclass(frozen=True)
class CaptionPlan:
    """The changes that an edit will make."""

    folder: Path
    images: int
    """Number of images whose captions are to be edited."""
    changes: tuple[CaptionChange, ...]
    left_out: tuple[Rejection, ...]
    """Captions that cannot be changed."""

    @property
    def emptied(self) -> int:
        """Number of captions without visible text after the edit."""
        return sum(not is_visible(change.after.decode()) for change in self.changes)

    @property
    def revision(self) -> str:
        """Hash of the file names and of all bytes that would be replaced or written."""
        return sha256_json([(c.file, c.before and sha256_bytes(c.before), sha256_bytes(c.after)) for c in self.changes])


def without_caption(folder: Path, listed: ImageFolder) -> list[str]:
    """The images that have no caption file, or one without visible text."""
    return [name for name in listed.images if not _has_visible_text(folder, listed, name)]


def plan_caption_edit(folder: Path, edit: TextEdit, names: Collection[str] | None = None) -> CaptionPlan:
    """Plan `edit` for the captions of the images `names`, by default of all images.

    Raises:
        DataError: no such folder or image.
    """
    listed = listed_images(folder)
    chosen = list(listed.images) if names is None else sorted(set(names))
    check_names(folder, listed, chosen)
    by_key: dict[str, list[str]] = {}
    for name in chosen:
        by_key.setdefault(caption_key(name), []).append(name)
    changes: list[CaptionChange] = []
    left_out: list[Rejection] = []
    for images in by_key.values():
        caption_file = listed.caption_of(images[0])
        file = str(Path(images[0]).with_suffix(CAPTION_SUFFIXES[0])) if caption_file is None else caption_file.name
        try:
            before = _read(folder, file)
            after = edit.applied(_text(before or b"", file)).encode(errors="surrogatepass")
        except Rejected as rejected:
            left_out.append(Rejection(file, rejected.reason, rejected.detail))
            continue
        if len(after) > LARGEST_CAPTION_FILE:
            left_out.append(Rejection(file, "too large", f"it would have {len(after):,} bytes"))
        elif after != (before or b""):
            changes.append(CaptionChange(file, tuple(images), before, after))
    return CaptionPlan(folder, len(chosen), tuple(changes), tuple(left_out))


def apply_caption_plan(plan: CaptionPlan) -> list[Rejection]:
    """Apply the changes, each file atomically. Returns the files that were changed after planning, which are skipped.

    The current texts are saved first, for `undo_captions`.

    Raises:
        DataError: our hidden folder is a link.
        DiskError: no space, or not permitted.
    """
    with own_folder(plan.folder) as hidden:
        saved_texts = {c.file: {"before": _storable(c.before), "after": _storable(c.after)} for c in plan.changes}
        write_atomic(hidden / UNDO_FILE, json.dumps(saved_texts).encode())
        return [
            Rejection(change.file, CHANGED_SINCE, "it stays as it is")
            for change in plan.changes
            if not _replaced(plan.folder, change.file, change.before, change.after)
        ]


def undo_captions(folder: Path) -> tuple[int, list[Rejection]]:
    """Undo the last edit of a folder's captions. Returns the number of restored files, and the files that were changed
    since the edit, which are skipped. If all are skipped, the edit can be undone later.

    Raises:
        DataError: there is no edit to undo.
        DiskError: no space, or not permitted.
    """
    undone, changed_since = 0, []
    with own_folder(folder) as hidden:
        try:
            saved_texts = json.loads((hidden / UNDO_FILE).read_bytes())
        except FileNotFoundError:
            raise DataError.of(f"{folder}: no change of captions to undo") from None
        for file, texts in saved_texts.items():
            before, after = _stored(texts["before"]), _stored(texts["after"])
            if after is None or not _replaced(folder, file, after, before):
                changed_since.append(Rejection(file, CHANGED_SINCE, "it stays as it is"))
            else:
                undone += 1
        if undone or not changed_since:
            (hidden / UNDO_FILE).unlink()
    return undone, changed_since


def _replaced(folder: Path, file: str, before: bytes | None, after: bytes | None) -> bool:
    """Replace the content `before` of a file with `after`. Returns False if the file contains neither."""
    path = folder / file
    with file_errors_reported(path), folder_locked(path):
        try:
            content = _read(folder, file)
        except Rejected:
            return False
        if content not in (before, after):
            return False
        if after is None:
            path.unlink(missing_ok=True)
        elif content != after:
            # No sync: the file for `undo_captions` already holds the old content, on the disk.
            write_atomic(path, after, sync=False)
    return True


def _read(folder: Path, file: str) -> bytes | None:
    path = inside(folder, file)
    if path.is_symlink():
        raise Rejected("a link", "edit the file that it leads to")
    try:
        if path.stat().st_size > LARGEST_CAPTION_FILE:
            raise Rejected("too large", f"more than {LARGEST_CAPTION_FILE:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from None


def _text(data: bytes, file: str) -> str:
    # Imported late: it imports pydantic by way of the dataset list, which this module does not need otherwise.
    from simpletuner.data.captions import caption_text

    try:
        return data.decode()
    except UnicodeDecodeError:
        return caption_text(data, file)


def _has_visible_text(folder: Path, listed: ImageFolder, name: str) -> bool:
    caption_file = listed.caption_of(name)
    if caption_file is None or caption_file.size == 0:
        return False
    try:
        data = (folder / caption_file.name).read_bytes()
    except OSError:
        return False
    return is_visible(data.decode("utf-8-sig", errors="replace"))


def _storable(data: bytes | None) -> str | None:
    """Any bytes as a text that JSON can hold."""
    return None if data is None else data.decode(errors="surrogateescape")


def _stored(text: str | None) -> bytes | None:
    return None if text is None else text.encode(errors="surrogateescape")
