"""What a running command obeys: files in `control/`, and signals."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from simpletuner.base.errors import CheckpointError, Stopped
from simpletuner.base.files import file_errors_reported
from simpletuner.runs.layout import RunDirectory

ControlRequest = Literal["stop", "save", "validate"]


def stopped(found: str) -> Stopped:
    """The end of a run that was asked to stop."""
    return Stopped.of(found, remedy="Give the same command again to go on.")


def ask(run: RunDirectory, request: ControlRequest) -> None:
    """Ask the process that holds `run` for `request`. It obeys after the step, or before the training at once (a stop)
    or not at all (the others).

    Raises:
        CheckpointError: no process holds the run.
        DiskError: the disk is read-only or full.
    """
    if not run.lock().is_held():
        raise CheckpointError.of(f"{run.root}: no process trains here", "a run that is going on")
    with file_errors_reported(run.control / request):
        (run.control / request).touch()


class Requests:
    """Requests to this run.

    `touch RUN/control/stop` (or save, validate) asks; the file is removed when it is obeyed. The first INT or TERM is a
    request to stop, the second leaves at once. While caches are filled a stop takes effect there and then (what is
    finished is kept); while training, inside `between_steps`, the step is finished and saved first.
    """

    def __init__(self, control: Path) -> None:
        self.control = control
        self._is_stopping = False
        self._is_training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("stop", "save", "validate"):  # left over from an attempt that ended before it looked
            (self.control / name).unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, a stop waits until someone takes it."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def _on_signal(self, *_: object) -> None:
        if self._is_stopping:
            os._exit(Stopped.exit_code)
        self._is_stopping = True
        if not self._is_training:
            raise stopped("stopped before the training began")
        # os.write: printing from a handler may interrupt another print.
        os.write(sys.stderr.fileno(), b"\nStopping after this step; once more to leave at once.\n")

    def take(self, request: ControlRequest) -> bool:
        """Whether `request` was made. Asking clears it, except a stop, which stays."""
        path = self.control / request
        if path.exists():
            path.unlink(missing_ok=True)
            self._is_stopping = self._is_stopping or request == "stop"
            return True
        return request == "stop" and self._is_stopping

    def poll(self) -> None:
        """For work outside the training loop.

        Raises:
            Stopped: a stop was asked for.
        """
        if not self._is_training and self.take("stop"):
            raise stopped("stopped before the training began")
