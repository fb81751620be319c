"""A start that has written no event yet: from the request until the run's first event, or until it is refused.

`RUN/starting.lock` is held by the started process for its whole life and names its pid; `RUN/starting.json` says what
came before it. Once the run's events have a later start, both mean nothing any more.
"""

import contextlib
import os
import signal
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import open_unlinked, write_atomic
from simpletuner.runs.layout import RunDirectory

TAIL_BYTES = 4096
"""Of what a command printed last, shown where it fails."""

LARGEST_RECORD = 2**20

SILENT = "the start ended before it began its work, and printed nothing"


class StartRecord(BaseModel):
    """What was known when a start was asked for."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    time: str
    """UTC, ISO 8601."""
    arguments: tuple[str, ...]
    """What follows `simpletuner train`."""
    starts: int
    """Starts of the run before this one that wrote events."""
    console_bytes: int
    """Size of console.log before this start."""
    is_stopped: bool = False
    """Whether a stop ended it."""

    def write(self, run: RunDirectory) -> None:
        """Replace the record of the start before.

        Raises:
            DiskError: the disk is full.
        """
        write_atomic(run.starting, self.model_dump_json().encode(), sync=False)


def start_record(run: RunDirectory) -> StartRecord | None:
    """The last start of `run` by `simpletuner run start` or the page; None where there was none."""
    try:
        with open_unlinked(run.starting) as file:
            return StartRecord.model_validate_json(file.read(LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def start_refusal(run: RunDirectory, record: StartRecord) -> str:
    """What a start printed that ended without an event."""
    return printed_since(run.console, record.console_bytes) or SILENT


def stop_start(run: RunDirectory) -> bool:
    """End a start that has written no event yet; False where there is none.

    Raises:
        CheckpointError: the start has just begun, and its process is not known yet.
    """
    lock, record = run.starting_lock(), start_record(run)
    if record is None or not lock.is_held():
        return False
    pid = lock.pid()
    if pid is None:
        raise CheckpointError.of(f"{run.root} is just being started", remedy="Ask again.")
    record.model_copy(update={"is_stopped": True}).write(run)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return True


def printed_since(path: Path, place: int) -> str:
    """The end of what was written to `path` after byte `place`."""
    with contextlib.suppress(OSError), open_unlinked(path) as file:
        file.seek(max(place, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
    return ""
