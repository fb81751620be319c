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
from PIL import Image
from playwright.sync_api import Page, expect

from simpletuner.runs.events import EndEvent, EventLog, RunEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.samplers import SAMPLERS_FOLDER

if TYPE_CHECKING:
    from tests.web.conftest import Server, Watched

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
    for name, value in {
        "Width": "64",
        "Height": "64",
        "Sampler steps": "2",
        "Seed count": "2",
        "Strengths": "0, ¼",
    }.items():
        page.get_by_label(name, exact=True).fill(value)
    draw = page.get_by_role("button", name="Generate", exact=True)
    draw.click()
    assert "numbers from -10 to 10" in page.get_by_label("Strengths").evaluate("input => input.validationMessage")
    page.get_by_label("Strengths").fill("0, 0.5, 1.2")
    page.get_by_label("Prompts").press("Control+Enter")
    latest = page.get_by_role("region", name="Latest images")
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
    expect(page.get_by_text(re.compile(r"Generating: [1-9]\d* of"))).to_be_visible(timeout=LONG_MS)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Generating: cancelled.")).to_be_visible()
    assert samplers(workspace) == [first]

    # A run that starts has the memory, and the page says why the pictures do not come.
    draw.click()
    expect(page.get_by_text(re.compile(r"Generating: [1-9]\d* of"))).to_be_visible(timeout=LONG_MS)
    (workspace / "damaged.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-P", "-m", "simpletuner", *NEVER_TRAINS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert f"Ending process {first}, which keeps a model to generate images" in run.stdout
    expect(page.get_by_text("the sampler ended because a training run")).to_be_visible()
    assert samplers(workspace) == []


@pytest.mark.slow
def test_references_are_chosen_for_prompts_and_to_try(
    page: Page, server: "Server", workspace: Path, watched: "Watched"
) -> None:
    # A reference that is gone, a folder that is made with the first upload, and a request that is not to be answered.
    watched.allowed = lambda text: "404 (Not Found)" in text or "ERR_FAILED" in text
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    library = folder / "user_prompt_library.json"
    library.write_text('{"plain": "a cat", "edit": {"prompt": "the same cat", "references": ["references/gone.png"]}}')
    (workspace / "cats").mkdir()
    for name, color in (("cats/one.png", "red"), ("cats/two.png", "green"), ("three.png", "blue")):
        Image.new("RGB", (64, 48), color).save(workspace / name)

    page.goto(f"{server.url}/#/configure/mine?tab=prompts")
    prompts = page.locator(".prompt")
    expect(prompts.nth(1).get_by_text("cannot be shown: gone.png")).to_be_visible()
    prompts.nth(1).get_by_role("button", name="Remove reference 1").click()
    raw = page.get_by_label("The file", exact=True)
    expect(raw).to_have_value(re.compile(r'"edit": "the same cat"'))

    # From a folder, and from this computer; their order is changed; the text changes apart from them.
    prompts.nth(0).get_by_role("button", name="From a folder").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="cats", exact=True).click()
    for name in ("two.png", "one.png"):
        dialog.get_by_role("button", name=name).click()
    dialog.get_by_role("button", name="Choose", exact=True).click()
    expect(prompts.nth(0).get_by_role("img")).to_have_count(2)
    prompts.nth(0).get_by_label("References from this computer").set_input_files(workspace / "three.png")
    expect(prompts.nth(0).get_by_role("img")).to_have_count(3)
    prompts.nth(0).get_by_role("button", name="Move reference 3 to position 2").click()
    prompts.nth(0).get_by_label("Prompt", exact=True).fill("a dog")
    prompts.nth(0).get_by_label("Prompt", exact=True).blur()
    page.keyboard.press("Control+s")
    expect(page.get_by_text("Saved.")).to_be_visible()
    assert json.loads(library.read_text()) == {
        "plain": {"prompt": "a dog", "references": ["cats/two.png", "references/three.png", "cats/one.png"]},
        "edit": "the same cat",
    }
    assert (workspace / "references" / "three.png").is_file()

    run = RunDirectory(workspace / "output" / "mine")
    run.create()
    run.config.write_text('{"model_type": "lora", "seed": 42}')
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="test", pid=1, resumed_from=None, steps=1, pictures=1, trainable=1))
        log.emit(EndEvent(reason="done", exit_code=0, step=1, seconds=1.0))
    page.goto(f"{server.url}/#/run?run=output/mine&tab=try")
    page.get_by_label("Prompts").fill("a flag")
    page.get_by_label("References from this computer").set_input_files(workspace / "cats" / "one.png")
    expect(page.get_by_role("group", name="References").get_by_role("img")).to_have_count(1)
    page.reload()  # it is kept, like the other settings
    expect(page.get_by_role("group", name="References").get_by_role("img")).to_have_count(1)
    page.route("**/api/jobs/sample", lambda route: route.abort())
    with page.expect_request("**/api/jobs/sample") as asked:
        page.get_by_role("button", name="Generate", exact=True).click()
    assert asked.value.post_data_json["references"] == ["references/one.png"]
