"""Accessibility of every screen, in both themes and at three widths; and that nothing runs over the edge."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from tests.web.conftest import Server

from simpletuner.runs.events import EndEvent, EventLog, RunEvent, StepEvent, ValidationEvent
from simpletuner.runs.layout import RunDirectory

pytestmark = pytest.mark.slow

SCREENS = {
    "home": "#/",
    "configure": "#/configure/mine",
    "prompts": "#/configure/mine?tab=prompts",
    "datasets": "#/datasets/mine",
    "files": "#/files/",
    "run": "#/run?run=output/one",
    "checkpoints": "#/run?run=output/one&tab=checkpoints",
    "try": "#/run?run=output/one&tab=try",
    "log": "#/run?run=output/one&tab=log",
    "compare": "#/compare?runs=output/one,output/two",
}
WIDTHS = (1280, 768, 390)
SERIOUS = ("serious", "critical")


def finished_run(folder: Path, steps: int = 30) -> None:
    """What a run leaves, without its training."""
    run = RunDirectory(folder)
    run.create()
    run.config.write_text(json.dumps({"seed": 42, "lora_rank": 4}), encoding="utf-8")
    run.log.write_text("2026-11-25T00:00:00+00:00 Training.\n", encoding="utf-8")
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="simpletuner 0", pid=1, resumed_from=None, steps=steps, pictures=20, trainable=1000))
        for step in range(1, steps + 1):
            log.emit(StepEvent(step=step, epoch=0, loss=1 / step, lr=1e-3, grad_norm=0.5, seconds=0.1, memory_gib=1.0))
        log.emit(ValidationEvent(step=steps, loss=0.2, drift=0.1))
        log.emit(EndEvent(reason="done", exit_code=0, step=steps, seconds=3.0))


@pytest.fixture
def furnished(server: Server, workspace: Path) -> Server:
    """A workspace with an environment, its pictures, references and masks, and two runs."""
    example = Path(sys.modules["simpletuner"].__path__[0]) / "examples/tiny-lora"
    shutil.copytree(example, workspace / "config/mine", ignore=shutil.ignore_patterns("*.md"))
    from simpletuner.examples.pictures import materialize

    materialize("tiny-lora", workspace / "datasets/tiny-lora")
    datasets = workspace / "config/mine/multidatabackend.json"
    first, *others = json.loads(datasets.read_text())
    beside = {"id": "beside", "dataset_type": "conditioning", "instance_data_dir": first["instance_data_dir"]}
    masks = [{**beside, "id": kind, "conditioning_type": kind} for kind in ("reference_loose", "mask")]
    datasets.write_text(
        json.dumps([first | {"conditioning_data": ["reference_loose", "mask"]}, *others, *masks]), encoding="utf-8"
    )
    image = f"{first['instance_data_dir']}/{next((workspace / first['instance_data_dir']).glob('*.png')).name}"
    library = {"edit": {"prompt": "the same flag", "references": [image]}}
    (workspace / "config/mine/user_prompt_library.json").write_text(json.dumps(library), encoding="utf-8")
    finished_run(workspace / "output/one")
    finished_run(workspace / "output/two", steps=20)
    return server


def look(page: Page, server: Server, screen: str) -> None:
    page.goto(f"{server.url}/{SCREENS[screen]}")
    page.wait_for_selector("main h1")
    page.wait_for_load_state("networkidle") if screen not in ("run", "log") else page.wait_for_timeout(1000)
    page.wait_for_timeout(500)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_screen_fits_and_axe_finds_nothing_serious(browser: Browser, furnished: Server, scheme: str) -> None:
    found: dict[str, list[str]] = {}
    # Widths do not depend on the theme: the one between is looked at once.
    for width in WIDTHS if scheme == "light" else (WIDTHS[0], WIDTHS[-1]):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for screen in SCREENS:
            page = context.new_page()
            look(page, furnished, screen)
            faults = []
            if (needed := page.evaluate("document.documentElement.scrollWidth")) > width:
                faults.append(f"it is {needed} wide")
            if width != 768:
                faults += [
                    f"{violation['id']}: {violation['nodes'][0]['html'][:160]}"
                    for violation in Axe().run(page).response["violations"]
                    if violation["impact"] in SERIOUS
                ]
            if faults:
                found[f"{screen} at {width}"] = faults
            page.close()
        context.close()
    assert found == {}
