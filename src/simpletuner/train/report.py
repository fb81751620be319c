"""Report a run's progress: one call writes to the terminal, the log, the events and the trackers."""

import contextlib
import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from simpletuner.base.console import ESCAPED, is_terminal, say, terminal_width
from simpletuner.base.sizes import format_duration
from simpletuner.memory.peak import PeakMemory, read_peak_memory, reset_peak_memory
from simpletuner.runs.events import (
    TITLES,
    Event,
    EventLog,
    NoticeEvent,
    Phase,
    PhaseEvent,
    ProgressEvent,
    StepEvent,
)
from simpletuner.train.trackers import Trackers

PROGRESS_EVENT_EVERY_S = 1.0
"""Minimum interval between progress events."""
STEP_LINE_EVERY_S = 15.0
"""Without a terminal (a log file, a cluster), progress is a line at this interval instead of a bar."""


AVERAGED_STEPS = 20
"""The displayed loss is the average over this number of steps."""
WIDE_ENOUGH_FOR_LR = 90
"""Minimum terminal width, in columns, for the learning rate beside the rates."""


class Progress:
    """Shows the progress of a phase: call it with (done, total). A bar on a terminal, otherwise a line at intervals."""

    def __init__(self, reporter: "Reporter", phase: Phase, title: str) -> None:
        self.reporter = reporter
        self.phase = phase
        self.title = title
        self._began = self._emitted = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        self.reporter.poll()
        self.reporter.activity = f"{self.title}, {done} of {total} done"
        if self._first is None:  # items that were done before this phase count as done, but not for the rate
            self._first = done
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._began, 1e-9)
        remaining_s = (total - done) / rate if rate > 0 else 0.0
        if self.reporter.is_terminal:
            if self._bar is None:
                self._bar = tqdm(total=total, initial=done, desc=self.title, leave=False)
            self._bar.update(done - self._bar.n)
        elif now - self._printed >= STEP_LINE_EVERY_S:
            self._printed = now
            self.reporter.say(f"  {self.title}: {done}/{total}, {rate:.2f}/s, {format_duration(remaining_s)} left")
        if now - self._emitted >= PROGRESS_EVENT_EVERY_S or done == total:
            self._emitted = now
            self.reporter.emit(
                ProgressEvent(
                    phase=self.phase, done=done, total=total, per_s=round(rate, 4), eta_s=round(remaining_s, 1)
                )
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Smoothed:
    """The exponential moving average of the values it is called with; the newest value has weight `share`."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._value: float | None = None

    def __call__(self, value: float) -> float:
        before = value if self._value is None else self._value
        self._value = (1 - self._share) * before + self._share * value
        return self._value


class TrainingBar:
    """Shows finished steps, remaining time, loss and rates: a bar on a terminal, otherwise a line at intervals."""

    FORMAT = "{n_fmt}/{total_fmt}, {remaining} left{postfix}, {rate_fmt}, {elapsed} so far |{bar}|"
    """The most important values come first, because tqdm truncates the end on a narrow terminal."""

    def __init__(self, reporter: "Reporter", *, done: int, total: int, losses: Sequence[float] = ()) -> None:
        """`losses` are those of the last steps before a resume, so that the average continues."""
        self.reporter = reporter
        self.total = total
        self._printed = time.monotonic()
        self._losses = deque(losses, maxlen=AVERAGED_STEPS)
        self._images_per_s, self._tflop_per_s, self._mfu = (Smoothed(0.2) for _ in range(3))
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                unit="step",
                smoothing=0.1,
                bar_format=self.FORMAT,
                dynamic_ncols=True,
            )
            if reporter.is_terminal
            else None
        )

    def step(self, event: StepEvent) -> None:
        """Show a finished step. The displayed loss is the average over the last `AVERAGED_STEPS`, because a single loss
        depends mostly on its sigma. Rates are smoothed over about five steps, because image sizes vary.
        """
        self._losses.append(event.loss)
        count = len(self._losses)
        loss = math.fsum(self._losses) / count
        extra = "" if event.preservation_loss is None else f", preservation loss {event.preservation_loss:.4f}"
        extra += f", {event.rollout_calls} rollout calls" if event.rollout_calls else ""
        rates = self._rates(event)
        if self._bar is not None:
            lr = f", lr {event.lr:.2e}" if terminal_width() >= WIDE_ENOUGH_FOR_LR else ""
            self._bar.set_postfix_str(f"average loss {loss:.4f}{lr}{rates}{extra}", refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._printed >= STEP_LINE_EVERY_S or event.step == self.total:
            self._printed = now
            remaining = format_duration((self.total - event.step) * event.seconds)
            self.reporter.say(
                f"  step {event.step}/{self.total}, loss {loss:.4f} (average of {count} step{'s' * (count > 1)}), "
                f"{event.seconds:.2f} s/step{extra}{rates}, {remaining} left"
            )

    def skip(self) -> None:
        """Show a step that was not taken."""
        if self._bar is not None:
            self._bar.update(1)

    def _rates(self, event: StepEvent) -> str:
        """Images per second, TFLOP/s, and MFU if known."""
        if event.images_per_s is None or event.tflop_per_s is None:
            return ""
        text = (
            f", {self._images_per_s(event.images_per_s):.3g} img/s, {self._tflop_per_s(event.tflop_per_s):.3g} TFLOP/s"
        )
        return text if event.mfu is None else f"{text} ({self._mfu(event.mfu):.0%})"

    def unpause(self) -> None:
        """Exclude the time since the last step from the rate: validation and saving are not steps."""
        if self._bar is not None:
            self._bar.unpause()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Reporter:
    """Reports to the terminal, and to `events`, `log` and trackers if there are any (not in a `dataset` command)."""

    def __init__(
        self,
        *,
        events: EventLog | None = None,
        log: Path | None = None,
        poll: Callable[[], None] = lambda: None,
        is_muted: bool = False,
    ) -> None:
        """`is_muted` leaves the terminal to another process."""
        self._events = events
        self._log = log
        self.poll = poll
        """Called at each progress update and before each phase; may raise `Stopped`."""
        self._is_muted = is_muted
        self.is_terminal = not is_muted and is_terminal()
        self.trackers = Trackers([], self.notice)
        self.listeners: list[Callable[[Event], None]] = []
        """Functions that are called with every event."""
        self.last_phase: Phase | None = None
        """The current phase, or the last one."""
        self.activity = ""
        """The current activity, for the message of a run that runs out of memory."""
        self._phase: Phase | None = None
        self._peak_before = PeakMemory()
        """Peak memory of the current phase before the phases nested in it."""

    def say(self, text: str) -> None:
        """Print a line for the user, and log it."""
        if not self._is_muted:
            with tqdm.external_write_mode():  # above the bars, if there are any
                say(text)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        log = self._log
        if log is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            with log.open("a", encoding="utf-8", errors=ESCAPED) as file:
                file.write(f"{now} {text}\n")
        except OSError as error:
            self._log = None
            self.notice(f"{log} cannot be written ({error.strerror}): logging stops here. Events are still written.")

    def detail(self, text: str) -> None:
        """Write a line to the log only."""
        self._write_log(text)

    def notice(self, text: str) -> None:
        """Report a notice: printed, logged, and an event."""
        self.say(f"Note: {text}")
        self.emit(NoticeEvent(text=text))

    def emit(self, event: Event) -> None:
        """Write `event` to the run's events, and pass it to listeners and trackers."""
        if self._events is not None:
            self._events.emit(event)
        for listener in self.listeners:
            listener(event)
        self.trackers.emit(event)

    @contextlib.contextmanager
    def phase(self, phase: Phase, title: str | None = None) -> Iterator[Progress]:
        """A phase of the run: emits its begin and end events, and shows its progress under `title`.

        Its peak memory excludes that of nested phases and of the enclosing phase. If a phase ends with an error, it
        remains `last_phase`, and `peak_memory` remains that of this phase.
        """
        self.poll()
        outer, outer_peak, outer_activity = self._phase, self.peak_memory(), self.activity
        self._phase = self.last_phase = phase
        self.emit(PhaseEvent(phase=phase, state="begin"))
        began = time.monotonic()
        progress = Progress(self, phase, title or TITLES[phase])
        self.activity = progress.title
        self._peak_before = PeakMemory()
        reset_peak_memory()
        try:
            yield progress
        finally:
            progress.close()
        peak = self.peak_memory()
        reset_peak_memory()
        self._phase, self.last_phase, self.activity = outer, outer or phase, outer_activity
        self._peak_before = PeakMemory() if outer is None else outer_peak
        self.emit(
            PhaseEvent(
                phase=phase,
                state="end",
                seconds=round(time.monotonic() - began, 3),
                memory_gib=peak.used_gib,
                memory_allocated_gib=peak.allocated_gib,
            )
        )

    def peak_memory(self) -> PeakMemory:
        """Peak memory of the current phase so far; between phases, since the last phase."""
        return self._peak_before.combined(read_peak_memory())
