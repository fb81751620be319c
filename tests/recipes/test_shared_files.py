"""Runs on two machines that share no file, and runs that torchrun restarts."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from tests.ranks import Ended, together
from tests.recipes.conftest import Workplace
from tests.recipes.processes import children, until
from tests.recipes.test_launch import started, steps_taken

from simpletuner.runs.checkpoints import steps
from simpletuner.runs.status import status_of
from simpletuner.train.checkpoint import read_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = ("--num_processes=2", "--num_machines=2", "--gradient_accumulation_steps=1", "--distributed_timeout_s=120")
CAPTIONS = ["a soft gradient, number 0", "a soft gradient, number 1"]
"""Of the training images: their contexts are cached."""
VALIDATED = {
    "validation_disable": False,
    "validation_resolution": "64",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "validation_drift_prompts": CAPTIONS,
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process imports large libraries, which takes long where others compute."""
    monkeypatch.setattr("tests.ranks.TIMEOUT_S", 500.0)
    monkeypatch.setitem(until.__globals__, "TIMEOUT_S", 500.0)


def train_on(machines: list[Workplace], *flags: str) -> list[Ended]:
    """`simpletuner train FLAGS` as a rank on each machine, in its working folder."""
    for machine in machines:
        machine.write()
    command = [sys.executable, "-P", "-m", "simpletuner", "train", *TWO, *flags]
    return together(len(machines), command, machines=len(machines), cwds=[machine.folder for machine in machines])


@pytest.mark.usefixtures("patience")
def test_two_machines_that_share_nothing_train_and_resume_as_one(
    cached_workplace: Workplace, uninterrupted: Workplace, tmp_path: Path
) -> None:
    first, second = cached_workplace, Workplace(tmp_path / "second")
    for name in ("cache", "datasets"):
        shutil.copytree(first.folder / name, second.folder / name)
    first.config |= VALIDATED
    first.prompts = {"one": CAPTIONS[0], "two": CAPTIONS[1]}
    second.config, second.prompts = first.config, first.prompts
    ended = train_on([first, second], "--max_train_steps=2")
    assert [each.exit_code for each in ended] == [0, 0], ended[0].err + ended[1].err
    assert "The 2 machines do not share output/run: machine 0 stores the run" in ended[0].out
    assert "Each of 2 machines fills its cache of images: they do not share cache/vae." in ended[0].out
    assert not (second.folder / "output").exists()
    # Machine 0 has drawn all images, and measured the drift.
    (event,) = [each for each in first.events("validation") if each["step"] == 2]
    assert len(event["pictures"]) == 2
    assert all((first.run().root / each["path"]).is_file() for each in event["pictures"])
    assert event["drift_by_prompt"].keys() == {*CAPTIONS}
    # A LoRA does not depend on the engine: FSDP2 goes on with what DDP has saved.
    ended = train_on([first, second], "--fsdp_enable")
    assert [each.exit_code for each in ended] == [0, 0], ended[0].err + ended[1].err
    assert "Resuming from step 2 of 3" in ended[0].out
    assert not (second.folder / "output").exists()
    assert first.losses() == uninterrupted.losses()
    assert first.run().lora.read_bytes() == uninterrupted.run().lora.read_bytes()


@pytest.mark.usefixtures("patience")
def test_torchrun_restarts_from_the_last_checkpoint_with_another_number_of_processes(
    cached_workplace: Workplace,
) -> None:
    """Three images a step, which two processes cannot share: a step has four from then on."""
    place = cached_workplace
    three = "--gradient_accumulation_steps=3"
    assert place.train_apart("--max_train_steps=4", three).returncode == 0
    torchrun = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, "--max-restarts=1", "-m", "simpletuner")
    flags = ("--max_train_steps=4000", "--checkpoint_step_interval=10", "--distributed_timeout_s=60")
    with started(place, three, *flags, command=command) as process:
        until(lambda: steps_taken(place) > 4 + 15, process)
        before = children(process.pid)
        os.kill(before[1], signal.SIGKILL)
        until(lambda: len(place.events("run")) == 3, process)
        resumed = place.events("run")[-1]
        after = children(process.pid)
        assert resumed["resumed_from"] in steps(place.run())
        assert resumed["resumed_from"] >= 10
        assert not {*before} & {*after}
        taken = steps_taken(place)
        until(lambda: steps_taken(place) > taken, process)
        process.send_signal(signal.SIGTERM)
        process.wait(500)
    assert (status_of(place.run()).state, place.events("run")[-1]["processes"]) == ("stopped", 2)
    state = read_state(place.run().checkpoint(steps(place.run())[-1]))
    assert [(cut.steps, cut.batches_per_step) for cut in state.cuts] == [(4, 3)]
    assert state.config["gradient_accumulation_steps"] == 2
    notices = [event["text"] for event in place.events("notice")]
    said = "From step 5 on, 2 processes with gradient_accumulation_steps = 2: a step has 4 images instead of 3."
    assert sum(said in text for text in notices) == 1
