"""A finished run is complete: what a kill, a user or a disk took of its results is made from its last checkpoint."""

import fcntl
import json
import shutil
import signal
from pathlib import Path

import pytest
from tests.recipes.conftest import Workplace

from simpletuner.runs import checkpoints
from simpletuner.runs.events import StepEvent, read_events
from simpletuner.runs.layout import EMA_FOLDER, LORA_NAME, RunDirectory
from simpletuner.train.report import TrainingBar

DRAWN = {
    "validation_disable": False,
    "validation_resolution": "32x32",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "use_ema": True,
    "ema_decay": 0.5,
}
PROMPTS = {"one": "a gradient", "two": "a line"}


def content(run: RunDirectory) -> dict[str, bytes]:
    """What a run offers and shows: every result, checkpoint and image. JSON that holds times is left out."""
    kinds = ("*.safetensors", "*.png", "state.json", ".*")
    return {
        str(path.relative_to(run.root)): path.read_bytes()
        for kind in kinds
        for path in run.root.rglob(kind)
        if path.is_file()
    }


def sheets_told(run: RunDirectory) -> set[int]:
    return {event["step"] for event in read_events(run.events, kinds=("validation",)) if event["sheet"]}


@pytest.fixture(scope="session")
def whole(shared_folder: Path, uninterrupted: Workplace) -> Workplace:
    """A run that draws and averages, left alone. One for all workers."""
    place = Workplace(shared_folder / "drawn", uninterrupted.config | DRAWN, prompts=PROMPTS)
    with (shared_folder / "drawn.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.run().finished.exists():
            shutil.copytree(uninterrupted.folder / "datasets", place.folder / "datasets")
            done = place.train_apart()
            assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["validation:1", "sheet:0", "told:0", "sheet:3", "told:3", "export:1", "export:2"])
def test_killed_while_it_draws_or_exports_it_is_complete_at_the_next_start(
    workplace: Workplace, whole: Workplace, moment: str
) -> None:
    shutil.copytree(whole.folder / "cache", workplace.folder / "cache")
    workplace.prompts = PROMPTS
    workplace.config |= DRAWN
    killed = workplace.train_apart(kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = workplace.run()
    assert not run.finished.exists()
    assert workplace.train() == 0
    assert content(run) == content(whole.run())
    assert sheets_told(run) == {0, 2, 3}
    listed = json.loads(run.finished.read_text())["products"]
    assert set(listed) == {LORA_NAME, f"{EMA_FOLDER}/{LORA_NAME}"}
    assert workplace.events("end")[-1]["ema_lora"] == f"{EMA_FOLDER}/{LORA_NAME}"
    before = run.finished.stat().st_mtime_ns
    assert workplace.train() == 0
    assert run.finished.stat().st_mtime_ns == before


def test_a_finished_run_says_so_and_what_is_missing_or_damaged_of_it_is_made_again_without_loading_a_model(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    place, run = cached_workplace, cached_workplace.run()
    place.config |= {"use_ema": True, "max_train_steps": 1}
    assert place.train() == 0
    whole, written = content(run), run.lora.stat().st_mtime_ns
    assert place.train() == 0
    assert "This run is finished: 1 steps" in capsys.readouterr().out
    assert run.lora.stat().st_mtime_ns == written
    run.ema_lora.unlink()
    run.lora.write_bytes(run.lora.read_bytes()[:-1] + b"x")
    assert place.train() == 0
    told = capsys.readouterr().out
    assert (
        f"{EMA_FOLDER}/{LORA_NAME} is missing: exporting the results again from output/run/checkpoints/step-000001."
        in told
    )
    assert content(run) == whole
    run.finished.unlink()  # as a release left it that wrote none
    assert place.train() == 0
    assert "finished.json is missing: exporting the results again from" in capsys.readouterr().out
    assert content(run) == whole
    assert [event["phase"] for event in place.events("phase")].count("load") == 2  # begin and end, of the first start


@pytest.mark.slow
def test_a_run_that_goes_on_is_finished_no_longer(cached_workplace: Workplace) -> None:
    place = cached_workplace
    assert place.train("--max_train_steps=1") == 0
    killed = place.train_apart(kill_at="step:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not place.run().finished.exists()
    assert place.train("--max_train_steps=2") == 0
    assert json.loads(place.run().finished.read_text())["step"] == 2


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_replaced_it_is_there_at_the_next_start(cached_workplace: Workplace) -> None:
    place = cached_workplace
    assert place.train() == 0
    before = content(place.run())
    first = place.run().checkpoint(1)
    killed = place.train_apart(f"--resume_from_checkpoint={first}", kill_at="replace:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints.steps(place.run()) == [1, 3]
    assert place.train() == 0
    assert [found.damage for found in checkpoints.newest_first(place.run())] == [None, None, None]
    assert content(place.run()) == before


@pytest.mark.slow
def test_a_request_for_what_is_due_anyway_is_met_by_it(
    cached_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cached_workplace
    place.prompts = {"one": "a gradient"}
    place.config |= DRAWN | {"use_ema": False, "checkpoint_step_interval": 2, "max_train_steps": 4}
    shown = TrainingBar.step

    def ask_at_step_2(self: TrainingBar, event: StepEvent) -> None:
        shown(self, event)
        if event.step == 2:
            (place.run().control / "save").touch()
            (place.run().control / "validate").touch()

    monkeypatch.setattr(TrainingBar, "step", ask_at_step_2)
    assert place.train() == 0
    assert [event["step"] for event in place.events("checkpoint") if event["state"] == "saved"] == [2, 4]
    assert [event["step"] for event in place.events("validation")] == [0, 2, 4]
