"""What Configure begins with, by clicks: three choices, a sentence, and a form that stays short."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.web.conftest import Server

from simpletuner.config.recipes import recipe
from simpletuner.config.run import SLICES

pytestmark = pytest.mark.slow

LONG_MS = 180_000
EXAMPLE = Path(__file__).parents[2] / "src/simpletuner/examples/tiny-lora"


@pytest.fixture
def example_images(workspace: Path) -> None:
    from simpletuner.examples.pictures import materialize

    materialize("tiny-lora", workspace / "datasets/tiny-lora")


def write(workspace: Path, name: str, **options: Any) -> Path:
    """An environment with the example's datasets; returns its config."""
    folder = workspace / "config" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"output_dir": f"output/{name}", **options}, indent=2))
    shutil.copy(EXAMPLE / "multidatabackend.json", folder)
    return folder / "config.json"


@pytest.mark.usefixtures("example_images")
def test_three_choices_fill_in_options_and_a_sentence_says_what_starts(
    server: Server, page: Page, workspace: Path
) -> None:
    own = {"train_batch_size": 2, "validation_disable": True}
    config = write(workspace, "first", **own)
    datasets = config.with_name("multidatabackend.json")
    flags, *_, texts = json.loads(datasets.read_text())
    datasets.write_text(json.dumps([flags | {"repeats": 0}, texts]))
    page.goto(f"{server.url}/#/configure/first")
    klein = page.get_by_role("radio", name="klein-4b")
    expect(klein).to_be_enabled()
    expect(klein).to_have_accessible_description(re.compile(r"For previews: klein-4b-distilled[^!]*Apache-2\.0"))
    expect(page.get_by_role("radio", name="An edit")).to_be_disabled()

    page.get_by_label("Card", exact=True).select_option("No card: an embedded example model")
    expect(page.get_by_role("radio", name="tiny", exact=True)).to_be_checked()
    page.get_by_role("radio", name="A subject").check()
    filled = page.get_by_role("region", name="Filled in", exact=True)
    rank = filled.get_by_role("row", name="LoRA rank")
    expect(rank).to_contain_text("the example tiny-lora")
    expect(page.get_by_label("LoRA rank", exact=True)).to_have_value("32")
    # What a person set is kept, and can be replaced one by one.
    expect(filled).to_contain_text("1 of yours kept")
    expect(page.get_by_label("Batch size", exact=True)).to_have_value("2")
    filled.get_by_role("button", name="Replace Batch size with 8").click()
    expect(page.get_by_label("Batch size", exact=True)).to_have_value("8")

    sentence = page.get_by_role("region", name="What will happen")
    expect(sentence).to_contain_text("Trains a rank-32 LoRA of the embedded model", timeout=LONG_MS)
    # On few images a recipe's epochs are few steps.
    expect(sentence).to_contain_text("hardly learned anything", timeout=LONG_MS)
    sentence.get_by_role("button", name="Train ").click()
    assert int(page.get_by_label("Epochs", exact=True).input_value()) > 100
    page.get_by_label("Training steps", exact=True).fill("2")
    assert json.loads(config.read_text()) == {"output_dir": "output/first", **own}, "nothing is saved before Start"

    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("The LoRA is finished.")).to_be_visible(timeout=LONG_MS)
    saved = json.loads(config.read_text())
    assert {key: saved[key] for key in own} == own | {"train_batch_size": 8}
    assert (saved["model_flavour"], saved["lora_rank"], saved["flow_schedule_shift"]) == ("tiny", 32, 5)
    assert saved["validation_resolution"] == "128x128"


@pytest.mark.usefixtures("example_images")
def test_a_card_that_is_too_small_is_made_to_fit_by_a_button(server: Server, page: Page, workspace: Path) -> None:
    own = {"model_flavour": "dev", "base_model_precision": "no_change", "lora_rank": 8}
    write(workspace, "large", **own)
    page.goto(f"{server.url}/#/configure/large")
    page.get_by_label("Card", exact=True).select_option("24 GB")
    filled = page.get_by_role("region", name="Filled in", exact=True)
    expect(filled.get_by_role("row", name="Transformer quantization")).to_contain_text("yours, not int8-quanto")
    sentence = page.get_by_role("region", name="What will happen")
    expect(sentence).to_contain_text("which is not enough", timeout=LONG_MS)
    expect(page.get_by_label("Transformer quantization", exact=True)).to_have_value("no_change")
    sentence.get_by_role("button", name="Make it fit").click()
    expect(page.get_by_label("Transformer quantization", exact=True)).not_to_have_value("no_change")
    expect(sentence).not_to_contain_text("which is not enough", timeout=LONG_MS)
    # Undo takes back what the choice filled in, not what was changed since.
    text = page.get_by_label("As JSON", exact=True)
    assert json.loads(text.input_value())["enable_group_offload"] is True
    filled.get_by_role("button", name="Undo").click()
    expect(text).not_to_have_value(re.compile("enable_group_offload"))
    left = json.loads(text.input_value())
    assert left == {"output_dir": "output/large", **own, "base_model_precision": left["base_model_precision"]}
    assert left["base_model_precision"] != "no_change"
    expect(page.get_by_label("Card", exact=True)).to_have_value("")


