"""The only module that writes to standard output and standard error.

`main` runs each command inside `guarded`, so that other writers to `sys.stdout` and `sys.stderr` (progress bars,
warnings, logging of libraries) use a `GuardedStream` too. A failed print does not end a training.
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
"""Encoding error handler: writes `\\u03c3` for a character that a stream cannot encode, as in a JSON string."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end


codecs.register_error(ESCAPED, _escape)


class GuardedStream(io.TextIOBase):
    """A text stream that escapes characters it cannot encode, and survives failed writes.

    After a failed write, because the terminal or the pipe's reader is gone or the disk is full, the stream and its file
    descriptor discard all output.
    """

    def __init__(self, stream: TextIO | None, *, is_output: bool) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  `detach` closes it
        self._opened_here = stream is None
        self._fault: Exception | None = OSError(errno.EBADF, os.strerror(errno.EBADF)) if self._opened_here else None
        self.is_output = is_output
        """Whether the text is the command's output, so that a failed write ends the command."""
        self._set_blocking()

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
        """Write `text`, escaping characters that the stream cannot encode.

        Raises:
            BrokenPipeError: this is the command's output, and its reader is gone.
            DiskError: this is the command's output, and it cannot be written.
        """
        try:
            if self._fault is None:
                self._stream.write(self._encodable(text))
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._discard_after(error)
        self._end_if_output()
        return len(text)

    def flush(self) -> None:
        """Write the stream's buffer; errors as in `write`."""
        try:
            if self._fault is None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._discard_after(error)
        self._end_if_output()

    def detach(self) -> None:  # type: ignore[override]
        """Flush, and close the underlying stream if this object opened it."""
        self.is_output = False
        self.flush()
        if self._opened_here:
            self._stream.close()

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding, self.errors)
        except UnicodeEncodeError:
            return text.encode(self.encoding, ESCAPED).decode(self.encoding)
        return text

    def _set_blocking(self) -> None:
        """Make the stream blocking: another program with the same terminal or pipe may have made it non-blocking."""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(self._stream.fileno(), True)

    def _discard_after(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):
            self._set_blocking()
            return
        self._fault = error
        with contextlib.suppress(OSError, ValueError):
            # The buffered text cannot be written either, now or when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _end_if_output(self) -> None:
        if self._fault is None or not self.is_output:
            return
        if isinstance(self._fault, BrokenPipeError):
            raise self._fault
        reason = self._fault.strerror if isinstance(self._fault, OSError) else str(self._fault)
        raise DiskError.of(f"cannot write to standard output: {reason}", remedy="Redirect it elsewhere.")


def open_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed (`>&-`).

    Otherwise the next opened file would get that number, and the prints of libraries and child processes with it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(
                opened, number
            )  # already equal, since `open` returns the lowest free number; `dup2` makes it inheritable
            if opened != number:
                os.close(opened)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Guard `sys.stdout` and `sys.stderr` inside this context, even if they were closed.

    A failed write to standard output ends the command, except inside `output_failures_ignored`; one to standard error
    never does.
    """
    open_standard_descriptors()
    original_streams = sys.stdout, sys.stderr
    out, err = GuardedStream(sys.stdout, is_output=True), GuardedStream(sys.stderr, is_output=False)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = original_streams
        out.detach()
        err.detach()


@contextlib.contextmanager
def output_failures_ignored() -> Iterator[None]:
    """Ignore failed writes to standard output inside this context, because the output only reports on the work."""
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


def say_in_handler(text: str) -> None:
    """Print `text` and a newline to standard error from a signal handler, even if it interrupted another print."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


deferred_signals.notify = say_in_handler


def ask_user(question: str) -> str | None:
    """Ask `question` and return the typed line; None if standard input is not a terminal, or ends (Ctrl-D)."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    complain(question, end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def input_lines() -> Iterator[str]:
    """Yield each line of standard input until it ends."""
    if sys.stdin is not None:
        yield from sys.stdin


def is_output_read() -> bool:
    """Whether standard output still has a reader; false once the other end of its pipe is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll always reports errors and a closed pipe
    return not poll.poll(0)


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def terminal_width() -> int:
    """Columns of the terminal, or the value of COLUMNS; 80 without a terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def say_on_standard_error() -> contextlib.AbstractContextManager[object]:
    """Make `say` print to standard error inside this context, so that standard output has only the result."""
    return contextlib.redirect_stdout(sys.stderr)
