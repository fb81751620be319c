"""The page as a person uses it, by clicks alone, in a browser without a network."""

import csv
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import Server, Watched

from simpletuner.config.labels import LABELS

pytestmark = pytest.mark.slow
expect.set_options(timeout=30_000)  # a start waits until the run holds its folder

LONG_MS = 180_000
"""A few steps of the example with its caches, on a busy machine."""


def shorten(server: Server, steps: int, **options: object) -> None:
    """Start the server anew so that runs which it starts have fewer and smaller steps: the environment wins over the
    example.
    """
    server.kill()
    given = {"max_train_steps": steps, "train_batch_size": 1, "validation_num_inference_steps": 2, "lr_warmup_steps": 0}
    given |= options
    server.environment |= {f"SIMPLETUNER_{name.upper()}": str(value).lower() for name, value in given.items()}
    server.start()


@pytest.fixture
def prepared(example_folder: Path, workspace: Path) -> None:
    """What the example's first start draws and encodes is there."""
    for name in ("datasets", "cache"):
        shutil.copytree(example_folder / name, workspace / name)


def lost(text: str) -> bool:
    """What a browser says of a server that went away."""
    return "ERR_CONNECTION_REFUSED" in text or "ERR_INCOMPLETE_CHUNKED" in text


def steps_of(page: Page) -> list[int]:
    """The steps that the page's curves have, from the CSV it offers."""
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    with download.value.path().open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss"] != ""]


def wait_for_step(run: Path, step: int, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
        if any(f'"step": {step},' in line and '"type": "step"' in line for line in lines):
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} did not come to step {step}")


def test_the_example_by_clicks_alone(server: Server, page: Page, workspace: Path) -> None:
    shorten(server, 12, validation_step_interval=6, checkpoint_step_interval=6, eval_steps_interval=6)
    page.goto(server.url)
    page.get_by_role("button", name="Train the example").click()
    expect(page.get_by_role("heading", name="tiny-lora", level=1)).to_be_visible()
    # Loss and pictures arrive without a reload.
    expect(page.get_by_text("Step 12 of 12", exact=False)).to_be_visible(timeout=LONG_MS)
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    assert steps_of(page) == list(range(1, 13))
    pictures = page.get_by_role("region", name="Images").get_by_role("img")
    expect(pictures.first).to_be_visible()
    assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0

    with page.expect_download() as download:
        page.get_by_role("link", name="Download the LoRA").click()
    assert download.value.suggested_filename.endswith(".safetensors")
    assert (
        download.value.path().read_bytes()
        == (workspace / "output/tiny-lora/pytorch_lora_weights.safetensors").read_bytes()
    )

    page.get_by_role("tab", name="Checkpoints").click()
    expect(page.get_by_role("row", name=re.compile(r"^12\b"))).to_be_visible()

    page.get_by_role("tab", name="Try it").click()
    page.get_by_label("Prompts").fill("a large zorblat flag on a red background, left")
    page.get_by_label("Sampler steps").fill("2")
    page.get_by_role("button", name="Generate", exact=True).click()
    # The base, and beside it the LoRA at two strengths.
    tried = page.get_by_role("tabpanel", name="Try it").get_by_role("img")
    expect(tried).to_have_count(3, timeout=LONG_MS)
    assert tried.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.mark.usefixtures("prepared")
def test_a_killed_server_loses_nothing(server: Server, page: Page, workspace: Path, watched: Watched) -> None:
    """The run goes on, and the page catches up by itself, without a gap."""
    watched.allowed = lost
    shorten(server, 60, validation_disable=True, checkpoint_step_interval=30, eval_steps_interval=30)
    run = workspace / "output/tiny-lora"
    page.goto(server.url)
    page.get_by_role("button", name="Train the example").click()
    expect(page.get_by_text("of 60 (", exact=False)).to_be_visible(timeout=LONG_MS)
    wait_for_step(run, 5)
    server.kill()
    expect(page.get_by_text("The connection to the server is lost", exact=False)).to_be_visible(timeout=LONG_MS)
    wait_for_step(run, 20)
    server.start()
    expect(page.get_by_text("Step 60 of 60", exact=False)).to_be_visible(timeout=LONG_MS)
    expect(page.get_by_text("The connection to the server is lost", exact=False)).to_be_hidden()
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    assert steps_of(page) == list(range(1, 61))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert {event["attempt"] for event in events} == {1}


