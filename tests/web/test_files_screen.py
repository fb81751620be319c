"""Files on the page: one is inspected by dropping it, a LoRA is downloaded in another format, two are merged."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from safetensors.torch import load_file
from tests.lora_dialects import write_dialect
from tests.web.test_looks import SERIOUS, finished_run

from simpletuner.config.flavours import TINY
from simpletuner.runs.events import EndEvent, EventLog
from simpletuner.runs.layout import RunDirectory

if TYPE_CHECKING:
    from tests.web.conftest import Server, Watched

LONG_MS = 60_000
DROP = """(node, bytes) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], "theirs.safetensors"));
  for (const type of ["dragenter", "dragover", "drop"]) {
    node.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""


@pytest.mark.slow
def test_files_are_inspected_converted_and_merged(
    page: Page, server: "Server", watched: "Watched", workspace: Path, tmp_path: Path
) -> None:
    watched.allowed = lambda text: "422" in text  # of a conversion that loses something
    page.set_default_timeout(LONG_MS)
    for seed, name in enumerate(("flügge 2", "portraits")):
        finished_run(workspace / "output" / name)
        run = RunDirectory(workspace / "output" / name)
        write_dialect(run.lora, TINY, "1 diffusers", seed=seed)
        with EventLog(run.events) as log:
            log.emit(EndEvent(reason="done", exit_code=0, step=30, seconds=3.0, lora=run.lora.name))
    theirs = tmp_path / "theirs.safetensors"
    write_dialect(theirs, TINY, "4 musubi-tuner", header={"ss_steps": "900"}, blocks_only=True)

    page.goto(f"{server.url}/#/files/")
    page.locator(".drop").evaluate(DROP, list(theirs.read_bytes()))
    report = page.get_by_role("article")
    expect(report.get_by_text("LoRA for FLUX.2 tiny")).to_be_visible(timeout=LONG_MS)
    expect(report.get_by_role("listitem")).to_have_text(["diffusers loads", "ComfyUI loads"])
    report.get_by_text("Training metadata").click()
    expect(report.get_by_role("definition").filter(has_text="900")).to_be_visible()
    report.get_by_text("How much it changes each block").click()
    expect(report.get_by_role("rowheader", name="transformer_blocks.1", exact=True)).to_be_visible()
    serious = [one["id"] for one in Axe().run(page).response["violations"] if one["impact"] in SERIOUS]
    assert serious == []
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 800})

    page.get_by_label("Strength").last.fill("0.5")
    page.get_by_label("Rank").fill("8")
    with page.expect_download(timeout=LONG_MS) as download:
        page.get_by_role("button", name="Merge and download").click()
    merged = load_file(download.value.path())
    merging = page.get_by_role("region", name="Merge LoRAs")
    expect(merging).to_contain_text("layers of rank 8, with all of its energy")
    expect(merging).to_contain_text("ComfyUI does not apply")
    assert merged.keys() == load_file(run.lora).keys()

    page.goto(f"{server.url}/#/run?run=output/flügge%202&tab=checkpoints")
    page.get_by_label("Format", exact=True).select_option("kohya")
    page.get_by_role("button", name="Download in this format").click()
    asking = page.get_by_role("dialog")
    expect(asking).to_contain_text(re.compile("diffusers"), timeout=LONG_MS)
    expect(asking).not_to_contain_text("--allow-loss")
    with page.expect_download(timeout=LONG_MS) as download:
        asking.get_by_role("button", name="Download anyway").click()
    assert download.value.suggested_filename == "flügge 2-kohya.safetensors"
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("dialog").get_by_text("loads partly")).to_be_visible(timeout=LONG_MS)

    # A run's own format is not among the others.
    run.config.write_text(json.dumps({"lora_format": "kohya"}))
    page.goto(f"{server.url}/#/run?run=output/portraits&tab=checkpoints")
    expect(page.get_by_label("Format", exact=True).locator("option")).to_have_text(["diffusers", "ComfyUI", "BFL"])
