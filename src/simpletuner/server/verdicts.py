"""What verifying a checkpoint found, remembered until a file of it changes: hashing gigabytes takes time."""

import threading
from pathlib import Path

from simpletuner.runs.checkpoints import damage

Seal = tuple[tuple[str, int, int], ...]
"""Name, bytes and time of change of each file."""


class Verdicts:
    """Of the checkpoints that were verified since the server started. May be asked from several threads."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Seal, str | None]] = {}
        self._hashing = threading.Lock()

    def verify(self, folder: Path) -> str | None:
        """Hash the files of a checkpoint; what is wrong with it, or None. One at a time."""
        with self._hashing:
            seal = _seal(folder)
            found = damage(folder)
            self._known[folder] = seal, found
            return found

    def known(self, folder: Path) -> tuple[bool, str | None]:
        """Whether it was verified as it lies there, and what was wrong with it."""
        seal, found = self._known.get(folder, ((), None))
        is_known = seal != () and seal == _seal(folder)
        return is_known, found if is_known else None


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(size for _, size, _ in _seal(folder))


def _seal(folder: Path) -> Seal:
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            state = path.lstat()
        except FileNotFoundError:  # it is being deleted
            continue
        if path.is_file():
            found.append((str(path.relative_to(folder)), state.st_size, state.st_mtime_ns))
    return tuple(found)
