"""The user's note about a run, in `RUN/note.txt`."""

import contextlib
import fcntl
import os

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.files import file_errors_reported, open_regular_file, write_atomic
from simpletuner.runs.layout import RunDirectory

LONGEST_NOTE = 2000
"""In characters."""


class NoteChanged(CheckpointError):
    """The note was changed after its writer read it."""


def read_note(run: RunDirectory) -> str:
    """The note; empty if there is none."""
    with contextlib.suppress(OSError), open_regular_file(run.note) as file:
        # Another program may have written a file of any size and content.
        return file.read(4 * LONGEST_NOTE).decode(errors="replace")[:LONGEST_NOTE].strip()
    return ""


def write_note(run: RunDirectory, text: str, expected_note: str | None = None) -> None:
    """Replace the note with `text`; an empty text removes it.

    Args:
        expected_note: the note that the writer has read; None overwrites any note.

    Raises:
        ConfigError: the text is too long.
        NoteChanged: the note differs from `expected_note`; it is kept.
        DiskError: the disk is full or read-only.
    """
    text = text.strip()
    if len(text) > LONGEST_NOTE:
        raise ConfigError.of(f"the note has {len(text)} characters", f"at most {LONGEST_NOTE}")
    with file_errors_reported(run.note):
        folder = os.open(run.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            current = read_note(run)
            if current == text:
                return
            if expected_note is not None and current != expected_note.strip():
                raise NoteChanged.of(f"the note of {run.root.name} was changed meanwhile, to: {current or '(nothing)'}")
            if text:
                write_atomic(run.note, f"{text}\n".encode())
            else:
                run.note.unlink(missing_ok=True)
        finally:
            os.close(folder)
