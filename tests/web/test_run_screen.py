"""The screens of runs, over runs whose events this process writes as a trainer would."""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from simpletuner.runs.events import (
    EndEvent,
    ErrorEvent,
    EventLog,
    PhaseEvent,
    Picture,
    PlanEvent,
    RunEvent,
    StepEvent,
    ValidationEvent,
)
from simpletuner.runs.layout import RunDirectory

if TYPE_CHECKING:
    from tests.web.conftest import Server, Watched

POINTS = 100_000


def directory(workspace: Path, name: str, **config: object) -> RunDirectory:
    run = RunDirectory(workspace / "output" / name)
    run.create()
    run.config.write_text(json.dumps({"model_type": "lora", "seed": 42, **config}))
    run.datasets.write_text("[]")
    run.log.write_text("It began.\n")
    return run


def begin(log: EventLog, steps: int, resumed_from: int | None = None) -> None:
    log.emit(
        RunEvent(program="test", pid=1, resumed_from=resumed_from, steps=steps, pictures=1, trainable=1),
    )
    log.emit(PhaseEvent(phase="train", state="begin"))


def steps(log: EventLog, first: int, last: int, loss: float = 0.5) -> None:
    for step in range(first, last + 1):
        log.emit(
            StepEvent(step=step, epoch=0, loss=loss, lr=1e-4, grad_norm=1.0, seconds=0.5, memory_gib=2.0),
        )


def pictures(
    run: RunDirectory, log: EventLog, step: int, color: tuple[int, int, int], drift: float | None = None
) -> None:
    drawn = []
    for name in ("first", "second"):
        path = run.validation(step) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), color).save(path)
        relative = str(path.relative_to(run.root))
        drawn.append(Picture(name=name, prompt=f"a {name}", path=relative, width=64, height=64, seed=42))
    log.emit(ValidationEvent(step=step, pictures=tuple(drawn), loss=0.5, drift=drift))


def end(log: EventLog, step: int) -> None:
    log.emit(PhaseEvent(phase="train", state="end", seconds=1.0, memory_gib=2.0))
    log.emit(EndEvent(reason="done", exit_code=0, step=step, seconds=1.0))


def values(page: Page, column: str = "loss") -> dict[int, float]:
    """A column of the curves by step, as the page has it."""
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    with Path(download.value.path()).open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


@pytest.fixture
def gallery(workspace: Path) -> RunDirectory:
    run = directory(workspace, "gallery", validation_num_inference_steps=7)
    with EventLog(run.events) as log:
        begin(log, 20)
        for step in (0, 10, 20):
            pictures(run, log, step, (step * 10, 80, 120), drift=step / 1000)
        steps(log, 1, 20)
        end(log, 20)
    return run


@pytest.mark.slow
def test_several_processes_and_their_engine_are_told(page: Page, server: "Server", workspace: Path) -> None:
    run = directory(workspace, "many")
    with run.lock(), EventLog(run.events) as log:
        begin(log, 20)
        page.goto(f"{server.url}/#/run?run=output/many")
        facts = page.get_by_role("region", name="Status")
        expect(facts).to_contain_text("Step 0 of 20")
        expect(facts).not_to_contain_text("processes")
        log.emit(PlanEvent(plan={"processes": 2, "engine": "fsdp2"}, remedy=None))
        expect(facts).to_contain_text("2 processes, FSDP2")
        page.reload()
        expect(facts).to_contain_text("2 processes, FSDP2")
        log.emit(PlanEvent(plan={"processes": 1, "engine": "single"}, remedy=None))
        expect(facts).not_to_contain_text("processes")


@pytest.mark.slow
def test_a_page_that_lost_the_server_catches_up_without_a_gap(
    page: Page, server: "Server", workspace: Path, watched: "Watched"
) -> None:
    watched.allowed = lambda text: "net::ERR_" in text
    run = directory(workspace, "live")
    with run.lock(), EventLog(run.events) as log:
        begin(log, 200)
        steps(log, 1, 50)
        page.goto(f"{server.url}/#/run?run=output/live")
        expect(page.get_by_text("Step 50 of 200 (25 %)")).to_be_visible()
        steps(log, 51, 60)
        expect(page.get_by_text("Step 60 of 200 (30 %)")).to_be_visible()
        server.kill()
        steps(log, 61, 100)
        expect(page.get_by_text("The connection to the server is lost; the run continues.")).to_be_visible()
        server.start()
        expect(page.get_by_text("Step 100 of 200 (50 %)")).to_be_visible()
        expect(page.get_by_text("The connection to the server is lost")).to_be_hidden()
        assert list(values(page)) == list(range(1, 101))


