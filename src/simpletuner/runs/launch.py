"""Starting a command that outlives whoever starts it."""

import datetime
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
from simpletuner.base.errors import CheckpointError, UserError, error_class
from simpletuner.base.files import file_errors_reported
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.starting import StartRecord, printed_since
from simpletuner.runs.status import status_of

NO_DEVICE = "-1"
"""For CUDA_VISIBLE_DEVICES: none of them."""


@dataclass(frozen=True)
class Started:
    """A run that was started."""

    pid: int
    exit_code: int | None
    """0 where it ended meanwhile without an error (there was nothing left to do); None while it goes on."""
    printed: str
    """What it printed so far."""


def launch_run(
    arguments: Sequence[str],
    run: RunDirectory,
    workspace: Path,
    devices: str = "",
    *,
    wait_s: float = 30.0,
    environ: Mapping[str, str] = os.environ,
) -> Started:
    """Start `simpletuner train ARGUMENTS` in `workspace`, on its own: it goes on when this process ends.

    What it prints is appended to `RUN/console.log`. Returns when the run has begun its work, has ended, or after
    `wait_s` seconds, when it is still starting: then its status tells what becomes of it.

    Args:
        run: what the arguments have as output_dir.
        devices: for CUDA_VISIBLE_DEVICES; "" is what the machine has.

    Raises:
        CheckpointError: a process holds the run, or is being started for it.
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
    before = status_of(run).starts
    lock = run.starting_lock()
    held = lock.take()  # a second start finds it taken
    try:
        lock.name_holder(held, None)
        with file_errors_reported(run.console), run.console.open("ab") as console:
            place = console.tell()
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            StartRecord(time=now, arguments=tuple(arguments), starts=before, console_bytes=place).write(run)
            process = detached(["train", *arguments], workspace, console, devices, environ=environ, handles=(held,))
        lock.name_holder(held, process.pid)
    finally:
        os.close(held)
    let_go(process)
    deadline = time.monotonic() + wait_s
    while process.returncode is None and time.monotonic() < deadline:
        status = status_of(run)
        if status.starts > before and status.phase is not None:
            break
        time.sleep(0.1)
    printed = printed_since(run.console, place)
    if process.returncode:
        status = status_of(run)
        raise failure(process.returncode, status.error if status.starts > before else None, printed, run)
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


def devices_of(typed: str | None) -> str:
    """The devices that were typed, or those that the environment leaves; "" for what the machine has."""
    if typed is not None:
        return typed
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else visible or NO_DEVICE


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Let a detached process be; where this one lives on, the other leaves no zombie."""
    threading.Thread(target=process.wait, daemon=True).start()


def failure(exit_code: int, said: str | None, printed: str, run: RunDirectory) -> UserError:
    """The error of a command that ended with `exit_code`: of the class that has this code, in the command's words.

    Args:
        said: the error of its events, if it came so far.
    """
    kind = error_class(exit_code)
    if kind is not UserError:
        return kind.of(said or printed or "the run ended at once and said nothing")
    ending = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    last = said or printed.rpartition("\n")[2] or "it said nothing"
    return UserError.of(f"the run ended at once with {ending}: {last}", remedy=f"{run.console} has all of it.")
