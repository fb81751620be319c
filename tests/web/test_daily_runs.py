"""Daily use of runs by clicks: found, noted, sorted, filtered and deleted; the queue reordered; the tab's title."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import Server, Watched

from simpletuner.base.files import DirectoryLock
from simpletuner.runs.events import EndEvent, EventLog, PhaseEvent, RunEvent, StepEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue

pytestmark = pytest.mark.slow

expect.set_options(timeout=30_000)  # a page asks a server that was away with growing pauses

MANY = 60


def ran(workspace: Path, name: str, steps: int = 4, reason: str | None = "done", loss: float = 0.5) -> RunDirectory:
    """A run that made `steps` of 8 steps; without a reason it has not ended."""
    run = RunDirectory(workspace / "output" / name)
    run.create()
    run.config.write_text(json.dumps({"model_type": "lora", "model_flavour": "tiny"}))
    with EventLog(run.events) as log:
        log.emit(RunEvent(program="s", pid=1, resumed_from=None, steps=8, pictures=1, trainable=1))
        log.emit(PhaseEvent(phase="train", state="begin"))
        for step in range(1, steps + 1):
            log.emit(StepEvent(step=step, epoch=0, loss=loss, lr=1, grad_norm=1, seconds=1, memory_gib=1))
        if reason is not None:
            lora = run.lora.name if reason == "done" else None
            end = {"reason": reason, "exit_code": 0, "step": steps, "seconds": 1, "lora": lora}
            log.emit(EndEvent.model_validate(end))
    return run


def names(page: Page) -> list[str]:
    return page.get_by_role("region", name="List of runs").get_by_role("listitem").get_by_role("link").all_inner_texts()


def test_runs_are_found_noted_sorted_and_deleted(server: Server, page: Page, workspace: Path, watched: Watched) -> None:
    watched.allowed = lambda text: "404" in text or "409" in text
    for number in range(MANY):
        ran(workspace, f"plain-{number}")
    ran(workspace, "cats", reason="stopped", loss=0.125)
    page.goto(server.url)
    expect(page.get_by_text("61 runs")).to_be_visible()
    assert len(names(page)) == 40
    assert page.evaluate("document.documentElement.scrollHeight") < 2600
    page.get_by_role("button", name="Show 21 more").click()
    assert len(names(page)) == 61
    expect(page.get_by_role("list", name="Machine").get_by_text("Disk")).to_be_visible()

    # A note; and one that another page wrote meanwhile is not lost.
    page.get_by_role("button", name="Note on cats").click()
    RunDirectory(workspace / "output/cats").note.write_text("theirs\n")
    page.get_by_role("dialog").get_by_role("textbox").fill("rate too high")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("changed the note meanwhile. It now says:theirs")
    expect(page.get_by_role("dialog").get_by_role("textbox")).to_have_value("rate too high")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_have_count(0)

    page.get_by_label("Find").fill("TOO high")
    expect(page.get_by_text("1 of 61 runs")).to_be_visible()
    assert names(page) == ["cats"]
    page.get_by_label("Find").fill("")
    page.get_by_label("State").select_option("stopped")
    assert names(page) == ["cats"]
    page.get_by_label("State").select_option("all")
    page.get_by_label("Sort").select_option("lowest loss first")
    assert names(page)[0] == "cats"
    page.get_by_label("Sort").select_option("by name")
    assert names(page)[:3] == ["cats", "plain-0", "plain-1"]

    # Its screen says what a stop left; deleted elsewhere, the screen says so.
    page.get_by_role("link", name="cats").click()
    expect(page.get_by_text("stopped after step 4, and no checkpoint was saved")).to_be_visible()
    expect(page.get_by_text("rate too high")).to_be_visible()
    assert page.title() == "stopped · cats"
    other = page.context.new_page()
    other.goto(server.url)
    other.get_by_role("button", name="Delete cats").click()
    expect(other.get_by_role("dialog")).to_contain_text("in output/cats: ")
    other.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(other.get_by_text("cats was deleted.")).to_be_visible()
    expect(other.get_by_text("60 runs")).to_be_visible()
    assert not (workspace / "output/cats").exists()
    other.close()
    expect(page.get_by_text("This run no longer exists.")).to_be_visible()
    page.get_by_role("link", name="Back to the runs").click()
    expect(page.get_by_text("60 runs")).to_be_visible()


def test_the_title_tells_how_a_run_goes_and_the_queue_is_reordered(
    server: Server, page: Page, workspace: Path, watched: Watched
) -> None:
    watched.allowed = lambda text: "ERR_" in text
    done = ran(workspace, "old")
    live = ran(workspace, "live", reason=None)
    queue = Queue.of(workspace)
    for name in ("first", "second", "third"):
        queue.add(["--help"], f"output/{name}")
    lock: DirectoryLock = live.lock()
    with lock:
        page.goto(server.url)
        expect(page).to_have_title("50 % · live")
        # The queue, by click and by keyboard; the focus stays.
        page.get_by_role("button", name="Move output/third up").click()
        expect(page.get_by_role("region", name="Queue").get_by_role("row").nth(2)).to_contain_text("third")
        expect(page.get_by_role("button", name="Move output/third up")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="Queue").get_by_role("row").nth(1)).to_contain_text("third")
        expect(page.get_by_role("button", name="Move output/third up")).to_be_disabled()
        expect(page.get_by_role("button", name="Move output/third down")).to_be_focused()
        assert [entry.id for entry in queue.entries()] == [3, 1, 2]

        page.goto(f"{server.url}/#/run?run=output/old")
        expect(page.get_by_role("heading", name="old")).to_be_visible()
        expect(page.get_by_text("It works with the small built-in FLUX.2 only")).to_be_visible()
        expect(page).to_have_title("50 % · live")  # another run's screen
        page.goto(f"{server.url}/#/run?run=output/live")
        expect(page.get_by_role("heading", name="live")).to_be_visible()
        assert page.get_by_role("button", name="Delete").count() == 0
        with EventLog(live.events) as log:
            log._next_id, log.attempt = 7, 1
            log.emit(StepEvent(step=5, epoch=0, loss=0.5, lr=1, grad_norm=1, seconds=1, memory_gib=1))
            expect(page).to_have_title("62 % · live")
            server.kill()
            expect(page.get_by_text("The connection to the server is lost; the run continues.")).to_be_visible()
            server.start()
            expect(page.get_by_text("The connection to the server is lost")).to_be_hidden()
            log.emit(EndEvent(reason="error", exit_code=7, step=5, seconds=1))
    expect(page).to_have_title("failed · live")
    server.kill()
    expect(page.get_by_text(re.compile(r"The connection to the server is lost\. The page catches up"))).to_be_visible()
    assert done.root.exists()


def test_a_start_shows_as_starting_and_its_refusal_at_once(server: Server, page: Page, workspace: Path) -> None:
    """The folder of the example's images is in the way: only the started command finds out."""
    (workspace / "datasets").mkdir()
    (workspace / "datasets/tiny-lora").write_text("in the way")
    page.goto(server.url)
    page.get_by_role("button", name="Train the example").click()
    expect(page.get_by_role("heading", name="tiny-lora", level=1)).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("datasets/tiny-lora")
    expect(page).to_have_title("failed · tiny-lora")
    page.goto(server.url)
    expect(page.get_by_role("listitem").get_by_text("failed")).to_be_visible()
    # Mended, it starts; stopped before it began, it says that nothing was saved.
    (workspace / "datasets/tiny-lora").unlink()
    page.get_by_role("link", name="tiny-lora").click()
    page.get_by_role("button", name="Start again").click()
    expect(page.get_by_text("starting", exact=True).first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("The run was stopped before its first step: there was nothing to save.")).to_be_visible()
