"""Samplers: found by a run that starts, and ended where they have its GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.runs.samplers import SAMPLERS_FOLDER, first_gpu, registered_as_sampler, run_gpus, stop_samplers

HOLD = """
import os, sys, time
from pathlib import Path
from simpletuner.runs.samplers import registered_as_sampler
with registered_as_sampler(Path.cwd(), os.environ):
    print("held", flush=True)
    time.sleep(600)
"""


def sampler(folder: Path, word: str, gpu: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, word], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_ends_the_samplers_of_its_gpu_alone(tmp_path: Path) -> None:
    mine, other, foreign = (
        sampler(tmp_path, "--serve", "1"),
        sampler(tmp_path, "--serve", "0"),
        sampler(tmp_path, "x", "1"),
    )
    told: list[str] = []
    try:
        stop_samplers(tmp_path, {"CUDA_VISIBLE_DEVICES": "1,2"}, told.append)
        assert mine.wait(timeout=5) == -15
        assert other.poll() is None, "it has another GPU"
        assert foreign.poll() is None, "its number may be that of any process, where a disk is shared"
        described = f"process {mine.pid}, which keeps a model to generate images"
        assert told == [f"Ending {described}: this run needs its memory."]
        left = sorted(path.name for path in (tmp_path / SAMPLERS_FOLDER).iterdir())
        assert left == [f"0.{other.pid}.lock", f"1.{foreign.pid}.lock"]
    finally:
        for process in (mine, other, foreign):
            process.kill()
            process.communicate()


def test_without_samplers_nothing_is_made(tmp_path: Path) -> None:
    stop_samplers(tmp_path, {}, pytest.fail)
    assert list(tmp_path.iterdir()) == []
    with registered_as_sampler(tmp_path, {}):
        stop_samplers(tmp_path, {}, pytest.fail)  # this process is none that serves
    assert list((tmp_path / SAMPLERS_FOLDER).iterdir()) == []


@pytest.mark.parametrize(
    ("visible", "gpu"), [(None, "0"), ("", "0"), ("2", "2"), ("3, 1", "3"), ("MIG-a/b", "MIG-a_b")]
)
def test_the_gpu_that_computes_is_the_first_that_is_visible(visible: str | None, gpu: str) -> None:
    assert first_gpu({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == gpu


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, ["0"]),
        ({"LOCAL_WORLD_SIZE": "2"}, ["0", "1"]),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3, 5,7"}, ["3", "5"]),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, ["0", "1"]),
    ],
)
def test_a_run_of_several_processes_has_a_gpu_for_each(environ: dict[str, str], gpus: list[str]) -> None:
    assert run_gpus(environ) == gpus
