"""The configure and datasets screens by clicks, and what they write."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect
from tests.web.conftest import Server, Watched

pytestmark = pytest.mark.slow

LATE_FOLDERS = """
const fetched = window.fetch;
window.fetch = async (...request) => {
  if (String(request[0]).includes("api/folders")) await new Promise((resolve) => setTimeout(resolve, 500));
  return fetched(...request);
};
"""
"""A folder's answer comes after the next click: what is chosen meanwhile is that folder, and not the one before."""

STORE = {"id": "text", "dataset_type": "text_embeds", "default": True}


def test_form_and_text_stay_in_step(server: Server, page: Page, workspace: Path) -> None:
    """The form changes one value of the text and no other byte; a text that is no JSON waits to be mended."""
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    text = '{"model_flavour": "tiny",\n\n      "lora_rank"  :  4, "output_dir": "output/mine"}\n'
    (folder / "config.json").write_text(text)
    page.goto(f"{server.url}/#/configure/mine")
    raw = page.get_by_label("As JSON", exact=True)
    rank = page.get_by_label("LoRA rank", exact=True)
    expect(rank).to_have_value("4")

    rank.fill("8")
    expect(raw).to_have_value(text.replace("4", "8"))
    rank.fill("few")
    expect(page.get_by_role("button", name="lora_rank = 'few'")).to_be_visible()

    raw.fill(text[:-2])
    expect(rank).to_be_disabled()
    expect(page.get_by_text("it ends without }")).to_be_visible()
    raw.fill(text.replace("4", "16"))
    expect(rank).to_have_value("16")
    page.keyboard.press("Control+s")
    expect(page.get_by_text("Saved.")).to_be_visible()
    assert (folder / "config.json").read_text() == text.replace("4", "16")


def test_a_set_is_filled_scanned_and_captioned(server: Server, page: Page, workspace: Path, watched: Watched) -> None:
    watched.allowed = lambda text: "404 (Not Found)" in text  # the set's folder, which the first file makes
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    image_set = {"id": "cats", "instance_data_dir": "datasets/cats", "caption_strategy": "textfile", "resolution": 64}
    (folder / "multidatabackend.json").write_text(
        json.dumps([{**image_set, "crop": True, "minimum_image_size": 48}, STORE])
    )
    (workspace / "one.txt").write_text("a cat")
    (workspace / "fake.png").write_text("no picture")
    Image.new("RGB", (96, 64), "red").save(workspace / "one.png")

    page.goto(f"{server.url}/#/datasets/mine")
    expect(page.get_by_text("datasets/cats does not exist yet")).to_be_visible()
    page.get_by_label("Files to add").set_input_files([workspace / name for name in ("one.png", "one.txt", "fake.png")])
    expect(page.get_by_text("1 image and 1 caption added, 1 refused")).to_be_visible()
    assert sorted(path.name for path in (workspace / "datasets" / "cats").iterdir()) == ["one.png", "one.txt"]

    Image.new("RGB", (32, 32), "red").save(workspace / "datasets" / "cats" / "small.png")
    (workspace / "datasets" / "cats" / "small.txt").write_text("a small cat")
    page.get_by_role("button", name="Scan").click()
    expect(page.get_by_text("1 image and 1 caption, each image used")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("resized to 96×64, cropped to 64×64")).to_be_visible()
    expect(page.locator(".crop")).to_have_count(1)

    page.get_by_label("Show", exact=True).select_option("left below minimum_image_size")
    expect(page.locator(".picture > .path")).to_have_text(["small.png"])
    page.get_by_label("Show", exact=True).select_option("all")

    caption = page.get_by_label("Caption of one.png")
    expect(caption).to_have_value("a cat")
    caption.fill("two cats")
    caption.blur()
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    assert (workspace / "datasets" / "cats" / "one.txt").read_text() == "two cats"


