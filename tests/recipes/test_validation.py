"""Validation images of whole runs: what cannot be made costs that image, and training ends with the same bits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.recipes.conftest import Workplace

from simpletuner.cli.main import main
from simpletuner.runs.events import read_events
from simpletuner.runs.layout import RunDirectory

DRAWN = {
    "validation_disable": False,
    "validation_resolution": "32x32",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 1,
}


@pytest.fixture
def drawing(cached_workplace: Workplace) -> Workplace:
    """A run that draws one image after each step."""
    cached_workplace.prompts = {"one": "a gradient"}
    cached_workplace.config |= DRAWN
    return cached_workplace


def put_a_file_in_place_of_the_folder(_: Workplace, run: RunDirectory) -> None:
    run.validations.write_text("no folder")


def put_folders_in_place_of_the_images(_: Workplace, run: RunDirectory) -> None:
    for step in range(4):
        (run.validation(step) / "one_32x32_0.png").mkdir(parents=True)


def ask_for_more_than_memory(place: Workplace, _: RunDirectory) -> None:
    place.config["validation_resolution"] = "1048576x1048576"


FAULTS: dict[str, tuple[Callable[[Workplace, RunDirectory], None], str]] = {
    "file": (
        put_a_file_in_place_of_the_folder,
        "cannot write output/file/validation: File exists. Move away",
    ),
    "folders": (
        put_folders_in_place_of_the_images,
        "one_32x32_0.png: Is a directory. Move away the file or folder there",
    ),
    "memory": (ask_for_more_than_memory, "A lower --validation_resolution takes less memory."),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_images_that_cannot_be_made_cost_themselves_and_no_bit_and_stop_after_three(
    drawing: Workplace, name: str
) -> None:
    assert drawing.train("--output_dir=output/sound") == 0
    assert len(drawing.events("validation", "sound")) == 4
    fault, reason = FAULTS[name]
    drawing.config["output_dir"] = f"output/{name}"
    run = drawing.run(name)
    run.root.mkdir()
    fault(drawing, run)
    assert drawing.train() == 0
    assert run.lora.read_bytes() == drawing.run("sound").lora.read_bytes()
    assert drawing.losses(name) == drawing.losses("sound")
    texts = [event["text"] for event in drawing.events("notice", name)]
    texts = [text for text in texts if "could not be made" in text]
    assert len(texts) == 3
    assert all(reason in text and "Training continues without it." in text for text in texts)
    assert ["3 images in a row failed" in text for text in texts] == [False, False, True]
    assert "--validation_disable" in texts[-1]
    assert drawing.events("validation", name) == []
    assert not list(run.root.rglob("*.part*"))


@pytest.mark.slow
def test_one_image_that_cannot_be_made_is_left_out_and_the_others_are_there(drawing: Workplace) -> None:
    drawing.prompts = {"one": "a gradient", "two": "a line"}
    (drawing.run().validation(1) / "one_32x32_0.png").mkdir(parents=True)
    assert drawing.train("--max_train_steps=2") == 0
    listed = {event["step"]: [each["name"] for each in event["pictures"]] for event in drawing.events("validation")}
    assert listed == {0: ["one", "two"], 1: ["two"], 2: ["one", "two"]}
    assert [event["sheet"] is not None for event in drawing.events("validation")] == [True] * 3


@pytest.mark.slow
def test_odd_files_among_the_images_are_passed_over_and_a_damaged_one_is_drawn_again(drawing: Workplace) -> None:
    drawing.prompts = {"one": "a gradient", "two": "a line", "three": "a dot"}
    assert drawing.train("--max_train_steps=1") == 0
    run = drawing.run()
    one, two, three = (run.validation(0) / f"{name}_32x32_0.png" for name in ("one", "two", "three"))
    whole, kept = one.read_bytes(), two.stat().st_mtime_ns
    one.write_bytes(whole[: len(whole) - 60])  # its header and parameters are whole
    three.unlink()
    os.mkfifo(three)
    for name in ("step-old", "step-", "step-000000.bak", "other"):
        (run.validations / name).mkdir()
    (run.validations / "step-000007").write_text("no folder")
    last = run.validation(1)
    (last / "one_32x32_0.png").write_bytes(b"\0" * 100)
    (last / "two_32x32_0.png").unlink()
    (last / "two_32x32_0.png").mkdir()
    assert drawing.train("--max_train_steps=2") == 0
    assert one.read_bytes() == whole
    assert two.stat().st_mtime_ns == kept
    assert three.is_file()
    with Image.open(run.validation(2) / "sheet.png") as sheet:
        sheet.load()


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["sheet", "event"])
def test_what_is_missing_beside_the_base_images_is_made_up_for(drawing: Workplace, lacking: str) -> None:
    assert drawing.train("--max_train_steps=1") == 0
    run = drawing.run()
    base = run.validation(0) / "one_32x32_0.png"
    drawn = base.stat().st_mtime_ns
    if lacking == "sheet":
        (run.validation(0) / "sheet.png").unlink()
    else:
        drop_events(run.events, lambda line: '"type": "validation"' in line and '"step": 0' in line)
    assert drawing.train("--max_train_steps=2") == 0
    assert base.stat().st_mtime_ns == drawn
    assert (run.validation(0) / "sheet.png").is_file()
    told = [event for event in read_events(run.events, kinds=("validation",)) if event["step"] == 0]
    assert [each["name"] for each in told[-1]["pictures"]] == ["one"]
    assert told[-1]["attempt"] == 2


def drop_events(path: Path, is_dropped: Callable[[str], bool]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not is_dropped(line)), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_drift_is_measured_with_each_sheet_and_after_a_resume_against_the_same_base(
    drawing: Workplace, model_type: str
) -> None:
    drift = {"validation_drift_prompts": ["a dot", "a line"], "use_ema": True, "model_type": model_type}
    drawing.config |= drift | {"output_dir": "output/whole"}
    assert drawing.train("--max_train_steps=2") == 0
    whole = drawing.events("validation", "whole")
    assert [event["step"] for event in whole] == [0, 1, 2]
    assert whole[0]["drift"] is None
    for event in whole[1:]:
        assert set(event["drift_by_prompt"]) == {"a dot", "a line"}
        assert event["drift"] == sum(event["drift_by_prompt"].values()) / 2 > 0
        assert 0 < event["ema_drift"] < event["drift"]
    assert "Drift at step 2: " in drawing.run("whole").log.read_text()
    drawing.config["output_dir"] = "output/killed"
    assert drawing.train_apart("--max_train_steps=2", kill_at="step:2").returncode != 0
    assert drawing.train("--max_train_steps=2") == 0
    fields = ("step", "drift", "drift_by_prompt", "ema_drift", "pictures")
    known = [{key: event[key] for key in fields} for event in whole]
    again = [{key: event[key] for key in fields} for event in drawing.events("validation", "killed")]
    assert again == known


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2])
def test_without_prompts_a_drift_that_a_kill_prevented_is_measured_at_the_next_start(
    drawing: Workplace, last: int
) -> None:
    """At the last step, and at one before it."""
    drawing.prompts = {}
    drawing.config["validation_drift_prompts"] = ["a dot"]
    assert drawing.train("--max_train_steps=1") == 0
    (whole,) = drawing.events("validation")
    assert whole["drift"] > 0
    run = drawing.run()
    drop_events(run.events, lambda line: '"type": "validation"' in line)
    run.finished.unlink()
    assert drawing.train(f"--max_train_steps={last}") == 0
    again, *later = drawing.events("validation")
    assert (again["step"], again["drift"]) == (1, whole["drift"])
    assert [event["step"] for event in later] == list(range(2, last + 1))


@pytest.mark.slow
def test_an_image_with_references_is_that_of_sample_and_its_references_are_encoded_once(
    drawing: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("a.png", (64, 80)), ("b.png", (75, 64))):
        Image.radial_gradient("L").resize(size).convert("RGB").save(drawing.folder / name)
    drawing.prompts = {"plain": "a gradient", "two": {"prompt": "a gradient", "references": ["b.png", "a.png"]}}
    before = set(drawing.folder.glob("cache/vae/*/*.safetensors"))
    assert drawing.train("--max_train_steps=1") == 0
    run = drawing.run()
    assert len(set(drawing.folder.glob("cache/vae/*/*.safetensors")) - before) == 2
    shown = {each["name"]: each["references"] for each in drawing.events("validation")[-1]["pictures"]}
    assert shown == {"plain": [], "two": ["b.png", "a.png"]}
    capsys.readouterr()
    for name, flags in (("plain", []), ("two", ["--references=b.png", "--references=a.png"])):
        assert main(["sample", f"--run={run.root}", "--prompt=a gradient", *flags]) == 0
        image = Image.open(run.validation(1) / f"{name}_32x32_0.png")
        assert Image.open(capsys.readouterr().out.strip()).tobytes() == image.tobytes()
    drawn = (run.validation(0) / "two_32x32_0.png").stat().st_mtime_ns
    assert drawing.train("--max_train_steps=2") == 0
    assert (run.validation(0) / "two_32x32_0.png").stat().st_mtime_ns == drawn
    Image.new("RGB", (64, 64), "red").save(drawing.folder / "a.png")
    assert drawing.train("--max_train_steps=3") == 0
    assert (run.validation(0) / "two_32x32_0.png").stat().st_mtime_ns != drawn


@pytest.mark.slow
def test_klein_validation_is_guided_against_the_negative_prompt_as_sample_is(
    workplace: Workplace, tiny_klein_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.prompts = {"one": "a gradient"}
    workplace.config |= DRAWN | {
        "model_flavour": "tiny-klein",
        "pretrained_model_name_or_path": str(tiny_klein_folder),
        "max_train_steps": 1,
        "validation_num_inference_steps": 2,
    }
    images = []
    for name, flags in (("empty", []), ("negative", ["--validation_negative_prompt=a red cat"])):
        assert workplace.train(f"--output_dir=output/{name}", *flags) == 0
        image = Image.open(workplace.run(name).validation(0) / "one_32x32_0.png").tobytes()
        capsys.readouterr()
        config = str(workplace.run(name).config)
        assert main(["sample", "--config", config, "--prompt", "a gradient", "--out", name]) == 0
        assert Image.open(capsys.readouterr().out.strip()).tobytes() == image
        images.append(image)
    assert images[0] != images[1]
