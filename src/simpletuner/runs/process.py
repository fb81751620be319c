"""What a running command obeys: files in `control/`, and signals."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Literal, Self

from simpletuner.base.errors import Stopped

Request = Literal["stop", "save", "validate"]


class Requests:
    """Requests to this run, looked at between steps.

    `touch RUN/control/stop` (or save, validate) asks; the file is removed when it is obeyed. The first INT or TERM
    is a request to stop: the step is finished and saved. The second leaves at once.
    """

    def __init__(self, control: Path) -> None:
        self.control = control
        self._signalled = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for name in ("stop", "save", "validate"):  # left over from an attempt that ended before it looked
            (self.control / name).unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(Stopped.exit_code)
        self._signalled = True
        # os.write: printing from a handler may interrupt another print.
        os.write(sys.stderr.fileno(), b"\nStopping after this step; once more to leave at once.\n")

    def take(self, request: Request) -> bool:
        """Whether `request` was made; asking clears it (a signal stays)."""
        path = self.control / request
        if path.exists():
            path.unlink(missing_ok=True)
            return True
        return request == "stop" and self._signalled
