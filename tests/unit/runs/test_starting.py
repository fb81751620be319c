"""A start before its first event: it is told as starting, refused starts say why, and a stop ends it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError
from simpletuner.runs.events import EndEvent, EventLog, RunEvent
from simpletuner.runs.launch import launch_run
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.process import ask
from simpletuner.runs.starting import SILENT, StartRecord
from simpletuner.runs.status import find_runs, status_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "output" / "run")
    directory.create()
    return directory


@pytest.fixture
def starter(run: RunDirectory) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """Makes a process that holds a start as `launch_run` leaves it, and writes nothing."""
    processes = []

    def start() -> "subprocess.Popen[bytes]":
        lock = run.starting_lock()
        held = lock.take()
        StartRecord(time="2026-01-01T00:00:00+00:00", arguments=("--env=a",), starts=0, console_bytes=0).write(run)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(held,))
        lock.name_holder(held, process.pid)
        os.close(held)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_start_is_starting_from_the_first_moment(run: RunDirectory, starter: Callable[..., object]) -> None:
    process = starter()
    status = status_of(run)
    assert (status.state, status.pid, status.attempt) == ("starting", process.pid, 0)  # type: ignore[attr-defined]
    assert status.started == "2026-01-01T00:00:00+00:00"
    assert [found.root for found in find_runs(run.root.parent)] == [run.root]


def test_a_start_pressed_twice_starts_once(run: RunDirectory, starter: Callable[..., object], tmp_path: Path) -> None:
    starter()
    with pytest.raises(CheckpointError, match="in use by process"):
        launch_run(["--help"], run, tmp_path, wait_s=0)
    assert not run.console.exists()


def test_a_refused_start_is_a_failed_run_with_what_it_printed(run: RunDirectory, tmp_path: Path) -> None:
    run.console.write_text("of an earlier start\n")
    launch_run(["--no_such_option"], run, tmp_path, wait_s=0)
    while run.starting_lock().is_held():
        time.sleep(0.05)
    status = status_of(run)
    assert status.state == "failed"
    assert status.error is not None
    assert status.error.startswith("2 problems in the configuration:\n")
    assert status.error.endswith("--no_such_option: no such option.")


def test_a_start_that_was_killed_says_so(run: RunDirectory, starter: Callable[..., object]) -> None:
    process = starter()
    process.kill()  # type: ignore[attr-defined]
    process.wait()  # type: ignore[attr-defined]
    assert (status_of(run).state, status_of(run).error) == ("failed", SILENT)


def test_a_refused_start_leaves_what_was_trained_before(run: RunDirectory) -> None:
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="s", pid=1, resumed_from=None, steps=2, pictures=1, trainable=1))
        log.emit(EndEvent(reason="done", exit_code=0, step=2, seconds=1))
    run.console.write_text("no such flavour\n")
    StartRecord(time="2026-01-01T00:00:00+00:00", arguments=(), starts=1, console_bytes=0).write(run)
    status = status_of(run)
    assert (status.state, status.step, status.error) == ("done", 2, "no such flavour")
    # The next attempt makes the refused start past.
    with EventLog(run.events) as log:
        log.emit(EndEvent(reason="done", exit_code=0, step=2, seconds=1))
    assert status_of(run).error is None


def test_a_stop_ends_a_start(run: RunDirectory, starter: Callable[..., object]) -> None:
    process = starter()
    ask(run, "stop")
    process.wait(timeout=10)  # type: ignore[attr-defined]
    assert (status_of(run).state, status_of(run).error) == ("stopped", None)
    with pytest.raises(CheckpointError, match="no process trains here"):
        ask(run, "stop")


def test_a_damaged_record_and_a_link_are_no_start(run: RunDirectory, tmp_path: Path) -> None:
    run.starting.write_text("{")
    assert status_of(run).state == "new"
    run.starting.unlink()
    (tmp_path / "secret").write_text("hidden")
    run.console.symlink_to(tmp_path / "secret")
    StartRecord(time="2026-01-01T00:00:00+00:00", arguments=(), starts=0, console_bytes=0).write(run)
    assert status_of(run).error == SILENT
