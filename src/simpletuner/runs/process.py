"""What a running command obeys: files in `control/`, and signals."""

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
"""How often `interruptible` looks whether a signal arrived."""

Answer = TypeVar("Answer")


def stopped(found: str) -> Stopped:
    """The end of a run that was asked to stop."""
    return Stopped.of(found, remedy="Give the same command again to go on.")


def stop_if_asked() -> None:
    """A safe point of the work before the training. Inside `Requests.between_steps` it is none.

    Raises:
        Stopped: a signal asked for it.
    """
    if deferred_signals.first is not None and not deferred_signals.is_training:
        raise stopped("stopped before the training began")


def interruptible(work: Callable[[], Answer]) -> Answer:
    """The result of `work`, which runs in a thread. If a signal arrives, the thread is left behind: for what cannot
    look for signals itself and keeps what is finished, such as a download.

    Raises:
        Stopped: a signal asked for it.
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
    """Ask the process that holds `run` for `request`. It obeys after the step, or before the training at once (a stop)
    or not at all (the others).

    Raises:
        CheckpointError: no process holds the run.
        DiskError: the disk is read-only or full.
    """
    if not run.lock().is_held():
        if request == "stop" and stop_start(run):
            return
        raise CheckpointError.of(f"{run.root}: no process trains here", "a run that is going on")
    with file_errors_reported(run.control / request):
        (run.control / request).touch()


class Requests:
    """Requests to this run.

    `touch RUN/control/stop` (or save, validate) asks; the file is removed when it is obeyed. A signal asks for a stop.
    Before the training a stop takes effect at the next `poll` (what is finished is kept); inside `between_steps`, the
    step is finished and saved first.
    """

    def __init__(self, control: Path, *, is_obeying: bool = True) -> None:
        """Without `is_obeying` they are another process's to take: signals are held back, and nothing is asked."""
        self.control = control
        self._is_obeying = is_obeying
        self._is_stopping = False

    def __enter__(self) -> Self:
        if self._is_obeying:
            for name in ("stop", "save", "validate"):  # left over from an attempt that ended before it looked
                (self.control / name).unlink(missing_ok=True)
        deferred_signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        deferred_signals.__exit__()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, a stop waits until someone takes it."""
        deferred_signals.is_training = True
        try:
            yield
        finally:
            deferred_signals.is_training = False

    def take(self, request: ControlRequest) -> bool:
        """Whether `request` was made. Asking clears it, except a stop, which stays."""
        if not self._is_obeying:
            return False
        path = self.control / request
        if path.exists():
            path.unlink(missing_ok=True)
            self._is_stopping = self._is_stopping or request == "stop"
            return True
        return request == "stop" and (self._is_stopping or deferred_signals.first is not None)

    def poll(self) -> None:
        """For work outside the training loop.

        Raises:
            Stopped: a stop was asked for.
        """
        if not deferred_signals.is_training and self.take("stop"):
            raise stopped("stopped before the training began")
