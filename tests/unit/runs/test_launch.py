import os
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, ConfigError, UserError
from simpletuner.runs.launch import exit_error, launch_run
from simpletuner.runs.layout import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "output" / "run")


def test_what_ends_at_once_without_an_error_says_so(run: RunDirectory, tmp_path: Path) -> None:
    run.create()
    run.console.write_text("of an earlier start\n")
    started = launch_run(["--help"], run, tmp_path)
    assert started.exit_code == 0
    assert "explains all options" in started.printed
    assert "earlier" not in started.printed
    assert run.console.read_text().startswith("of an earlier start\nusage: ")


def test_a_mistake_is_raised_as_the_command_told_it(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--no_such_option: no such option"):
        launch_run(["--no_such_option"], run, tmp_path)


def test_a_run_that_is_going_on_is_refused_with_its_process(run: RunDirectory, tmp_path: Path) -> None:
    run.create()
    with run.lock(), pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()}.*simpletuner run stop"):
        launch_run(["--help"], run, tmp_path)
    assert not run.console.exists()


def test_other_endings_name_themselves(run: RunDirectory) -> None:
    assert isinstance(exit_error(6, None, "other settings", run), CheckpointError)
    bug = exit_error(1, None, "Traceback\n  line\nThis is a bug", run)
    assert type(bug) is UserError
    assert f"exit code 1: This is a bug. {run.console} has its whole output." in str(bug)
    assert "signal 9: it printed nothing" in str(exit_error(-9, None, "", run))
