"""Start a command that outlives its starter."""

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
"""Value of CUDA_VISIBLE_DEVICES that hides all GPUs."""


@dataclass(frozen=True)
class Started:
    """The process of a started run, and its output so far."""

    pid: int
    exit_code: int | None
    """0 if it has ended without an error (there was nothing left to do); None while it runs."""
    printed: str
    """Its output so far."""


def launch_run(
    arguments: Sequence[str],
    run: RunDirectory,
    workspace: Path,
    devices: str = "",
    *,
    wait_s: float = 30.0,
    environ: Mapping[str, str] = os.environ,
) -> Started:
    """Start `simpletuner train ARGUMENTS` in `workspace`, detached: it continues when this process ends.

    Its output is appended to `RUN/console.log`. Returns when the run has begun its work or has ended, or after `wait_s`
    seconds while it is still starting; its status then shows the result.

    Args:
        run: the directory that the arguments give as output_dir.
        devices: value of CUDA_VISIBLE_DEVICES; "" means all devices of the machine.

    Raises:
        CheckpointError: a process holds the run, or is being started for it.
        UserError: the command ended at once with an error; the class is that of its exit code.
        DiskError: the disk is full.
    """
    if run.lock().is_held():
        stop = command_text("simpletuner", "run", "stop", run.root)
        raise CheckpointError.of(
            f"{run.root} is in use by process {run.lock().pid() or 'unknown'}",
            remedy=f"Wait for it, stop it with `{stop}`, or give this run another --output_dir.",
        )
    run.create()
    earlier_starts = status_of(run).starts
    lock = run.starting_lock()
    lock_file = lock.take()  # a second start cannot take it
    try:
        lock.name_holder(lock_file, None)
        with file_errors_reported(run.console), run.console.open("ab") as console:
            console_bytes = console.tell()
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            StartRecord(time=now, arguments=tuple(arguments), starts=earlier_starts, console_bytes=console_bytes).write(
                run
            )
            process = start_detached(
                ["train", *arguments], workspace, console, devices, environ=environ, handles=(lock_file,)
            )
        lock.name_holder(lock_file, process.pid)
    finally:
        os.close(lock_file)
    reap_later(process)
    deadline = time.monotonic() + wait_s
    while process.returncode is None and time.monotonic() < deadline:
        status = status_of(run)
        if status.starts > earlier_starts and status.phase is not None:
            break
        time.sleep(0.1)
    printed = printed_since(run.console, console_bytes)
    if process.returncode:
        status = status_of(run)
        raise exit_error(process.returncode, status.error if status.starts > earlier_starts else None, printed, run)
    return Started(process.pid, process.returncode, printed)


def start_detached(
    arguments: Sequence[str],
    workspace: Path,
    output: BinaryIO,
    devices: str = "",
    *,
    environ: Mapping[str, str] = os.environ,
    handles: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `simpletuner ARGUMENTS` in a new session: without a terminal, and unaffected by the end of this process.

    Args:
        output: file for its output.
        devices: value of CUDA_VISIBLE_DEVICES; "" leaves the variable unset.
        handles: open files that it inherits.
    """
    # The output goes to a file in UTF-8, regardless of the terminal's encoding.
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
    """The typed devices, else those of CUDA_VISIBLE_DEVICES; "" means all devices of the machine."""
    if typed is not None:
        return typed
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else visible or NO_DEVICE


def reap_later(process: subprocess.Popen[bytes]) -> None:
    """Reap a detached process in a background thread, so that it leaves no zombie."""
    threading.Thread(target=process.wait, daemon=True).start()


def exit_error(exit_code: int, event_error: str | None, printed: str, run: RunDirectory) -> UserError:
    """The error of a command that ended with `exit_code`, of the class with this code and with the command's own text.

    Args:
        event_error: the error in its events, if it wrote one.
    """
    kind = error_class(exit_code)
    if kind is not UserError:
        return kind.of(event_error or printed or "the run ended at once without output")
    ending = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    last = event_error or printed.rpartition("\n")[2] or "it printed nothing"
    return UserError.of(f"the run ended at once with {ending}: {last}", remedy=f"{run.console} has its whole output.")
