"""Starting a command that outlives whoever starts it."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from simpletuner.base.commandline import command_text
from simpletuner.base.errors import CheckpointError, UserError
from simpletuner.base.files import file_errors_reported
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.status import status_of

TAIL_BYTES = 4096
"""Of what a command printed last, shown where it fails."""


@dataclass(frozen=True)
class Started:
    """A run that was started."""

    pid: int
    exit_code: int | None
    """0 where it ended meanwhile without an error (there was nothing left to do); None while it goes on."""
    printed: str
    """What it printed so far."""


def launch_run(
    arguments: Sequence[str], run: RunDirectory, workspace: Path, devices: str = "", *, wait_s: float = 30.0
) -> Started:
    """Start `simpletuner train ARGUMENTS` in `workspace`, on its own: it goes on when this process ends.

    What it prints is appended to `RUN/console.log`. Returns when the run has begun its work, has ended, or after
    `wait_s` seconds, when it is still being loaded.

    Args:
        run: what the arguments have as output_dir.
        devices: for CUDA_VISIBLE_DEVICES; "" is what the machine has.

    Raises:
        CheckpointError: a process holds the run.
        UserError: the command ended at once with an error; its class is that of the exit code.
        DiskError: the disk is full.
    """
    if run.lock().is_held():
        stop = command_text("simpletuner", "run", "stop", run.root)
        raise CheckpointError.of(
            f"{run.root} is in use by process {run.lock().pid() or 'unknown'}",
            remedy=f"Wait for it, stop it with `{stop}`, or give this run another --output_dir.",
        )
    run.create()
    before = status_of(run).attempt
    with file_errors_reported(run.console), run.console.open("ab") as console:
        place = console.tell()
        process = detached(["train", *arguments], workspace, console, devices)
    let_go(process)
    deadline = time.monotonic() + wait_s
    while process.returncode is None and time.monotonic() < deadline:
        status = status_of(run)
        if status.attempt > before and status.phase is not None:
            break
        time.sleep(0.1)
    printed = printed_since(run.console, place)
    if process.returncode:
        status = status_of(run)
        raise failure(process.returncode, status.error if status.attempt > before else None, printed, run)
    return Started(process.pid, process.returncode, printed)


def detached(
    arguments: Sequence[str],
    workspace: Path,
    output: BinaryIO,
    devices: str = "",
    *,
    environ: Mapping[str, str] = os.environ,
    handles: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """`simpletuner ARGUMENTS` in a session of its own: without a terminal, and untouched by the end of this process.

    Args:
        output: takes what it prints.
        devices: for CUDA_VISIBLE_DEVICES, which "" leaves out.
        handles: open files that it keeps.
    """
    # Whatever the terminal's encoding is: what is printed goes to a file, which is UTF-8.
    environment = {**environ, "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": devices}
    if not devices:
        del environment["CUDA_VISIBLE_DEVICES"]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "simpletuner", *arguments],
        cwd=workspace,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=handles,
    )


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Let a detached process be; where this one lives on, the other leaves no zombie."""
    threading.Thread(target=process.wait, daemon=True).start()


def printed_since(path: Path, place: int) -> str:
    """The end of what was written to `path` after byte `place`."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(place, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
    return ""


def failure(exit_code: int, said: str | None, printed: str, run: RunDirectory) -> UserError:
    """The error of a command that ended with `exit_code`: of the class that has this code, in the command's words.

    Args:
        said: the error of its events, if it came so far.
    """
    kinds = {kind.exit_code: kind for kind in UserError.__subclasses__()}
    if exit_code in kinds:
        return kinds[exit_code].of(said or printed or "the run ended at once and said nothing")
    ending = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    last = said or printed.rpartition("\n")[2] or "it said nothing"
    return UserError.of(f"the run ended at once with {ending}: {last}", remedy=f"{run.console} has all of it.")
