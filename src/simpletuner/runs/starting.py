"""A start that has written no event yet: from the request until the run's first event, or until its refusal.

The started process holds `RUN/starting.lock`, which contains its pid, until it ends. `RUN/starting.json` records the
state before it. Both are obsolete once the run's events contain this start.
"""

import contextlib
import os
import signal
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import open_regular_file, write_atomic
from simpletuner.runs.layout import RunDirectory

TAIL_BYTES = 4096
"""How many bytes from the end of a command's output are shown if it fails."""

LARGEST_RECORD = 2**20

SILENT = "the start ended before it began its work, and printed nothing"


class StartRecord(BaseModel):
    """A requested start, and the state of the run before it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    time: str
    """UTC, ISO 8601."""
    arguments: tuple[str, ...]
    """The arguments of `simpletuner train`."""
    starts: int
    """Number of earlier starts of the run that wrote events."""
    console_bytes: int
    """Size of console.log before this start."""
    is_stopped: bool = False
    """Whether it was stopped before its first event."""

    def write(self, run: RunDirectory) -> None:
        """Write the record, replacing that of the previous start.

        Raises:
            DiskError: the disk is full.
        """
        write_atomic(run.starting, self.model_dump_json().encode(), sync=False)


def start_record(run: RunDirectory) -> StartRecord | None:
    """The last start of `run` by `simpletuner run start` or the page; None if there was none."""
    try:
        with open_regular_file(run.starting) as file:
            return StartRecord.model_validate_json(file.read(LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def start_refusal(run: RunDirectory, record: StartRecord) -> str:
    """The output of a start that ended without an event."""
    return printed_since(run.console, record.console_bytes) or SILENT


def stop_start(run: RunDirectory) -> bool:
    """Stop a start that has written no event yet. Returns False if there is none.

    Raises:
        CheckpointError: the start has just begun, and its pid is not recorded yet.
    """
    lock, record = run.starting_lock(), start_record(run)
    if record is None or not lock.is_held():
        return False
    pid = lock.pid()
    if pid is None:
        raise CheckpointError.of(f"{run.root} is just being started", remedy="Try again in a moment.")
    record.model_copy(update={"is_stopped": True}).write(run)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return True


def printed_since(path: Path, offset: int) -> str:
    """The end of the text that was written to `path` after byte `offset`."""
    with contextlib.suppress(OSError), open_regular_file(path) as file:
        file.seek(max(offset, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
    return ""