def test_a_set_of_references_is_added_and_shown_beside_its_images(server: Server, page: Page, workspace: Path) -> None:
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    image_set = {"id": "cats", "instance_data_dir": "datasets/cats", "caption_strategy": "textfile", "resolution": 64}
    (folder / "multidatabackend.json").write_text(json.dumps([image_set, STORE]))
    for name, size, color in (
        ("cats/one.png", (96, 64), "red"),
        ("cats/two.png", (96, 64), "green"),
        ("sketches/one.1.png", (40, 60), "white"),
        ("sketches/one.2.png", (60, 60), "gray"),
        ("masks/one.png", (96, 64), "black"),
    ):
        (workspace / "datasets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(workspace / "datasets" / name)

    page.add_init_script(LATE_FOLDERS)
    page.goto(f"{server.url}/#/datasets/mine")
    expect(page.get_by_text("2 images, 2 without a caption.")).to_be_visible()
    add = page.get_by_role("button", name="Add references or masks")
    for holds, place in (("reference_loose", "sketches"), ("mask", "masks")):
        page.get_by_role("navigation", name="Entries of the list").get_by_role("button", name="cats").first.click()
        add.click()
        page.get_by_label("Content of the folder").select_option(holds)
        page.get_by_role("button", name="Next").click()
        page.get_by_role("dialog").get_by_role("button", name=place, exact=True).click()
        page.get_by_role("button", name="Choose this folder").click()
        expect(page.locator(".detail h2").first).to_have_text(
            "cats-references" if place == "sketches" else "cats-masks"
        )
    expect(page.get_by_text("1 image. Each belongs to the image of the same name")).to_be_visible()
    expect(page.get_by_role("button", name="Edit all captions")).to_be_hidden()

    # The set of images names them, and shows each image beside its own.
    page.get_by_role("navigation", name="Entries of the list").get_by_role("button", name="cats").first.click()
    tiles = page.locator(".picture")
    expect(tiles.nth(0).locator("figcaption")).to_have_text(["Reference 1", "Reference 2", "Mask"])
    expect(tiles.nth(0).locator(".mask")).to_be_visible()
    expect(tiles.nth(0).locator("img[src*='mask=true']")).to_have_count(2)  # over the image and beside it
    expect(tiles.nth(1).locator(".partners li")).to_have_text(["none in cats-references", "none in cats-masks"])
    page.get_by_label("Masks over the images").uncheck()
    expect(tiles.nth(0).locator(".mask")).to_be_hidden()
    page.get_by_label("Show", exact=True).select_option("partner")
    expect(page.locator(".picture > .path")).to_have_text(["two.png"])
    page.get_by_label("Show", exact=True).select_option("all")
    page.get_by_label("Enlarge one.png").click()
    expect(page.get_by_role("dialog").get_by_role("figure")).to_have_count(3)
    page.keyboard.press("Escape")

    # Chosen and left out by id, in the order of the presses.
    page.locator("summary").filter(has_text="Options").click()
    chips = page.get_by_role("group", name="Conditioning sets").get_by_role("button")
    expect(chips).to_have_text(["1. cats-references", "2. cats-masks"])
    chips.nth(0).click()
    expect(chips).to_have_text(["cats-masks", "cats-references"])
    expect(tiles.nth(0).locator("figcaption")).to_have_text(["Mask"])
    chips.nth(1).click()
    page.keyboard.press("Control+s")
    expect(page.get_by_text("Saved.")).to_be_visible()
    cats, _, references, masks = json.loads((folder / "multidatabackend.json").read_text())
    assert cats["conditioning_data"] == ["cats-masks", "cats-references"]
    assert references["conditioning_type"] == "reference_loose"
    assert (references["instance_data_dir"], references["resolution"]) == ("datasets/sketches", 64)
    assert masks == {
        "id": "cats-masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
        "instance_data_dir": "datasets/masks",
    }  # fmt: skip

    # A set that goes leaves no name behind.
    page.get_by_role("navigation", name="Entries of the list").get_by_role("button", name="cats-masks").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    raw = json.loads(page.get_by_label("The list as JSON").input_value())
    assert [entry.get("conditioning_data") for entry in raw] == [["cats-references"], None, None]


def test_references_and_masks_are_deleted_with_their_image(server: Server, page: Page, workspace: Path) -> None:
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    image_set = {"id": "cats", "instance_data_dir": "datasets/cats", "conditioning_data": ["sketches", "masks"]}
    conditions = [
        {"id": name, "dataset_type": "conditioning", "conditioning_type": kind, "instance_data_dir": f"datasets/{name}"}
        for name, kind in (("sketches", "reference_loose"), ("masks", "mask"))
    ]
    (folder / "multidatabackend.json").write_text(json.dumps([image_set, STORE, *conditions]))
    files = [workspace / "datasets" / name for name in ("sketches/one.1.png", "sketches/one.2.png", "masks/one.png")]
    for file in (
        *files,
        *(workspace / "datasets" / name for name in ("cats/one.png", "cats/two.png", "masks/two.png")),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(file)
    page.goto(f"{server.url}/#/datasets/mine")
    dialog = page.get_by_role("dialog")
    for is_checked in (False, True):
        page.get_by_label("Select one.png", exact=True).click()
        page.get_by_role("button", name="Delete", exact=True).click()
        tick = dialog.get_by_label("Also delete 3 references and masks of this image")
        expect(tick).not_to_be_checked()
        if is_checked:
            tick.check()
        dialog.get_by_role("button", name="Delete 1 image").click()
        expect(page.locator(".picture > .path")).to_have_text(["two.png"])
        assert [file.exists() for file in files] == [not is_checked] * 3
        page.get_by_role("button", name="Undo the last deletion").click()
        expect(page.locator(".picture > .path")).to_have_text(["one.png", "two.png"])
    expect(page.get_by_text("1 image deleted with 3 references and masks.")).to_be_visible()
    assert (workspace / "datasets" / "masks" / "two.png").is_file()


@pytest.fixture
def library(workspace: Path) -> Path:
    """The prompts of an environment named mine."""
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    return folder / "user_prompt_library.json"


def test_references_that_arrive_late_are_added_to_the_prompt_as_it_is_by_then(
    server: Server, page: Page, workspace: Path, library: Path
) -> None:
    library.write_text('{"a": "old"}')
    (workspace / "references").mkdir()
    for name in ("one.png", "two.png", "three.png", "references/other.png"):
        Image.new("RGB", (32, 32), "red").save(workspace / name)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    def send(name: str) -> None:
        with page.expect_request("**/api/upload?*"):
            page.get_by_label("References from this computer").set_input_files(workspace / name)

    page.route("**/api/upload?*", hold)
    page.goto(f"{server.url}/#/configure/mine?tab=prompts")
    raw = page.get_by_label("The file", exact=True)
    prompt = page.get_by_label("Prompt", exact=True)
    references = page.get_by_role("group", name="References").get_by_role("listitem")

    # A text that is being typed is kept, and the typing goes on.
    send("one.png")
    prompt.fill("new")
    held.pop().continue_()
    expect(references).to_have_count(1)
    page.keyboard.type("er")
    expect(prompt).to_have_value("newer")
    assert json.loads(raw.input_value()) == {"a": {"prompt": "newer", "references": ["references/one.png"]}}

    # The row was drawn anew, since the file was changed beside it.
    send("two.png")
    raw.fill('{"a": {"prompt": "newest", "references": ["references/other.png", "references/one.png"]}}')
    held.pop().continue_()
    expect(references).to_have_count(3)
    expect(prompt).to_have_value("newest")
    paths = [f"references/{name}.png" for name in ("other", "one", "two")]
    assert json.loads(raw.input_value()) == {"a": {"prompt": "newest", "references": paths}}

    # A prompt that is gone does not come back.
    send("three.png")
    page.get_by_role("button", name="Remove a", exact=True).click()
    held.pop().continue_()
    expect(page.get_by_text("The prompt a was changed or removed meanwhile")).to_be_visible()
    assert json.loads(raw.input_value()) == {}


def test_an_entry_that_is_no_prompt_is_left_to_the_text(server: Server, page: Page, library: Path) -> None:
    entries = [{"prompt": "x", "references": "a.png"}, {"prompt": "x", "seed": 1}, {"prompt": 3}, ["x"], None]
    text = json.dumps({**{str(number): entry for number, entry in enumerate(entries)}, "right": {"prompt": "y"}})
    library.write_text(text)
    page.goto(f"{server.url}/#/configure/mine?tab=prompts")
    prompts = page.get_by_label("Prompt", exact=True)
    for number, entry in enumerate(entries):
        expect(prompts.nth(number)).to_be_disabled()
        assert json.loads(prompts.nth(number).input_value()) == entry
    expect(page.get_by_text("edit it in the file")).to_have_count(len(entries))
    expect(page.get_by_role("group", name="References")).to_have_count(1)
    prompts.nth(len(entries)).fill("z")
    raw = page.get_by_label("The file", exact=True)
    expect(raw).to_have_value(text.replace('{"prompt": "y"}', '"z"'))
    raw.fill('{"0": {"prompt": "x", "references": ["a.png"]}}')
    expect(prompts).to_be_enabled()
    expect(prompts).to_have_value("x")


def test_references_have_bounds_that_are_told(server: Server, page: Page, workspace: Path, library: Path) -> None:
    paths = [f"references/{number:03d}.png" for number in range(201)]
    (workspace / "references").mkdir()
    for path in paths:
        Image.new("1", (8, 8)).save(workspace / path)
    others = [Path(shutil.copy(workspace / paths[0], workspace / name)) for name in ("one.png", "two.png")]
    library.write_text(
        json.dumps({"a": {"prompt": "x", "references": paths[:12]}, "b": {"prompt": "y", "references": paths[:9]}})
    )
    page.goto(f"{server.url}/#/configure/mine?tab=prompts")
    lists = page.get_by_role("group", name="References")
    lists.nth(1).get_by_role("button", name="From a folder").click()
    expect(page.get_by_role("dialog").get_by_text("The first 200 of 201 are shown.")).to_be_visible()
    page.keyboard.press("Escape")

    lists.nth(0).get_by_role("button", name="Remove reference 1", exact=True).click()
    expect(lists.nth(0).get_by_role("listitem")).to_have_count(11)
    lists.nth(1).get_by_label("References from this computer").set_input_files(others)
    expect(page.get_by_text("at most 10 references: 1 were not added")).to_be_visible()
    expect(lists.nth(1).get_by_role("listitem")).to_have_count(10)
    raw = json.loads(page.get_by_label("The file", exact=True).input_value())
    assert raw["a"]["references"] == paths[1:12]
    assert raw["b"]["references"][:9] == paths[:9]
