"""`simpletuner run`, as it is typed; whole runs are in tests/recipes."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.cli.main import main
from simpletuner.cli.run import run
from simpletuner.runs.events import (
    CheckpointEvent,
    EndEvent,
    ErrorEvent,
    Event,
    EventLog,
    NoticeEvent,
    PhaseEvent,
    ProgressEvent,
    RunEvent,
    StepEvent,
    ValidationEvent,
)
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue

BEGUN = RunEvent(program="simpletuner", pid=1, resumed_from=None, steps=10, pictures=2, trainable=3)
STEP = StepEvent(step=4, epoch=0, loss=0.5, lr=1e-4, grad_norm=1, seconds=2, memory_gib=1)


def made(name: str, *events: Event) -> RunDirectory:
    directory = RunDirectory(Path("output") / name)
    directory.create()
    with EventLog(directory.events) as log:
        for event in events:
            log.emit(event)
    return directory


def configured(folder: Path, output_dir: str) -> None:
    (folder / "datasets" / "cats").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_flavour": "tiny", "output_dir": output_dir}))
    (folder / "multidatabackend.json").write_text(json.dumps([{"id": "cats", "instance_data_dir": "datasets/cats"}]))


def test_show_tells_where_a_run_stands(capsys: pytest.CaptureFixture[str]) -> None:
    directory = made("cats", BEGUN, ValidationEvent(step=0, loss=0.75), STEP)
    with directory.lock():
        assert run(["show", "output/cats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"output/cats: running, process {os.getpid()}",
        "  step 4 of 10 (40%), loss 0.5000 at that step, 2.00 s/step, 12 s left",
        "  held-out loss: first 0.7500, last 0.7500",
    ]
    run(["show", "output/cats"])
    assert "killed\n  step 4 of 10" in capsys.readouterr().out


def test_show_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    failed = (ErrorEvent(exit_code=5, text="too large"), EndEvent(reason="error", exit_code=5, step=4, seconds=1))
    made("cats", BEGUN, STEP, *failed)
    assert run(["show", "output/cats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["state"], told["error"], told["exit_code"]) == ("output/cats", "failed", "too large", 5)
    assert (told["step"], told["steps"], told["loss"], told["progress"], told["pid"]) == (4, 10, 0.5, None, None)
    assert (told["attempt"], told["last_id"]) == (1, 4)


def test_follow_ends_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    made("cats", BEGUN, STEP, EndEvent(reason="stopped", exit_code=75, step=4, seconds=1))
    assert run(["show", "--follow", "output/cats"]) == 0
    assert "stopped\n" in capsys.readouterr().out


def test_a_run_may_be_that_of_the_configuration(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configured(own_folder, "output/cats")
    made("cats", BEGUN, STEP)
    assert run(["show"]) == 0
    assert capsys.readouterr().out.startswith("output/cats: killed")
    assert run(["show", "--output_dir", "output/cats", "--json"]) == 0


def test_list_has_the_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    assert capsys.readouterr().out == "No runs in output. `simpletuner run start` starts one.\n"
    made("old", BEGUN, STEP)
    made("new", PhaseEvent(phase="text", state="begin"), ProgressEvent(phase="text", done=1, total=2, per_s=1, eta_s=1))
    with RunDirectory(Path("output/new")).lock():
        assert run(["list"]) == 0
    head, new, old = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "step's", "loss", "started", "phase"]
    assert new.startswith("output/new  running  0")
    assert new.endswith("encoding captions")
    assert old.split()[:4] == ["output/old", "killed", "4/10", "0.5000"]
    assert run(["list", "output/old", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["run"] == "output/old"


def test_the_list_is_filtered_and_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    made("b-cats", BEGUN, STEP, EndEvent(reason="done", exit_code=0, step=4, seconds=1))
    made("a-dogs", BEGUN, StepEvent(step=1, epoch=0, loss=0.25, lr=1, grad_norm=1, seconds=1, memory_gib=1))
    made("c-birds", PhaseEvent(phase="text", state="begin"))
    assert run(["note", "output/a-dogs", "Rate too high"]) == 0
    assert run(["note", "output/a-dogs"]) == 0
    assert capsys.readouterr().out == "Rate too high\nRate too high\n"

    def listed(*typed: str) -> list[str]:
        run(["list", "--json", *typed])
        return [Path(one["run"]).name for one in json.loads(capsys.readouterr().out)["runs"]]

    assert sorted(listed()) == ["a-dogs", "b-cats", "c-birds"]
    assert listed("--sort=name") == ["a-dogs", "b-cats", "c-birds"]
    assert listed("--sort=loss") == ["a-dogs", "b-cats", "c-birds"]
    assert listed("--sort=state")[0] == "b-cats"  # the others were killed
    assert listed("--find=too HIGH") == ["a-dogs"]
    assert listed("--find=cats", "--state=done") == ["b-cats"]
    assert run(["list", "--state", "failed"]) == 0
    assert capsys.readouterr().out == "No matching runs in output.\n"
    assert run(["list", "--find", "dogs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("Rate too high")
    with pytest.raises(ConfigError, match=r"--sort = 'size': expected started, name, loss or state"):
        run(["list", "--sort", "size"])


def test_a_stop_says_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = EndEvent(reason="stopped", exit_code=75, step=4, seconds=1)
    directory = made("cats", BEGUN, STEP, stopped)
    for saved, said in (
        (None, "no checkpoint was saved: the same command starts from the beginning"),
        (2, "step 4 was not saved: the same command resumes from step 2"),
        (4, "saved at step 4: the same command resumes from that step"),
    ):
        if saved is not None:
            directory.checkpoint(saved).mkdir()
        run(["show", "output/cats"])
        assert f"  {said}\n" in capsys.readouterr().out


def test_a_run_is_deleted_after_asking(capsys: pytest.CaptureFixture[str]) -> None:
    directory = made("cats", BEGUN)
    with pytest.raises(ConfigError, match=r"there is no terminal to confirm the deletion of output/cats\. Give --yes"):
        run(["delete", "output/cats"])
    with directory.lock(), pytest.raises(CheckpointError, match="is in use by process"):
        run(["delete", "output/cats", "--yes"])
    assert run(["delete", "output/cats", "--yes"]) == 0
    assert capsys.readouterr().out.startswith("output/cats is deleted: ")
    assert not directory.root.exists()
    with pytest.raises(ConfigError, match="output/cats is not a run"):
        run(["delete", "output/cats", "--yes"])


def test_the_queue_is_reordered(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = Queue.of(own_folder)
    for name in "abc":
        queue.add(["--help"], f"output/{name}")
    assert run(["queue", "move", "3", "top", "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)["entries"]] == [3, 1, 2]
    assert run(["queue", "move", "1", "3"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["3", "2", "1"]
    with pytest.raises(ConfigError, match=r"no entry is named.*\n.*no position is given: expected up, down, top"):
        run(["queue", "move"])


def test_a_request_is_left_for_who_holds_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    directory = made("cats", BEGUN, STEP)
    with directory.lock():
        assert run(["save", "output/cats"]) == 0
        assert run(["stop", "output/cats", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("output/cats: requested. The run saves when this step is finished.\n")
    assert json.loads(out.partition("\n")[2])["request"] == "stop"
    assert {path.name for path in directory.control.iterdir()} == {"save", "stop"}


def test_a_request_before_the_training_says_when_it_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    directory = made("cats", PhaseEvent(phase="latents", state="begin"))
    with directory.lock():
        run(["stop", "output/cats"])
        run(["validate", "output/cats"])
    stop, validate = capsys.readouterr().out.splitlines()
    assert stop.endswith("The run is encoding images and ends at once; finished work is kept.")
    assert validate.endswith("The run is encoding images; it executes the request after the first step.")


@contextlib.contextmanager
def obeying(directory: RunDirectory, request: str, *events: Event) -> Iterator[None]:
    """A run that is going on, takes `request`, tells `events` of it, and ends."""
    is_there = threading.Event()

    def obey() -> None:
        with directory.lock(), EventLog(directory.events) as log:
            is_there.set()
            path = directory.control / request
            deadline = time.monotonic() + 10
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            path.unlink()
            for event in events:
                log.emit(event)

    thread = threading.Thread(target=obey)
    thread.start()
    assert is_there.wait(10)
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("request_", "event", "said"),
    [
        ("save", CheckpointEvent(step=5, state="saved", path="checkpoints/step-000005"), "saved output/cats/checkpo"),
        (
            "validate",
            ValidationEvent(step=5, sheet="validation/step-000005/sheet.png"),
            "generated output/cats/validatio",
        ),
        ("stop", EndEvent(reason="stopped", exit_code=75, step=5, seconds=1), "stopped at step 5\n"),
    ],
)
def test_waiting_returns_when_it_is_done(
    request_: str, event: Event, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = made("cats", BEGUN, STEP)
    with obeying(directory, request_, STEP, event):
        assert run([request_, "output/cats", "--wait"]) == 0
    assert f"output/cats: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "events", "message"),
    [
        ("save", (EndEvent(reason="error", exit_code=7, step=5, seconds=1),), "ended before it executed the request"),
        ("stop", (EndEvent(reason="error", exit_code=7, step=5, seconds=1),), "ended before it executed the request"),
        ("validate", (STEP, STEP, STEP), "output/cats generates no validation images"),
    ],
)
def test_waiting_for_what_does_not_come_is_an_error(request_: str, events: tuple[Event, ...], message: str) -> None:
    directory = made("cats", BEGUN, STEP)
    with obeying(directory, request_, *events), pytest.raises((CheckpointError, ConfigError), match=message):
        run([request_, "output/cats", "--wait"])
    with pytest.raises(CheckpointError, match="no process trains here"):
        run([request_, "output/cats"])


def test_following_tells_what_comes(capsys: pytest.CaptureFixture[str]) -> None:
    directory = made("cats", BEGUN)
    events = (
        PhaseEvent(phase="train", state="begin"),
        STEP,
        NoticeEvent(text="be careful"),
        CheckpointEvent(step=4, state="saved", path="checkpoints/step-000004"),
        EndEvent(reason="stopped", exit_code=75, step=4, seconds=1),
    )
    with obeying(directory, "stop", *events):
        asked = threading.Timer(0.5, (directory.control / "stop").touch)
        asked.start()
        assert run(["show", "output/cats", "--follow"]) == 0
        asked.join()
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "training",
        "step 4 of 10: loss 0.5000, lr 1.00e-04, 2.00 s",
        "Note: be careful",
        "checkpoint checkpoints/step-000004 saved",
        "stopped at step 4",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: expected one of start, stop, save, validate, show, list, note, delete, queue"),
        (["strat"], "run strat: no such command.* Did you mean simpletuner run start"),
        (["show", "output/nothing"], "output/nothing: no such run. `simpletuner run start` starts one"),
        (["show", "file"], "file: no such run"),
        (["show"], "no run is named: expected its directory after `simpletuner run show`"),
        (["show", "output/a", "--queue"], "simpletuner run show: --queue is not understood"),
        (["list", "nowhere"], "nowhere: no such folder"),
        (["list", "--wait"], "run list: --wait is not understood"),
        (["start", "stray"], "'stray': expected a flag that begins with --"),
        (["start", "--devices"], "--devices: nothing follows it"),
        (["queue", "ade"], "run queue ade: no such command.* Did you mean simpletuner run queue add"),
        (["queue", "remove"], "no entry is named"),
        (["queue", "remove", "7"], "queue entry 7: there is none"),
        (["queue", "list", "--devices=0"], "--devices=0 is not understood"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    Path("file").touch()
    with pytest.raises(ConfigError, match=message):
        run(arguments)


def test_a_run_of_nearly_this_name_is_suggested() -> None:
    made("cats", BEGUN)
    with pytest.raises(ConfigError, match=r"Did you mean output/cats\?"):
        run(["show", "output/cat"])
    with pytest.raises(ConfigError, match=r"Did you mean output/cats\?"):
        run(["show", "cats"])


def test_start_tells_every_problem_and_starts_nothing(own_folder: Path) -> None:
    configured(own_folder, "output/cats")
    with pytest.raises(ConfigError) as caught:
        run(["start", "--learning_rate=-1", "--lora_rnak=3"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError):
        run(["start", "--queue", "--learning_rate=-1"])
    assert not (own_folder / "output").exists()
    assert not (own_folder / ".simpletuner").exists()


def test_start_refuses_a_run_that_is_going_on(own_folder: Path) -> None:
    configured(own_folder, "output/cats")
    with made("cats", BEGUN).lock(), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        run(["start"])


def test_the_queue_is_listed(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["queue"]) == 0
    assert capsys.readouterr().out.startswith("The queue is empty.")
    queue = Queue.of(own_folder)
    queue.add(["--lora_rank=8"], "output/cats", "0")
    assert run(["queue"]) == 0
    head, entry, idle = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "state", "run", "devices", "since"]
    assert entry.split()[:4] == ["1", "waiting", "output/cats", "0"]
    assert idle == "No process works on the waiting runs: `simpletuner run queue resume` starts one."
    assert run(["queue", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["devices_without_a_worker"] == ["0"]
    assert told["entries"][0]["arguments"] == ["--lora_rank=8"]
    assert run(["queue", "remove", "1"]) == 0
    assert capsys.readouterr().out == "Queue entry 1, output/cats, is removed.\n"


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "simpletuner run start [--queue]" in capsys.readouterr().out
    assert main(["run", "queue", "add", "--help"]) == 0
    assert "usage: simpletuner run queue [list | remove ID" in capsys.readouterr().out
