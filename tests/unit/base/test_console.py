"""What a command prints: shown as far as the stream can, and never a reason for work to end."""

import contextlib
import errno
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from simpletuner.base.console import (
    GuardedStream,
    ask_user,
    complain,
    guarded,
    is_terminal,
    output_failures_ignored,
    say,
    say_in_handler,
)
from simpletuner.base.errors import DiskError

OUR_SIGNS = "σ × 2, …"


@contextlib.contextmanager
def output_to(lost: str) -> Iterator[TextIO]:
    """Standard output on a full disk, or that nobody reads any more."""
    if lost == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield stream


def with_encoding(encoding: str, errors: str = "strict") -> tuple[io.BytesIO, GuardedStream]:
    written = io.BytesIO()
    return written, GuardedStream(io.TextIOWrapper(written, encoding=encoding, errors=errors), is_output=True)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", OUR_SIGNS), ("cp1252", "\\u03c3 × 2, …"), ("ascii", "\\u03c3 \\u00d7 2, \\u2026")],
)
def test_what_a_stream_cannot_show_is_escaped(encoding: str, shown: str) -> None:
    written, stream = with_encoding(encoding)
    print(OUR_SIGNS, file=stream, flush=True)
    assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_a_name_that_is_no_utf_8_is_shown() -> None:
    name = os.fsdecode(b"picture-\xff.png")
    written, stream = with_encoding("utf-8")
    print(name, file=stream, flush=True)
    assert written.getvalue() == b"picture-\\udcff.png\n"
    written, stream = with_encoding("ascii", errors="surrogateescape")  # Python's own choice in the locale C
    print(name, file=stream, flush=True)
    assert written.getvalue() == b"picture-\xff.png\n"


def test_what_is_escaped_is_the_same_json() -> None:
    caption = "a σ, a 😀"
    written, stream = with_encoding("ascii")
    print(json.dumps(caption, ensure_ascii=False), file=stream, flush=True)
    assert json.loads(written.getvalue()) == caption


def test_output_that_nobody_reads_ends_a_command() -> None:
    with output_to("unread") as stream:
        with guarded(), pytest.raises(BrokenPipeError):
            say("one line")
        stream.write("what waits in its buffer goes nowhere")


def test_output_on_a_full_disk_ends_a_command() -> None:
    with output_to("full") as stream:
        with guarded(), pytest.raises(DiskError, match="cannot write to standard output: No space left on device"):
            say("one line")
        stream.write("what waits in its buffer goes nowhere")


@pytest.mark.parametrize("lost", ["full", "unread"])
def test_work_goes_on_without_output(lost: str) -> None:
    with output_to(lost), guarded(), output_failures_ignored():
        for line in ("one", "two"):
            say(line)


def test_a_broken_standard_error_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with guarded():
            complain("one line")
            print("a warning of a library", file=sys.stderr, flush=True)
            say_in_handler("from a signal handler")


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with guarded():
            assert is_terminal()
            os.close(ours)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.write(theirs, b"gone")
            complain("one line")
            assert not is_terminal()


def test_a_pipe_that_another_program_made_non_blocking_is_written_to() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader) as end, os.fdopen(writer, "w") as stream:
        with contextlib.redirect_stdout(stream), guarded():
            assert os.get_blocking(writer)
            os.set_blocking(writer, False)
            size = os.write(writer, b"x" * 2**20)  # as much as the pipe takes
            say("one")
            assert os.get_blocking(writer)
            os.read(reader, size)
            say("two")
        stream.close()
        assert end.read() == "one\ntwo\n"


def test_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with guarded():
        say("a line")
        complain("another")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a line\n", "another\n")


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO("yes")):
        monkeypatch.setattr(sys, "stdin", stream)
        assert ask_user("Delete it?") is None


def test_closed_streams_take_no_file_that_is_opened_later(tmp_path: Path) -> None:
    """`simpletuner train <&- >&- 2>&-`: the next file would be descriptor 0, 1 or 2, and get what a library prints."""
    code = """
import os, sys
from simpletuner.base.console import complain, guarded, output_failures_ignored, say, say_in_handler
os.closerange(0, 3)
sys.stdin = sys.stdout = sys.stderr = None
with guarded(), output_failures_ignored(), open(sys.argv[1], "w") as events:
    say("a line")
    complain("a complaint")
    say_in_handler("from a signal handler")
    os.write(1, b"from a library")
    os.write(2, b"from a library")
    events.write("an event")
"""
    file = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(file)], check=False)
    assert (done.returncode, file.read_text()) == (0, "an event")
