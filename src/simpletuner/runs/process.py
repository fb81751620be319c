"""Requests to a running command: files in `control/`, and signals."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, Self, TypeVar

from simpletuner.base.errors import CheckpointError, Stopped
from simpletuner.base.files import file_errors_reported
from simpletuner.base.signals import deferred_signals
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.starting import stop_start

ControlRequest = Literal["stop", "save", "validate"]

SIGNAL_LOOK_EVERY_S = 0.2
"""Interval at which `interruptible` checks for signals."""

Answer = TypeVar("Answer")


def stopped(finding: str) -> Stopped:
    """The error that ends a run after a request to stop."""
    return Stopped.of(finding, remedy="Run the same command again to resume.")


def stop_if_asked() -> None:
    """Stop here if a signal has arrived. For safe points before training; no effect in `Requests.between_steps`.

    Raises:
        Stopped: a signal has arrived.
    """
    if deferred_signals.first is not None and not deferred_signals.is_training:
        raise stopped("stopped before the training began")


def interruptible(work: Callable[[], Answer]) -> Answer:
    """Run `work` in a thread and return its result. If a signal arrives, the thread is abandoned. For work that cannot
    check for signals itself and keeps finished parts, such as a download.

    Raises:
        Stopped: a signal has arrived.
    """
    pool = ThreadPoolExecutor(1)
    try:
        result = pool.submit(work)
        while not wait((result,), SIGNAL_LOOK_EVERY_S).done:
            stop_if_asked()
        return result.result()
    finally:
        pool.shutdown(wait=False)


def ask(run: RunDirectory, request: ControlRequest) -> None:
    """Send `request` to the process that holds `run`. It is executed after the current step. Before the training, a
    stop is executed at once, and the other requests are executed after the first step.

    Raises:
        CheckpointError: no process holds the run.
        DiskError: the disk is read-only or full.
    """
    if not run.lock().is_held():
        if request == "stop" and stop_start(run):
            return
        raise CheckpointError.of(f"{run.root}: no process trains here", "an active run")
    with file_errors_reported(run.control / request):
        (run.control / request).touch()


class Requests:
    """Requests to this run.

    `touch RUN/control/stop` (or save, validate) makes a request; the file is removed when the request is executed. A
    signal requests a stop. Before the training, a stop takes effect at the next `poll` (finished work is kept); inside
    `between_steps`, the step is finished and saved first.
    """

    def __init__(self, control: Path, *, is_obeying: bool = True) -> None:
        """Without `is_obeying`, another process takes the requests: signals are deferred, and `take` returns False."""
        self.control = control
        self._is_obeying = is_obeying
        self._is_stopping = False

    def __enter__(self) -> Self:
        if self._is_obeying:
            for name in ("stop", "save", "validate"):  # left over from an attempt that ended before it took them
                (self.control / name).unlink(missing_ok=True)
        deferred_signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        deferred_signals.__exit__()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Let a stop wait inside the context until `take` is called."""
        deferred_signals.is_training = True
        try:
            yield
        finally:
            deferred_signals.is_training = False

    def take(self, request: ControlRequest) -> bool:
        """Whether `request` was made. The call clears the request, except a stop, which stays."""
        if not self._is_obeying:
            return False
        path = self.control / request
        if path.exists():
            path.unlink(missing_ok=True)
            self._is_stopping = self._is_stopping or request == "stop"
            return True
        return request == "stop" and (self._is_stopping or deferred_signals.first is not None)

    def poll(self) -> None:
        """Stop here if it was requested. For work outside the training loop.

        Raises:
            Stopped: a stop was requested.
        """
        if not deferred_signals.is_training and self.take("stop"):
            raise stopped("stopped before the training began")