@pytest.mark.slow
def test_a_later_attempt_replaces_the_steps_of_the_one_before(page: Page, server: "Server", workspace: Path) -> None:
    run = directory(workspace, "again")
    with run.lock(), EventLog(run.events) as log:
        begin(log, 100)
        steps(log, 1, 60, loss=0.5)
    page.goto(f"{server.url}/#/run?run=output/again")
    expect(page.get_by_text("The run ended without a message")).to_be_visible()
    with run.lock(), EventLog(run.events) as log:
        begin(log, 100, resumed_from=40)
        steps(log, 41, 70, loss=0.25)
        expect(page.get_by_text("Step 70 of 100 (70 %)")).to_be_visible()
        found = values(page)
        assert list(found) == list(range(1, 71))
        assert found[40] == 0.5
        assert found[41] == found[60] == found[70] == 0.25
    # A start that is refused is none, and says why.
    with run.lock(), EventLog(run.events) as log:
        log.emit(PhaseEvent(phase="scan", state="begin"))
        attempt = page.locator("dt", has_text="Attempt").locator("xpath=following-sibling::dd")
        expect(attempt).to_have_text("3")
        log.emit(ErrorEvent(exit_code=3, text="no image has a caption"))
        log.emit(EndEvent(reason="error", exit_code=3, step=0, seconds=1))
    expect(page.get_by_text("no image has a caption").first).to_be_visible()
    expect(attempt).to_have_text("2")
    page.reload()
    expect(attempt).to_have_text("2")


def test_a_run_that_is_killed_is_told(page: Page, server: "Server", workspace: Path) -> None:
    run = directory(workspace, "killed")
    with EventLog(run.events) as log:
        with run.lock():
            begin(log, 100)
            steps(log, 1, 3)
            page.goto(f"{server.url}/#/run?run=output/killed")
            expect(page.get_by_role("button", name="Stop")).to_be_visible()
        # No event tells of it: the page asks every few seconds.
        expect(page.get_by_text("The run ended without a message")).to_be_visible(timeout=15_000)
        expect(page.get_by_role("button", name="Start again")).to_be_visible()


def test_a_run_that_failed_says_why_and_what_to_do(page: Page, server: "Server", workspace: Path) -> None:
    run = directory(workspace, "failed")
    with EventLog(run.events) as log:
        begin(log, 100)
        log.emit(ErrorEvent(exit_code=4, text="Out of memory: expected less. Lower train_batch_size."))
        log.emit(EndEvent(reason="error", exit_code=4, step=0, seconds=1.0))
    page.goto(f"{server.url}/#/run?run=output/failed")
    expect(page.get_by_role("alert")).to_contain_text("Out of memory: expected less. Lower train_batch_size.")


@pytest.mark.slow
def test_of_100_000_points_the_cursor_draws_none_again(page: Page, server: "Server", workspace: Path) -> None:
    run = directory(workspace, "long")
    with EventLog(run.events) as log:
        begin(log, POINTS)
        for step in range(1, POINTS + 1):
            loss = 0.3 + 0.5 * math.exp(-step / 9000) + 0.05 * math.sin(step)
            log.emit(StepEvent(step=step, epoch=0, loss=loss, lr=1e-4, grad_norm=1, seconds=0.5, memory_gib=2))
        end(log, POINTS)
    page.goto(f"{server.url}/#/run?run=output/long")
    plot = page.get_by_role("slider", name="Loss", exact=True)
    plot.press("Home")
    expect(plot).to_have_attribute("aria-valuetext", re.compile(r"^step 1: raw 0\.8"))
    page.evaluate(
        """async () => {
            const { Chart } = await import("/page/chart.js");
            window.drawn = 0;
            for (const name of ["draw", "build"]) {
                const plain = Chart.prototype[name];
                Chart.prototype[name] = function (...given) {
                    window.drawn += 1;
                    return plain.apply(this, given);
                };
            }
        }"""
    )
    plot.press("End")
    for _ in range(10):
        plot.press("ArrowLeft")
    expect(plot).to_have_attribute("aria-valuetext", re.compile(r"^step 95000: raw 0\."))
    assert page.evaluate("window.drawn") == 0
    plot.press("+")
    expect(plot).to_have_attribute("aria-valuemin", "70000")
    assert page.evaluate("window.drawn") == 6


