"""The user's note about a run, a text of theirs in `RUN/note.txt`."""

import contextlib
import fcntl
import os

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.files import file_errors_reported, open_unlinked, write_atomic
from simpletuner.runs.layout import RunDirectory

LONGEST_NOTE = 2000
"""Characters."""


class NoteChanged(CheckpointError):
    """The note is no longer what its writer saw."""


def read_note(run: RunDirectory) -> str:
    """The note; empty where there is none."""
    with contextlib.suppress(OSError), open_unlinked(run.note) as file:
        # A file that another program made may be of any size and kind.
        return file.read(4 * LONGEST_NOTE).decode(errors="replace")[:LONGEST_NOTE].strip()
    return ""


def write_note(run: RunDirectory, text: str, seen: str | None = None) -> None:
    """Make `text` the note; an empty one removes it.

    Args:
        seen: what the writer saw of the note before; None overwrites whatever is there.

    Raises:
        ConfigError: the text is too long.
        NoteChanged: another note was written meanwhile; it stays.
        DiskError: the disk is full or read-only.
    """
    text = text.strip()
    if len(text) > LONGEST_NOTE:
        raise ConfigError.of(f"the note has {len(text)} characters", f"at most {LONGEST_NOTE}")
    with file_errors_reported(run.note):
        folder = os.open(run.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            now = read_note(run)
            if now == text:
                return
            if seen is not None and now != seen.strip():
                raise NoteChanged.of(f"the note of {run.root.name} was changed meanwhile, to: {now or '(nothing)'}")
            if text:
                write_atomic(run.note, f"{text}\n".encode())
            else:
                run.note.unlink(missing_ok=True)
        finally:
            os.close(folder)
