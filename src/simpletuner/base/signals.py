"""Signals that ask for the end: recorded when they arrive, obeyed at the next safe point.

A handler that raises would do so anywhere. Imports of C extensions turn a KeyboardInterrupt into an ImportError, and
libraries that catch everything swallow it. So the handler here raises nothing; `simpletuner.runs.process` says where
the safe points are. This module imports little: it is the first that the command loads.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed."""
AT_ONCE = (signal.SIGINT, signal.SIGTERM)
"""The second time one of these ends the process."""
WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""A closed terminal, and the warning of a cluster that time is up."""
ASKED_ELSEWHERE = signal.SIGUSR2
"""Another machine of the run was asked to stop. What is sent to this one later counts as the first: a cluster signals
all machines, not all in the same second."""
REPEAT_S = 1.0
"""A signal this soon after the first counts as the same: a terminal and a process group both deliver it."""


class DeferredSignals:
    """Inside, INT, TERM, HUP, USR1 and USR2 are recorded in place of what they would do. May be entered more than once.

    HUP stays ignored where it is ignored, as `nohup` asks.
    """

    def __init__(self) -> None:
        self.is_training = False
        """Whether the training loop takes the request: nobody else may end the work then."""
        self.is_obeying = True
        """False in a process whose end another one decides: it holds signals back and does nothing."""
        self.tell: Callable[[str], None] = lambda _: None
        """Prints from a signal handler; nothing before the console is loaded."""
        self.first: int | None = None
        """The signal that arrived first, if any."""
        self._first_at = 0.0
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            for number in (*AT_ONCE, *WARNINGS, ASKED_ELSEWHERE):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.forget()

    def give_up(self) -> None:
        """Put the handlers of before back, which get the signal that was recorded meanwhile."""
        first = self.first
        self.forget()
        if first is not None:
            signal.raise_signal(first)

    def forget(self) -> None:
        """Put the handlers of before back."""
        self._depth = 0
        while self._previous:
            signal.signal(*self._previous.popitem())
        self.first = None

    def _record(self, number: int, _: FrameType | None) -> None:
        if not self.is_obeying:
            return
        now = time.monotonic()
        if self.first not in (None, ASKED_ELSEWHERE):
            if number in AT_ONCE and now - self._first_at >= REPEAT_S:
                os._exit(STOPPED)
            return
        self.first, self._first_at = number, now
        when = "after this step" if self.is_training else "as soon as what is being loaded or made allows"
        self.tell(f"Stopping {when}; once more to leave at once.")


deferred_signals = DeferredSignals()
"""Of this process, as signal handlers are."""
os.register_at_fork(after_in_child=deferred_signals.forget)  # a library's worker ends when it is told to
