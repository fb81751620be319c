"""Images of a set, day by day: a folder dropped, captions that are never lost, changed together, found and deleted."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from tests.web.conftest import Server, Watched

pytestmark = pytest.mark.slow

DROP = """
async ([target, files]) => {
  const tree = { name: "", folders: {}, files: [] };
  for (const [path, base64] of files) {
    const parts = path.split("/");
    const name = parts.pop();
    let folder = tree;
    for (const part of parts) folder = folder.folders[part] ??= { name: part, folders: {}, files: [] };
    const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
    folder.files.push(new File([bytes], name));
  }
  // Chromium gives no entries for files that a script made: these stand for what a real drop brings.
  const entryOf = (node) => node instanceof File
    ? { name: node.name, isDirectory: false, file: (done) => done(node) }
    : { name: node.name, isDirectory: true, createReader: () => {
        const left = [...Object.values(node.folders), ...node.files].map(entryOf);
        return { readEntries: (done) => done(left.splice(0, 2)) };
      } };
  const transfer = new DataTransfer();
  const roots = [...Object.values(tree.folders), ...tree.files].map(entryOf);
  for (const root of roots) transfer.items.add(new File([], root.name));
  const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  DataTransferItem.prototype.webkitGetAsEntry = () => roots.shift();
  document.querySelector(target).dispatchEvent(event);
}
"""


def photograph(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)


def fill_folder(folder: Path, count: int) -> None:
    """Images `photo-N.png`, each with a caption `a red thing, number N`."""
    folder.mkdir(parents=True)
    for number in range(count):
        photograph(number).save(folder / f"photo-{number}.png")
        (folder / f"photo-{number}.txt").write_text(f"a red thing, number {number}")


def environment(workspace: Path) -> None:
    """An environment `mine` whose set `cats` lies in datasets/cats."""
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_flavour": "tiny", "output_dir": "output/mine"}')
    image_set = {"id": "cats", "instance_data_dir": "datasets/cats", "caption_strategy": "textfile", "resolution": 64}
    store = {"id": "text", "dataset_type": "text_embeds", "default": True}
    (folder / "multidatabackend.json").write_text(json.dumps([image_set, store]))


def names(page: Page) -> list[str]:
    """Names of the tiles that are shown."""
    return page.locator(".picture > .path").all_inner_texts()


def caption(page: Page, name: str) -> Locator:
    return page.get_by_label(f"Caption of {name}")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def test_a_folder_that_is_dropped_becomes_a_set(
    server: Server, page: Page, workspace: Path, tmp_path: Path, watched: Watched
) -> None:
    watched.allowed = lambda text: "404 (Not Found)" in text  # whether the name is free
    source = tmp_path / "My cats!"
    fill_folder(source, 5)
    fill_folder(source / "inner", 2)
    (source / ".DS_Store").write_text("hidden")
    (source / "notes.pdf").write_text("no image")
    (source / "fake.png").write_text("no image either")
    page.goto(f"{server.url}/#/datasets/")
    page.get_by_label("Add a folder").set_input_files(source)
    expect(page.get_by_text("7 images and 7 captions added, 2 refused")).to_be_visible()
    page.get_by_text("2 refused").click()
    expect(page.get_by_text("1: neither an image nor a caption file")).to_be_visible()
    kept = workspace / "datasets" / "My-cats"
    assert sorted(path.name for path in (kept / "inner").iterdir())[:2] == ["photo-0.png", "photo-0.txt"]
    assert len(list(kept.iterdir())) == 11
    config = workspace / "config" / "My-cats"
    entries = json.loads((config / "multidatabackend.json").read_text())
    assert [(one["id"], one.get("instance_data_dir")) for one in entries] == [
        ("My-cats", "datasets/My-cats"), ("text-embeds", None)
    ]  # fmt: skip
    expect(page.get_by_text("7 images, each with a caption.")).to_be_visible()

    # A folder that is dropped on the set goes into it; what is there already is not overwritten.
    more = ("more/sub/deep/x.txt", "more/.git/x.txt", "more/photo-0.txt")
    page.evaluate(DROP, [".drop", [[path, "YQ=="] for path in more]])
    expect(page.get_by_text("1 caption added, 1 refused")).to_be_visible()
    assert (kept / "sub" / "deep" / "x.txt").read_text() == "a"
    # Beside a set it makes another one.
    page.evaluate(DROP, [".datasets-panes", [["dogs/x.txt", "YQ=="]]])
    expect(page.get_by_role("heading", name="dogs")).to_be_visible()
    expect(page.get_by_text("1 caption added")).to_be_visible()
    assert (workspace / "datasets" / "dogs" / "x.txt").is_file()


def test_a_caption_that_is_typed_is_never_lost(server: Server, page: Page, workspace: Path, watched: Watched) -> None:
    refused = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "409 (Conflict)")
    watched.allowed = lambda text: any(word in text for word in refused)
    folder = workspace / "datasets" / "cats"
    fill_folder(folder, 3)
    environment(workspace)
    photograph(9).save(workspace / "new.png")
    (workspace / "notes.md").write_text("no image")
    page.goto(f"{server.url}/#/datasets/mine")
    # After a pause, without leaving it; and by going to another screen at once.
    expect(caption(page, "photo-0.png")).to_have_value("a red thing, number 0")
    caption(page, "photo-0.png").fill("paused")
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    assert (folder / "photo-0.txt").read_text() == "paused"
    caption(page, "photo-1.png").fill("left")
    page.evaluate("location.hash = '#/'")
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    page.evaluate("location.hash = '#/datasets/mine'")
    expect(caption(page, "photo-1.png")).to_have_value("left")
    page.wait_for_function("!Object.keys(localStorage).some((key) => key.includes('caption'))")
    assert (folder / "photo-1.txt").read_text() == "left"

    # The server dies while it is typed; the tab is closed; the server comes back.
    server.kill()
    caption(page, "photo-2.png").fill("typed in the dark")
    caption(page, "photo-2.png").blur()
    expect(page.get_by_text("It is kept in this browser")).to_be_visible()
    page.get_by_label("Files to add").set_input_files([workspace / "new.png", workspace / "notes.md"])
    expect(page.get_by_text("nothing added, 2 not sent")).to_be_visible()
    caption(page, "photo-0.png").fill("mine")
    page.close(run_before_unload=False)
    (folder / "photo-0.txt").write_text("theirs")
    server.start()
    again = page.context.new_page()
    again.goto(f"{server.url}/#/datasets/mine")
    expect(caption(again, "photo-2.png")).to_have_value("typed in the dark")
    expect(again.get_by_text("Saved", exact=True)).to_be_visible()
    assert (folder / "photo-2.txt").read_text() == "typed in the dark"
    # What somebody else changed meanwhile shows both texts.
    conflict = again.get_by_role("alert").filter(has_text="Somebody else changed this caption")
    expect(conflict).to_contain_text("theirs")
    expect(conflict).to_contain_text("mine")
    assert (folder / "photo-0.txt").read_text() == "theirs"
    conflict.get_by_role("button", name="Keep mine").click()
    expect(conflict).to_have_count(0)
    expect(caption(again, "photo-0.png")).to_have_value("mine")
    assert (folder / "photo-0.txt").read_text() == "mine"


def test_images_are_selected_captioned_together_found_and_deleted(server: Server, page: Page, workspace: Path) -> None:
    folder = workspace / "datasets" / "cats"
    fill_folder(folder, 6)
    environment(workspace)
    shutil.copy(folder / "photo-1.png", folder / "twin.png")
    photograph(4).resize((60, 40)).save(folder / "small.jpg")
    page.goto(f"{server.url}/#/datasets/mine")
    expect(page.get_by_text("8 images, 2 without a caption.")).to_be_visible()

    # Click, Shift+click, Ctrl+click, and by keyboard.
    def box(name: str) -> Locator:
        return page.get_by_label(f"Select {name}", exact=True)

    box("photo-0.png").click()
    box("photo-2.png").click(modifiers=["Shift"])
    page.get_by_label("Enlarge photo-4.png").click(modifiers=["Control"])
    expect(page.get_by_text("4 of 8 images selected")).to_be_visible()
    box("photo-4.png").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Control+a")
    expect(page.get_by_text("8 of 8 images selected")).to_be_visible()
    page.keyboard.press("Escape")
    box("photo-0.png").focus()
    page.keyboard.press("Shift+ArrowRight")
    expect(page.get_by_text("2 of 8 images selected")).to_be_visible()

    # A change is shown before it is made, and taken back.
    button(page, "Edit captions").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Find", exact=True).fill(r"red (\w+)")
    expect(dialog.get_by_text("No caption changes.")).to_be_visible()
    dialog.get_by_label("Regular expression").check()
    dialog.get_by_label("Replace with").fill(r"blue \1")
    expect(dialog.get_by_text("2 captions of 2 images change:")).to_be_visible()
    expect(dialog.get_by_text("+ a blue thing, number 1")).to_be_visible()
    assert (folder / "photo-1.txt").read_text() == "a red thing, number 1"
    dialog.get_by_role("button", name="Change 2 captions").click()
    expect(caption(page, "photo-1.png")).to_have_value("a blue thing, number 1")
    assert (folder / "photo-2.txt").read_text() == "a red thing, number 2"
    button(page, "Undo the last caption edit").click()
    expect(caption(page, "photo-1.png")).to_have_value("a red thing, number 1")

    # Without a caption; by caption; a word in front of all that are shown.
    show = page.get_by_label("Show", exact=True)
    show.select_option("missing")
    expect(page.locator(".picture")).to_have_count(2)
    assert names(page) == ["small.jpg", "twin.png"]
    button(page, "Edit all captions").click()
    dialog.get_by_text("Add before").click()
    dialog.get_by_label("Text").fill("sks")
    dialog.get_by_role("button", name="Change 2 captions").click()
    expect(page.get_by_text("8 images, each with a caption.")).to_be_visible()
    assert (folder / "twin.txt").read_text() == "sks"
    show.select_option("all")
    page.get_by_label("Name or caption contains").fill("NUMBER 3")
    expect(page.locator(".picture")).to_have_count(1)
    page.get_by_label("Name or caption contains").fill("")
    expect(page.locator(".picture")).to_have_count(8)

    # Duplicates; all but the first of each is deleted once it was asked, and comes back.
    show.select_option("duplicates")
    expect(page.get_by_role("heading", name="Nearly identical")).to_be_visible(timeout=60_000)
    assert names(page) == ["photo-1.png", "twin.png", "photo-4.png", "small.jpg"]
    button(page, "Select all but the first of each").click()
    button(page, "Delete").click()
    expect(dialog.get_by_role("heading")).to_have_text("Delete 2 images and 2 captions?")
    dialog.get_by_role("button", name="Delete 2 images").click()
    expect(page.get_by_text("There are no duplicates.")).to_be_visible(timeout=60_000)
    assert not list(folder.glob("twin.*"))
    button(page, "Undo the last deletion").click()
    expect(page.get_by_text(re.compile("8 images, each with a caption"))).to_be_visible(timeout=60_000)
    assert (folder / "twin.txt").read_text() == "sks"