def test_charts_are_moved_zoomed_and_read_by_keyboard(page: Page, server: "Server", gallery: RunDirectory) -> None:
    page.goto(f"{server.url}/#/run?run=output/{gallery.root.name}")
    loss = page.get_by_role("slider", name="Loss", exact=True)
    rate = page.get_by_role("slider", name="Learning rate")
    loss.press("Home")
    loss.press("ArrowRight")
    expect(loss).to_have_attribute("aria-valuetext", "step 1: raw 0.5, smoothed 0.5")
    expect(rate).to_have_attribute("aria-valuetext", "step 1: 1e-4")
    drift = page.get_by_role("slider", name="Drift from the base")
    expect(drift).to_have_attribute("aria-valuetext", "step 1: live weights 0")
    drift.press("End")
    expect(drift).to_have_attribute("aria-valuetext", "step 20: live weights 0.02")
    assert values(page, "drift") == {0: 0.0, 10: 0.01, 20: 0.02}
    loss.press("Home")
    loss.press("ArrowRight")
    loss.press("+")
    expect(rate).to_have_attribute("aria-valuemax", "6")
    loss.press("Escape")
    expect(rate).to_have_attribute("aria-valuemax", "20")
    page.get_by_label("Logarithmic").check()
    page.get_by_label("Hide spikes").check()
    loss.press("ArrowLeft")
    expect(loss).to_have_attribute("aria-valuetext", "step 19: raw 0.5, smoothed 0.5")


def test_a_chart_is_zoomed_by_dragging_and_read_by_pointing(
    page: Page, server: "Server", gallery: RunDirectory
) -> None:
    page.goto(f"{server.url}/#/run?run=output/{gallery.root.name}")
    loss = page.get_by_role("slider", name="Loss", exact=True)
    area = loss.locator(".u-over").bounding_box()
    assert area is not None

    def move_to(share: float) -> None:
        page.mouse.move(area["x"] + share * area["width"], area["y"] + 30)

    move_to(0.53)
    expect(loss).to_have_attribute("aria-valuenow", "11")
    page.mouse.down()
    move_to(0.82)
    page.mouse.up()
    expect(loss).to_have_attribute("aria-valuemin", "10")
    expect(loss).to_have_attribute("aria-valuemax", "16")
    page.mouse.dblclick(area["x"] + 50, area["y"] + 30)
    expect(loss).to_have_attribute("aria-valuemax", "20")


@pytest.mark.slow
def test_the_gallery_opens_a_picture_beside_the_base(page: Page, server: "Server", gallery: RunDirectory) -> None:
    page.goto(f"{server.url}/#/run?run=output/{gallery.root.name}")
    expect(page.get_by_role("columnheader")).to_have_text(["Prompt", "Base", "Step 10", "Step 20"])
    large = page.locator(".large-pictures").get_by_role("button", name="second at step 20")
    assert large.bounding_box()["width"] > 400, "of a window of 1280 px"
    step = page.get_by_role("slider", name="Step", exact=True)
    step.press("ArrowLeft")
    expect(page.locator(".large-pictures img").first).to_have_attribute("alt", "first at step 10")
    step.press("End")
    page.get_by_label("Compare with the base").check()
    expect(page.locator(".large-pictures").get_by_role("slider")).to_have_count(2)
    page.get_by_label("Compare with the base").uncheck()
    large.click()
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("heading")).to_have_text("second, step 20")
    expect(viewer.get_by_role("definition")).to_have_text(["a second", "42", "64 × 64", "20", "7"])
    edge = viewer.get_by_role("slider")
    edge.press("End")
    expect(edge).to_have_attribute("aria-valuetext", "100 % step 0 (base), the rest step 20")
    viewer.get_by_role("button", name="Close").press("ArrowLeft")
    expect(viewer.get_by_role("heading")).to_have_text("second, step 10")
    page.keyboard.press("ArrowUp")
    expect(viewer.get_by_role("heading")).to_have_text("first, step 10")
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Download the image").click()
    assert download.value.suggested_filename == "first.png"
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


@pytest.fixture
def two(workspace: Path) -> Iterator[tuple[RunDirectory, RunDirectory]]:
    runs = directory(workspace, "one", lora_rank=8), directory(workspace, "other", lora_rank=16)
    for number, run in enumerate(runs):
        with EventLog(run.events) as log:
            begin(log, 10)
            pictures(run, log, 0, (200, 80 * number, 0))
            steps(log, 1, 10, loss=0.1 + number)
            end(log, 10)
    return runs


@pytest.mark.slow
def test_two_runs_are_chosen_and_compared(page: Page, server: "Server", two: tuple[RunDirectory, RunDirectory]) -> None:
    page.goto(server.url)
    for run in two:
        page.get_by_role("checkbox", name=f"Choose {run.root.name} to compare").check()
    page.get_by_role("button", name="Compare").click()
    table = page.get_by_role("region", name="Options that differ")
    expect(table.get_by_role("row")).to_have_count(2)
    expect(table).to_contain_text("lora_rank")
    loss = page.get_by_role("slider", name="Loss", exact=True)
    expect(loss).to_have_attribute("aria-valuetext", "step 10: one 0.1, other 1.1")
    expect(page.get_by_role("heading", name="Drift from the base")).to_be_hidden()
    page.get_by_role("checkbox", name="other").uncheck()
    expect(loss).to_have_attribute("aria-valuetext", "step 10: one 0.1")
    expect(page.get_by_role("img", name="first of one at step 0")).to_be_visible()
