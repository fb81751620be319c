"""Trying a LoRA on the page: a grid of strengths and seeds, drawn by one process that keeps its model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from simpletuner.runs.events import EndEvent, EventLog, RunEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.samplers import SAMPLERS_FOLDER

if TYPE_CHECKING:
    from tests.web.conftest import Server

LONG_MS = 120_000
NEVER_TRAINS = ("train", "--example", "tiny-lora", "--init_lora=damaged.safetensors")
"""Ends with an error once it has taken the GPU."""


@pytest.fixture
def trained(workspace: Path, tiny_folder: Path, acting_lora: Path) -> RunDirectory:
    """A run that is done."""
    run = RunDirectory(workspace / "output" / "mine")
    run.create()
    shutil.copytree(tiny_folder, workspace / "model")  # where the page may read it
    model = {"model_flavour": "tiny", "pretrained_model_name_or_path": "model"}
    run.config.write_text(json.dumps({"model_type": "lora", "seed": 42, **model}))
    shutil.copyfile(acting_lora, run.lora)
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="test", pid=1, resumed_from=None, steps=1, pictures=1, trainable=1))
        log.emit(EndEvent(reason="done", exit_code=0, step=1, seconds=1.0, lora=run.lora.name))
    return run


def samplers(workspace: Path) -> list[int]:
    return [int(path.name.split(".")[1]) for path in (workspace / SAMPLERS_FOLDER).glob("*.lock")]


@pytest.mark.slow
def test_a_grid_of_strengths_comes_picture_by_picture_from_one_sampler(
    page: Page, server: "Server", workspace: Path, trained: RunDirectory
) -> None:
    url = f"{server.url}/#/run?run=output/{trained.root.name}&tab=try"
    page.goto(url)
    page.get_by_label("Prompts").fill("a flag")
    for name, value in {"Width": "64", "Height": "64", "Sampler steps": "2", "Seeds": "2", "Strengths": "0, ¼"}.items():
        page.get_by_label(name, exact=True).fill(value)
    draw = page.get_by_role("button", name="Draw", exact=True)
    draw.click()
    assert "numbers from -10 to 10" in page.get_by_label("Strengths").evaluate("input => input.validationMessage")
    page.get_by_label("Strengths").fill("0, 0.5, 1.2")
    page.get_by_label("Prompts").press("Control+Enter")
    latest = page.get_by_role("region", name="Latest pictures")
    expect(latest.get_by_role("img")).to_have_count(6, timeout=LONG_MS)
    expect(latest.get_by_role("columnheader")).to_have_text(["Base", "Strength 0.5", "Strength 1.2"])
    expect(latest.get_by_role("rowheader")).to_have_text(["Seed 42", "Seed 43"])
    (first,) = samplers(workspace)

    latest.get_by_role("button", name="strength 0.5, seed 43").click()
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("heading")).to_have_text("Seed 43, strength 0.5")
    page.keyboard.press("ArrowRight")
    expect(viewer.get_by_role("heading")).to_have_text("Seed 43, strength 1.2")
    expect(viewer.get_by_role("combobox")).to_have_value("0")  # compared with the base
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        latest.get_by_role("link", name="Download").first.click()
    assert download.value.suggested_filename.startswith("a-flag_64x64_42")

    page.reload()  # the settings are kept, the pictures are there, the next one comes from the same process
    expect(page.get_by_label("Strengths")).to_have_value("0, 0.5, 1.2")
    expect(page.get_by_role("region", name="Samples").get_by_role("img")).to_have_count(6)
    for name, value in {"Width": "256", "Height": "256", "Sampler steps": "400"}.items():
        page.get_by_label(name, exact=True).fill(value)
    draw.click()
    expect(page.get_by_text(re.compile(r"drawing, [1-9]\d* of"))).to_be_visible(timeout=LONG_MS)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Drawing: cancelled.")).to_be_visible()
    assert samplers(workspace) == [first]

    # A run that starts has the memory, and the page says why the pictures do not come.
    draw.click()
    expect(page.get_by_text(re.compile(r"drawing, [1-9]\d* of"))).to_be_visible(timeout=LONG_MS)
    (workspace / "damaged.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-P", "-m", "simpletuner", *NEVER_TRAINS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert f"Process {first}, which kept a model to draw with, is ended" in run.stdout
    expect(page.get_by_text("the sampler gave way to a training run")).to_be_visible()
    assert samplers(workspace) == []
