"""Results of checkpoint verification, remembered until a file of the checkpoint changes: hashing gigabytes is slow."""

import threading
from pathlib import Path

from simpletuner.runs.checkpoints import damage

FileStamps = tuple[tuple[str, int, int], ...]
"""Name, size in bytes and modification time (ns) of each file."""


class Verdicts:
    """Verification results since the server started. Thread-safe."""

    def __init__(self) -> None:
        self._verified: dict[Path, tuple[FileStamps, str | None]] = {}
        self._hashing = threading.Lock()

    def verify(self, folder: Path) -> str | None:
        """Hash a checkpoint's files; return what is damaged, or None. Checkpoints are verified one at a time."""
        with self._hashing:
            stamps = _file_stamps(folder)
            damaged = damage(folder)
            self._verified[folder] = stamps, damaged
            return damaged

    def verdict(self, folder: Path) -> tuple[bool, str | None]:
        """Return whether the checkpoint was verified in its current state, and what was damaged."""
        stamps, damaged = self._verified.get(folder, ((), None))
        is_current = stamps != () and stamps == _file_stamps(folder)
        return is_current, damaged if is_current else None


def size_of(folder: Path) -> int:
    """Total bytes of the files in a folder."""
    return sum(size for _, size, _ in _file_stamps(folder))


def _file_stamps(folder: Path) -> FileStamps:
    entries = []
    for path in sorted(folder.rglob("*")):
        try:
            state = path.lstat()
        except FileNotFoundError:  # being deleted
            continue
        if path.is_file():
            entries.append((str(path.relative_to(folder)), state.st_size, state.st_mtime_ns))
    return tuple(entries)