def test_a_saved_recipe_is_recognized_and_can_be_changed_for_another(
    server: Server, page: Page, workspace: Path
) -> None:
    subject = recipe("subject", "dev")
    options = {"model_flavour": "dev", "seed": 7, **subject.options, "// num_train_epochs": "why 100"}
    write(workspace, "saved", **options)
    page.goto(f"{server.url}/#/configure/saved")
    expect(page.get_by_role("radio", name="A subject")).to_be_checked()
    page.get_by_role("radio", name="A style").check()
    filled = page.get_by_role("region", name="Filled in", exact=True)
    expect(filled).to_contain_text("1 option filled in")
    expect(filled).not_to_contain_text("of yours kept")
    epochs = filled.get_by_role("row", name="Epochs num_train_epochs")
    expect(epochs).to_contain_text(recipe("style", "dev").sources["num_train_epochs"])
    text = json.loads(page.get_by_label("As JSON", exact=True).input_value())
    # The comment beside a value goes with it.
    assert (text["num_train_epochs"], text["seed"]) == (30, 7)
    assert text["// num_train_epochs"] == recipe("style", "dev").sources["num_train_epochs"]


def test_the_form_is_short_until_more_is_asked_for(server: Server, page: Page, workspace: Path) -> None:
    write(workspace, "short", model_flavour="tiny", ema_decay=0.5)
    page.goto(f"{server.url}/#/configure/short")
    essentials = page.locator("details.options").filter(has=page.get_by_role("heading", name="Essentials"))
    expect(essentials.locator(".field").first).to_be_visible()
    assert essentials.locator(".field").count() >= 26
    assert essentials.evaluate("node => node.offsetHeight") < 1600
    folded = page.locator("details.options:not([open])")
    expect(folded).to_have_count(len(SLICES))
    assert max(folded.evaluate_all("nodes => nodes.map((node) => node.offsetHeight)")) < 60
    # What differs from its default stands among the essentials, marked, and can be reset.
    decay = page.locator('.field[data-name="ema_decay"]')
    expect(essentials.locator(decay)).to_have_class("field differs")
    page.get_by_role("button", name="Set EMA decay to its default").click()
    expect(decay).to_have_class("field")
    assert json.loads(page.get_by_label("As JSON", exact=True).input_value()).keys() == {"output_dir", "model_flavour"}

    # Help on demand, by keyboard.
    ask = page.get_by_role("button", name="Help on LoRA rank")
    assert ask.get_attribute("aria-expanded") == "false"
    ask.focus()
    page.keyboard.press("Enter")
    assert ask.get_attribute("aria-expanded") == "true"
    expect(page.locator(f"[id='{ask.get_attribute('aria-controls')}']")).to_contain_text("Default: 16")

    # A search looks at words, keys and help, also in folded sections.
    search = page.get_by_label("Search the options")
    for words in ("stratified", "timestep_strata", "equal parts of the"):
        search.fill(words)
        expect(page.get_by_role("radiogroup", name="Stratified timesteps")).to_be_visible()
        expect(page.locator(".field:visible")).to_have_count(1)
    # A structure whose usual values have names takes these as they are, and JSON.
    search.fill("deepspeed")
    engine = page.get_by_label("DeepSpeed", exact=True)
    for typed, value in (("zero2", "zero2"), ('{"zero_optimization": {}}', {"zero_optimization": {}})):
        engine.fill(typed)
        assert json.loads(page.get_by_label("As JSON", exact=True).input_value())["deepspeed_config"] == value
        expect(engine).not_to_have_attribute("aria-invalid", "true")
        engine.blur()
        expect(engine).to_have_value(typed)
    engine.fill("zero")
    expect(engine).to_have_attribute("aria-invalid", "true")
    search.fill("")


@pytest.mark.usefixtures("example_images")
def test_several_gpus_are_planned_with_what_travels_and_the_engine(server: Server, page: Page, workspace: Path) -> None:
    write(workspace, "many", model_flavour="tiny")
    page.goto(f"{server.url}/#/configure/many")
    planned = page.get_by_role("region", name="What will happen")
    expect(planned).to_contain_text("Trains a rank-16 LoRA", timeout=LONG_MS)
    expect(planned).not_to_contain_text("DDP")
    planned.get_by_text("Memory of each phase").click()
    planned.get_by_label("GPUs", exact=True).select_option("2")
    expect(planned).to_contain_text("Use DDP: each process holds the whole run", timeout=LONG_MS)
    expect(planned).to_contain_text(
        re.compile(r"2 processes, DDP: RAM is for all processes together\. Each sends \d+ MiB of gradients per step\.")
    )
