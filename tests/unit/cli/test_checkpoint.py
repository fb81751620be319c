"""`simpletuner checkpoint`, as it is typed."""

import json
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.cli.checkpoint import run
from simpletuner.cli.main import main
from simpletuner.runs.checkpoints import building, steps
from simpletuner.runs.layout import RunDirectory

RUN = "output/cats"


@pytest.fixture
def directory(own_folder: Path) -> RunDirectory:
    """A run at rest with checkpoints of the steps 5, 10 and 15."""
    found = RunDirectory(Path(RUN))
    found.create()
    found.events.touch()
    for step in (5, 10, 15):
        with building(found.checkpoint(step)) as folder:
            (folder / "state.json").write_text(f'{{"step": {step}}}')
    assert own_folder.is_dir()
    return found


def damaged(directory: RunDirectory, step: int) -> None:
    (directory.checkpoint(step) / "state.json").write_text("{}")


@pytest.mark.usefixtures("directory")
def test_list_has_steps_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", RUN]) == 0
    head, *rows, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "time", "folder"]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [
        ("5", f"{RUN}/checkpoints/step-000005"),
        ("10", f"{RUN}/checkpoints/step-000010"),
        ("15", f"{RUN}/checkpoints/step-000015"),
    ]
    assert total.startswith("3 checkpoints, ")
    assert run(["list", RUN, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["run"] == RUN
    assert told["checkpoints"][0].keys() == {"step", "path", "bytes", "time"}


def test_verify_names_the_damage_and_exits_6(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", RUN]) == 0
    assert capsys.readouterr().out == "step 5: good\nstep 10: good\nstep 15: good\n"
    damaged(directory, 10)
    assert run(["verify", RUN, "--all"]) == 6
    assert "step 10: damaged: state.json does not have the hash in its manifest" in capsys.readouterr().out
    assert run(["verify", RUN, "--step=5,15"]) == 0
    capsys.readouterr()
    assert run(["verify", RUN, "--step", "10", "--step", "5", "--json"]) == 6
    told = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(one["step"], one["damage"] is None) for one in told] == [(10, False), (5, True)]


def test_delete_takes_what_is_named(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["delete", RUN, "--step", "5", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("; 2 kept.\n")
    assert steps(directory) == [10, 15]
    assert run(["delete", RUN, "--step=10", "--yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert ([one["step"] for one in told["deleted"]], told["kept"]) == ([10], [15])
    assert {path.name for path in directory.checkpoints.iterdir()} == {"step-000015"}


def test_the_newest_that_verifies_stays_unless_it_is_named_with_yes(directory: RunDirectory) -> None:
    damaged(directory, 15)
    with pytest.raises(CheckpointError, match="step 10 is the newest checkpoint of output/cats that verifies"):
        run(["delete", RUN, "--step=5,10"])
    assert steps(directory) == [5, 10, 15]
    assert run(["delete", RUN, "--all", "--yes"]) == 0
    assert steps(directory) == [10]
    assert run(["delete", RUN, "--step=10", "--yes"]) == 0
    assert steps(directory) == []


def test_nothing_is_deleted_while_the_run_goes_on(directory: RunDirectory) -> None:
    with directory.lock(), pytest.raises(CheckpointError, match=r"trained by process \d+.*run stop output/cats --wait"):
        run(["delete", RUN, "--all", "--yes"])
    assert len(steps(directory)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: expected list, verify or delete"),
        (["delete", RUN], "no checkpoint is named: expected either --step N or --all"),
        (["delete", RUN, "--step=5"], "there is no terminal to confirm the deletion of the checkpoint of step 5"),
        (["delete", RUN, "--step=x", "--yes"], "--step = 'x': expected a whole number"),
        (["verify", RUN, "--step"], "--step: nothing follows it"),
        (["list", RUN, "--step=5"], "--step=5 is not understood"),
    ],
)
@pytest.mark.usefixtures("directory")
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(arguments)


@pytest.mark.usefixtures("directory")
def test_a_step_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 7: expected one of 5, 10, 15"):
        run(["verify", RUN, "--step=7"])


def test_help_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "--help"]) == 0
    assert "the newest checkpoint that verifies" in " ".join(capsys.readouterr().out.split())
