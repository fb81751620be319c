"""Record signals that request the end of the process when they arrive, and act on them at the next safe point.

A handler that raises would raise anywhere: imports of C extensions turn a KeyboardInterrupt into an ImportError, and
libraries that catch all exceptions swallow it. So this handler does not raise; `simpletuner.runs.process` defines the
safe points. This module imports little, because the command loads it first.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

STOPPED = 75
"""Exit code of a run that was stopped and can be resumed."""
EXIT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that request a stop. One of them that follows an earlier signal ends the process at once."""
WARNING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1)
"""Signals of a closed terminal, and of a cluster whose time limit is near. Repeating them has no effect."""
STOP_FROM_OTHER_MACHINE = signal.SIGUSR2
"""Signal that says that another machine of the run was asked to stop. The next signal to this process still counts as
the first: a cluster signals all machines, but not in the same second."""
REPEAT_S = 1.0
"""Seconds within which a second signal counts as the same: a terminal and a process group both deliver it."""


class DeferredSignals:
    """Inside this context, INT, TERM, HUP, USR1 and USR2 are recorded and have no other effect. It can be nested.

    HUP stays ignored if it was ignored, as under `nohup`.
    """

    def __init__(self) -> None:
        self.is_training = False
        """Whether the training loop handles the request, so that no other code may end the process."""
        self.is_obeying = True
        """False in a process that another process stops (every rank but 0): signals are then ignored."""
        self.notify: Callable[[str], None] = lambda _: None
        """Prints a message from a signal handler; does nothing until the console is loaded."""
        self.first: int | None = None
        """The signal that arrived first, if any."""
        self._first_at = 0.0
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            for number in (*EXIT_SIGNALS, *WARNING_SIGNALS, STOP_FROM_OTHER_MACHINE):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.forget()

    def give_up(self) -> None:
        """Restore the previous handlers, and raise the recorded signal again, for them to handle."""
        first = self.first
        self.forget()
        if first is not None:
            signal.raise_signal(first)

    def forget(self) -> None:
        """Restore the previous handlers, and discard a recorded signal."""
        self._depth = 0
        while self._previous:
            signal.signal(*self._previous.popitem())
        self.first = None

    def _record(self, number: int, _: FrameType | None) -> None:
        if not self.is_obeying:
            return
        now = time.monotonic()
        if self.first not in (None, STOP_FROM_OTHER_MACHINE):
            if number in EXIT_SIGNALS and now - self._first_at >= REPEAT_S:
                os._exit(STOPPED)
            return
        self.first, self._first_at = number, now
        when = "after this step" if self.is_training else "as soon as the current loading or computing allows"
        self.notify(f"Stopping {when}; a second SIGINT (Ctrl-C) or SIGTERM exits at once.")


deferred_signals = DeferredSignals()
"""The signals of this process; signal handlers are per process."""
os.register_at_fork(after_in_child=deferred_signals.forget)  # signals end a library's worker process as usual
