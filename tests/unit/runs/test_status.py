import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from simpletuner.runs.events import (
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
from simpletuner.runs.status import find_runs, status_of


def begun(steps: int = 10, resumed_from: int | None = None) -> RunEvent:
    return RunEvent(program="simpletuner", pid=1, resumed_from=resumed_from, steps=steps, pictures=2, trainable=3)


def step(number: int, loss: float = 0.5) -> StepEvent:
    return StepEvent(step=number, epoch=0, loss=loss, lr=1e-4, grad_norm=1, seconds=0.25, memory_gib=1)


def ended(reason: Any, exit_code: int, at: int, lora: str | None = None) -> EndEvent:
    return EndEvent(reason=reason, exit_code=exit_code, step=at, seconds=1, lora=lora)


def attempt(run: RunDirectory, *events: Event) -> None:
    with EventLog(run.events) as log:
        for event in events:
            log.emit(event)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.create()
    return found


def test_a_folder_without_events_is_new(run: RunDirectory, tmp_path: Path) -> None:
    assert status_of(run).state == "new"
    assert status_of(RunDirectory(tmp_path / "nowhere")).state == "new"
    run.events.touch()
    assert status_of(run).state == "new"


def test_a_run_is_running_while_its_lock_is_held(run: RunDirectory) -> None:
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"), step(1), step(2, loss=0.25))
    with run.lock():
        status = status_of(run)
        assert (status.state, status.phase, status.step, status.steps) == ("running", "train", 2, 10)
        assert (status.loss, status.seconds_per_step) == (0.25, 0.25)
        assert status.pid is not None
        assert status.ended is None
    status = status_of(run)
    assert (status.state, status.pid, status.phase) == ("killed", None, "train")


@pytest.mark.parametrize(("reason", "code", "state"), [("done", 0, "done"), ("stopped", 75, "stopped")])
def test_an_end_is_told(run: RunDirectory, reason: str, code: int, state: str) -> None:
    lora = "pytorch_lora_weights.safetensors" if reason == "done" else None
    attempt(run, begun(), step(1), ended(reason, code, 1, lora=lora), NoticeEvent(text="from a tracker"))
    status = status_of(run)
    assert (status.state, status.exit_code, status.error) == (state, code, None)
    assert status.lora == (run.lora if lora else None)
    assert status.ended is not None


def test_an_error_keeps_its_text_and_the_steps_before_it(run: RunDirectory) -> None:
    attempt(run, begun(), step(7), ended("stopped", 75, 7))
    attempt(run, ErrorEvent(exit_code=6, text="other settings"), ended("error", 6, 0))
    status = status_of(run)
    assert (status.state, status.error, status.exit_code) == ("failed", "other settings", 6)
    assert (status.step, status.steps, status.attempt) == (7, 10, 1)


REFUSED = (PhaseEvent(phase="scan", state="begin"), ErrorEvent(exit_code=3, text="no captions"), ended("error", 3, 0))


def test_starts_that_are_refused_are_no_attempts_and_the_last_error_is_told(run: RunDirectory) -> None:
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"), step(7), ended("stopped", 75, 7))
    attempt(run, *REFUSED)
    attempt(run, ErrorEvent(exit_code=5, text="no room"), ended("error", 5, 0), NoticeEvent(text="from a tracker"))
    status = status_of(run)
    assert (status.state, status.attempt, status.starts, status.is_refused) == ("failed", 1, 3, True)
    assert (status.step, status.error, status.exit_code) == (7, "no room", 5)
    with run.lock():  # the next start, before its first event
        assert (status_of(run).attempt, status_of(run).is_refused) == (2, False)
    attempt(run, begun(resumed_from=7), PhaseEvent(phase="train", state="begin"))
    status = status_of(run)
    assert (status.state, status.attempt, status.starts, status.is_refused) == ("killed", 2, 4, False)


def test_memory_that_runs_out_before_the_first_step_refuses_a_start_and_later_does_not(run: RunDirectory) -> None:
    out_of_memory = (ErrorEvent(exit_code=5, text="out of memory"), ended("error", 5, 0))
    attempt(run, begun(), *out_of_memory)
    assert (status_of(run).attempt, status_of(run).is_refused) == (0, True)
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"), *out_of_memory)
    assert (status_of(run).attempt, status_of(run).is_refused) == (1, False)


def test_a_finished_run_stays_done_when_a_start_is_refused(run: RunDirectory) -> None:
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"), step(10), ended("done", 0, 10, lora="x"))
    run.finished.touch()
    run.lora.touch()
    attempt(run, *REFUSED)
    status = status_of(run)
    assert (status.state, status.attempt, status.lora) == ("done", 1, run.lora)
    assert (status.is_refused, status.error, status.exit_code) == (True, "no captions", 3)


def test_starts_in_the_file_of_an_older_release_are_all_attempts(run: RunDirectory) -> None:
    attempt(run, begun(), step(7), ended("stopped", 75, 7))
    attempt(run, *REFUSED)
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    for line in lines:
        line["attempt"] = line.pop("start")  # as every start was counted then
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = status_of(run)
    assert (status.attempt, status.starts, status.is_refused, status.error) == (2, 2, False, "no captions")
    attempt(run, *REFUSED)
    assert (status_of(run).attempt, status_of(run).starts) == (2, 3)
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"))
    assert (status_of(run).attempt, status_of(run).starts) == (3, 4)


def test_the_last_attempt_counts(run: RunDirectory) -> None:
    attempt(run, begun(), step(7), ErrorEvent(exit_code=7, text="disk full"), ended("error", 7, 7))
    attempt(run, begun(steps=20, resumed_from=5))
    status = status_of(run)
    assert (status.state, status.error, status.step, status.steps) == ("killed", None, 5, 20)
    attempt(run, begun(steps=20, resumed_from=None))
    assert status_of(run).step == 0


def test_the_phase_is_the_innermost_that_is_open(run: RunDirectory) -> None:
    scan = (PhaseEvent(phase="scan", state="begin"), PhaseEvent(phase="scan", state="end"))
    attempt(run, *scan, PhaseEvent(phase="text", state="begin"))
    assert (status_of(run).phase, status_of(run).progress) == ("text", None)
    attempt(run, *scan, ProgressEvent(phase="latents", done=3, total=9, per_s=1, eta_s=6))
    assert (status_of(run).phase, status_of(run).progress) == ("latents", (3, 9))
    drawing = PhaseEvent(phase="validation", state="begin")
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"), step(1), drawing)
    assert status_of(run).phase == "validation"
    attempt(
        run, begun(), PhaseEvent(phase="train", state="begin"), drawing, drawing.model_copy(update={"state": "end"})
    )
    assert status_of(run).phase == "train"


def test_the_held_out_loss_is_the_first_and_the_last(run: RunDirectory) -> None:
    attempt(run, begun(), ValidationEvent(step=0, loss=0.9), ValidationEvent(step=0), step(1))
    assert status_of(run).held_out == (0.9, 0.9)
    attempt(run, step(2), ValidationEvent(step=2, loss=0.7), ValidationEvent(step=2), step(3))
    assert status_of(run).held_out == (0.9, 0.7)


def test_a_torn_or_damaged_line_is_passed_over(run: RunDirectory) -> None:
    attempt(run, begun(), step(1))
    with run.events.open("a") as file:
        file.write('{"damaged\n{"v": 1, "id": 3, "ty')
    assert (status_of(run).step, status_of(run).last_id) == (1, 2)


def test_lines_that_are_no_events_of_ours_are_passed_over(run: RunDirectory) -> None:
    attempt(run, begun(), step(1))
    with run.events.open("a") as file:
        for kind in ("run", "step", "phase", "progress", "end", "error", "validation"):
            file.write(f'{{"id": 3, "type": "{kind}", "attempt": 1, "time": "then"}}\n')
    assert (status_of(run).step, status_of(run).state) == (1, "killed")


def test_it_does_not_matter_how_blocks_fall(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(run, begun(), ValidationEvent(step=0, loss=0.9), *(step(n) for n in range(1, 9)), ValidationEvent(step=8))
    with run.events.open("a") as file:
        file.write('{"v": 1, "id": 30, "ty')
    whole = dataclasses.astuple(status_of(run))
    for size in (1, 7, 100, 150, 1000):
        monkeypatch.setattr("simpletuner.runs.events.BLOCK", size)
        assert dataclasses.astuple(status_of(run)) == whole


def test_a_long_run_is_told_at_once(run: RunDirectory) -> None:
    attempt(run, begun(), PhaseEvent(phase="train", state="begin"))
    line = {"v": 1, "time": "2026-01-01T00:00:00.000+00:00", "attempt": 1} | step(1).model_dump(mode="json")
    with run.events.open("a") as file:
        file.writelines(json.dumps({"id": number + 2} | line | {"step": number}) + "\n" for number in range(1, 100_001))
    began = time.process_time()  # what other programs take does not count
    status = status_of(run)
    assert time.process_time() - began < 0.25
    assert (status.step, status.steps, status.phase, status.last_id) == (100_000, 10, "train", 100_002)


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e/f", "a/inside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "events.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert [run.root.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "b/c"]
    assert [run.root.name for run in find_runs(tmp_path / "a", depth=0)] == ["a"]
    assert find_runs(tmp_path / "nowhere") == []