@pytest.mark.usefixtures("prepared")
def test_stopped_and_resumed_by_clicks(server: Server, page: Page, workspace: Path, watched: Watched) -> None:
    watched.allowed = lost
    shorten(server, 400, validation_disable=True, checkpoint_step_interval=0)
    run = workspace / "output/tiny-lora"
    page.goto(server.url)
    page.get_by_role("button", name="Train the example").click()
    wait_for_step(run, 3)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("The run was stopped and saved", exact=False)).to_be_visible(timeout=LONG_MS)
    last = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    shorten(server, last + 3)
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    assert steps_of(page) == list(range(1, last + 4))


@pytest.mark.usefixtures("prepared")
def test_a_config_of_the_page_and_one_by_hand_give_the_same_run(server: Server, page: Page, workspace: Path) -> None:
    """Made and changed by clicks, against the same files written by hand: the same losses to the last bit."""
    page.goto(f"{server.url}/#/configure")
    page.get_by_role("button", name="From an example").click()
    page.get_by_role("dialog").get_by_label("Name").fill("clicked")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_label("LoRA rank", exact=True)).to_have_value("32")
    changes = {"lora_rank": 4, "max_train_steps": 3, "train_batch_size": 1, "lr_warmup_steps": 0}
    changes |= {"eval_steps_interval": 400}
    for name, value in changes.items():
        page.get_by_label(LABELS[name], exact=True).fill(str(value))
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Saved.")).to_be_visible()

    made = workspace / "config/clicked"
    by_hand = workspace / "config/by-hand"
    by_hand.mkdir()
    for path in made.iterdir():
        (by_hand / path.name).write_bytes(path.read_bytes())
    values = json.loads((made / "config.json").read_text())
    assert {name: values[name] for name in changes} == changes
    example = Path(__file__).parents[2] / "src/simpletuner/examples/tiny-lora/config.json"
    own = json.loads(example.read_text()) | changes | {"output_dir": "output/by-hand"}
    (by_hand / "config.json").write_text(json.dumps(own))

    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    page.goto(f"{server.url}/#/configure/by-hand")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", name="by-hand", level=1)).to_be_visible()
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    clicked, typed = (
        (workspace / "output" / name / "pytorch_lora_weights.safetensors").read_bytes()
        for name in ("clicked", "by-hand")
    )
    assert weights(clicked) == weights(typed)


def weights(file: bytes) -> bytes:
    """What follows the header, which names the day."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_the_quickstarts_files_load_and_only_their_output_folder_is_out_of_reach(
    server: Server, page: Page, workspace: Path
) -> None:
    snippets = Path(__file__).parents[1] / "fixtures/quickstart"
    folder = workspace / "config"
    folder.mkdir()
    names = {"config.json", "multidatabackend.json", "user_prompt_library.json"}
    for name in names:
        (folder / name).write_bytes((snippets / name).read_bytes())
    (workspace / "datasets/my-dataset").mkdir(parents=True)
    page.goto(f"{server.url}/#/configure")
    expect(page.get_by_label("LoRA rank", exact=True)).to_have_value("16")
    # /path/to/output stands for a folder of the user's.
    mending = page.get_by_role("list").filter(has_text="output_dir = '/path/to/output' lies outside the folders")
    expect(mending.get_by_role("listitem")).to_have_count(1)
    expect(page.get_by_text("1 problem to fix")).to_be_visible()
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (snippets / name).read_bytes()


def test_an_edit_outside_is_noticed_and_not_overwritten(
    server: Server, page: Page, workspace: Path, watched: Watched
) -> None:
    watched.allowed = lambda text: "409 (Conflict)" in text
    page.goto(f"{server.url}/#/configure")
    page.get_by_role("button", name="From an example").click()
    page.get_by_role("dialog").get_by_label("Name").fill("mine")
    page.get_by_role("button", name="Create").click()
    page.get_by_label("LoRA rank", exact=True).fill("8")
    config = workspace / "config/mine/config.json"
    text = config.read_text().replace('"learning_rate": 0.002', '"learning_rate": 0.001')
    assert "0.001" in text
    config.write_text(text)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert config.read_text() == text
    assert os.stat(config).st_size == len(text.encode())
