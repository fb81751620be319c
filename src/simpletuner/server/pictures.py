"""Pictures as the page shows them: themselves, or a small one that is made once."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.thumbnails import thumbnail

KEPT_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Version:
    """A file as it was when somebody looked."""

    path: Path
    changed_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> "Version":
        """The file as it is now.

        Raises:
            OSError: there is none.
        """
        status = path.stat()
        return cls(path, status.st_mtime_ns, status.st_size)

    def tag(self, width: int | None) -> str:
        """The ETag of the picture, or of its thumbnail of this width."""
        return f'"{self.changed_ns:x}-{self.size:x}-{width or 0:x}"'


@dataclass
class Thumbnails:
    """Small pictures, the last `KEPT_BYTES` of them kept. For several threads."""

    _kept: OrderedDict[tuple[Version, int, bool], bytes] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, version: Version, width: int, *, is_mask: bool = False) -> bytes:
        """The `thumbnail` of this file.

        Raises:
            Fault: 422, it is no picture that can be read, or too large.
        """
        key = (version, width, is_mask)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = thumbnail(version.path, width, is_mask=is_mask)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += len(made)
            while self._bytes > KEPT_BYTES:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= len(dropped)
        return made
