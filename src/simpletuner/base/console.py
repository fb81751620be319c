"""The one place that writes to standard output and standard error. Telling never ends the work.

`main` runs each command inside `guarded`, so that whatever else writes to `sys.stdout` or `sys.stderr` (progress bars,
warnings, logging of libraries) goes through a `GuardedStream` too.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

from simpletuner.base.errors import DiskError
from simpletuner.base.signals import deferred_signals

ESCAPED = "simpletuner.escaped"
"""Error handler of encodings: `\\u03c3` for what a stream cannot show, which is that character in a JSON string too."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end


codecs.register_error(ESCAPED, _escape)


class GuardedStream(io.TextIOBase):
    """A text stream that replaces what it cannot show. Once a write fails, it and its file descriptor write nowhere:
    the terminal is gone, whoever read the pipe has ended, or the disk is full.
    """

    def __init__(self, stream: TextIO | None, *, is_output: bool) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  `detach` closes it
        self._is_own = stream is None
        self._fault: Exception | None = OSError(errno.EBADF, os.strerror(errno.EBADF)) if self._is_own else None
        self.is_output = is_output
        """Whether what is written is what the command was called for, so that a failed write ends it."""
        self._wait_when_full()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._stream.errors or "strict"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._fault is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text` as far as the stream can show it.

        Raises:
            BrokenPipeError: this is the command's output, and nobody reads it.
            DiskError: this is the command's output, and it cannot be written.
        """
        try:
            if self._fault is None:
                self._stream.write(self._showable(text))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose(error)
        self._end_if_output()
        return len(text)

    def flush(self) -> None:
        """As `write`, for what waits in the stream's buffer."""
        try:
            if self._fault is None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)
        self._end_if_output()

    def detach(self) -> None:  # type: ignore[override]
        """Give the stream back, or close it if it was made here."""
        self.is_output = False
        self.flush()
        if self._is_own:
            self._stream.close()

    def _showable(self, text: str) -> str:
        try:
            text.encode(self.encoding, self.errors)
        except UnicodeEncodeError:
            return text.encode(self.encoding, ESCAPED).decode(self.encoding)
        return text

    def _wait_when_full(self) -> None:
        """Other programs that share a terminal or pipe may have made it non-blocking, and text would be lost."""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(self._stream.fileno(), True)

    def _lose(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):
            self._wait_when_full()
            return
        self._fault = error
        with contextlib.suppress(OSError, ValueError):
            # What waits in the buffer has nowhere to go either, now or when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _end_if_output(self) -> None:
        if self._fault is None or not self.is_output:
            return
        if isinstance(self._fault, BrokenPipeError):
            raise self._fault
        reason = self._fault.strerror if isinstance(self._fault, OSError) else str(self._fault)
        raise DiskError.of(f"cannot write to standard output: {reason}", remedy="Send it to another place.")


def hold_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0, 1, 2 that is closed (`>&-`). The next file to be opened would get
    its number, and with it all that a library or a child process prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)  # the lowest that is free is this one; `dup2` makes child processes inherit it
            if opened != number:
                os.close(opened)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` are guarded, also where they were closed. A failed write to standard output
    ends the command, unless it is inside `work_goes_on`; one to standard error never does.
    """
    hold_standard_descriptors()
    before = sys.stdout, sys.stderr
    out, err = GuardedStream(sys.stdout, is_output=True), GuardedStream(sys.stderr, is_output=False)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.detach()
        err.detach()


@contextlib.contextmanager
def work_goes_on() -> Iterator[None]:
    """Inside, nothing that happens to standard output ends the work: what is printed only tells about it."""
    stream = sys.stdout
    if not isinstance(stream, GuardedStream) or not stream.is_output:
        yield
        return
    stream.is_output = False
    try:
        yield
    finally:
        stream.is_output = True


def say(text: str) -> None:
    """Print `text` and a newline to standard output, at once."""
    print(text, flush=True)


def complain(text: str, *, end: str = "\n") -> None:
    """Print `text` to standard error, at once."""
    print(text, end=end, file=sys.stderr, flush=True)


def interject(text: str) -> None:
    """Print `text` and a newline to standard error from a signal handler, which may have interrupted another print."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


deferred_signals.tell = interject


def answer_to(question: str) -> str | None:
    """What is typed after `question`; None if nobody can be asked, or the input ends (Ctrl-D)."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    complain(question, end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def input_lines() -> Iterator[str]:
    """Each line of standard input, until it ends."""
    if sys.stdin is not None:
        yield from sys.stdin


def is_output_read() -> bool:
    """Whether standard output still has somebody who reads it: false once the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors and a closed pipe unasked
    return not poll.poll(0)


def is_terminal() -> bool:
    """Whether a person sees standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def say_on_standard_error() -> contextlib.AbstractContextManager[object]:
    """Inside, `say` prints to standard error: standard output is for the answer alone."""
    return contextlib.redirect_stdout(sys.stderr)
