"""Image files as the page shows them: versions for the ETag, and a cache of thumbnails."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.thumbnails import thumbnail

KEPT_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class ImageVersion:
    """An image file's path, modification time and size, which together identify its content."""

    path: Path
    changed_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> "ImageVersion":
        """The file's current version.

        Raises:
            OSError: the file does not exist.
        """
        status = path.stat()
        return cls(path, status.st_mtime_ns, status.st_size)

    def tag(self, width: int | None) -> str:
        """The ETag of the image, or of its thumbnail at this width."""
        return f'"{self.changed_ns:x}-{self.size:x}-{width or 0:x}"'


@dataclass
class Thumbnails:
    """Cache of thumbnails, the most recently used `KEPT_BYTES` of them. Thread-safe."""

    _cache: OrderedDict[tuple[ImageVersion, int, bool], bytes] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, version: ImageVersion, width: int, *, is_mask: bool = False) -> bytes:
        """Return the file's `thumbnail`, cached.

        Raises:
            Fault: 422, the file is not a readable image, or too large.
        """
        key = (version, width, is_mask)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        encoded = thumbnail(version.path, width, is_mask=is_mask)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = encoded
                self._bytes += len(encoded)
            while self._bytes > KEPT_BYTES:
                _, dropped = self._cache.popitem(last=False)
                self._bytes -= len(dropped)
        return encoded
