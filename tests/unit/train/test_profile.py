"""Traces of steps: whole files or none."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from simpletuner.base.errors import Stopped
from simpletuner.train import profile
from simpletuner.train.profile import StepProfiler
from simpletuner.train.report import Reporter

CPU = torch.device("cpu")


def run(folder: Path, steps: range, through: range, *, stop_at: int | None = None) -> None:
    with StepProfiler(folder, steps, CPU, Reporter()) as profiler:
        for step in through:
            profiler.begin(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.randn(64, 64) @ torch.randn(64, 64)
            if step == stop_at:
                raise Stopped.of("asked to stop")
            profiler.end(step)


def traced(path: Path) -> set[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def test_it_records_its_steps_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "profile", range(2, 4), range(1, 6))
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"steps-2-3.json.gz", "steps-2-3.txt"}
    names = traced(tmp_path / "profile" / "steps-2-3.json.gz")
    assert {"step 2", "step 3", "aten::mm"} <= names
    assert not {"step 1", "step 4"} & names
    assert "aten::mm" in (tmp_path / "profile" / "steps-2-3.txt").read_text()
    assert "steps-2-3.json.gz" in capsys.readouterr().out


def test_without_steps_it_leaves_nothing(tmp_path: Path) -> None:
    run(tmp_path / "profile", range(0), range(1, 4))
    assert not (tmp_path / "profile").exists()


def test_what_breaks_off_leaves_nothing_and_a_resumed_run_records_the_rest(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "profile", range(2, 5), range(1, 6), stop_at=3)
    assert not (tmp_path / "profile").exists()
    run(tmp_path / "profile", range(2, 5), range(4, 6))
    assert "step 4" in traced(tmp_path / "profile" / "steps-4-4.json.gz")


def test_a_large_trace_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "LARGE_TRACE_BYTES", 10)
    run(tmp_path / "profile", range(1, 2), range(1, 2))
    assert "fewer profile_steps make" in capsys.readouterr().out
