"""`simpletuner dataset`, as it is typed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.base.errors import ConfigError, DataError
from simpletuner.cli.dataset import run
from simpletuner.cli.main import main
from simpletuner.data.sheet import GAP_PX, LABEL_WIDTH_PX


@pytest.fixture
def project(own_folder: Path, pictures: Path) -> Path:
    """A folder as the quickstart describes it, on the embedded model and at 128 pixels."""
    shutil.copytree(pictures, own_folder / "datasets" / "my-dataset")
    (own_folder / "config").mkdir()
    config = {"model_flavour": "tiny", "output_dir": "out", "max_train_steps": 10, "validation_disable": True}
    datasets = [
        {
            "id": "my-dataset",
            "type": "local",
            "instance_data_dir": "datasets/my-dataset",
            "caption_strategy": "textfile",
            "resolution": 128,
            "cache_dir_vae": "cache/vae",
            "repeats": 1,
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    for name, value in {"config.json": config, "multidatabackend.json": datasets}.items():
        (own_folder / "config" / name).write_text(json.dumps(value), encoding="utf-8")
    (own_folder / "datasets" / "my-dataset" / "broken.jpg").write_bytes(b"broken")
    return own_folder


@pytest.mark.usefixtures("project")
def test_scan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan"]) == 0
    text = capsys.readouterr().out
    assert "6 images, each used 2 times (repeats = 1): 12 samples per epoch" in text
    assert "    size     images\n    96x176   1\n" in text
    assert "left out: 1 not an image\n" in text
    assert "    broken.jpg  not an image  no supported image format\n" in text


@pytest.mark.usefixtures("project")
def test_scan_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan", "--json", "--seed", "7"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    assert found["pictures"] == 6
    assert found["rejected"] == {"not an image": 1}
    assert {"width": 96, "height": 176, "pictures": 1} in found["buckets"]


@pytest.mark.usefixtures("project")
def test_scan_lists_every_picture_as_it_will_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan", "--json", "--pictures", "--progress"]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out)["sets"]
    samples = {sample["name"]: sample for sample in found["samples"]}
    assert sorted(samples) == [f"picture-{number}.png" for number in range(6)]
    assert samples["picture-2.png"] == {
        "set": "my-dataset",
        "name": "picture-2.png",
        "path": "datasets/my-dataset/picture-2.png",
        "width": 96,
        "height": 160,
        "target": [96, 176],
        "resize": [106, 176],
        "crop": [5, 0],
        "captions": ["a soft gradient, number 2"],
        "references": [],
        "mask": None,
    }
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[-1] == {"what": "my-dataset", "done": 7, "total": 7}


@pytest.mark.usefixtures("project")
def test_scan_without_pictures_has_no_list_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan", "--json"]) == 0
    assert "samples" not in json.loads(capsys.readouterr().out)["sets"][0]


def test_show_draws_the_crops(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show"]) == 0
    assert "my-dataset: 6 crops in out/dataset-my-dataset.png" in capsys.readouterr().out
    with Image.open(project / "out" / "dataset-my-dataset.png") as sheet:
        whole = sheet.size
    assert run(["show", "--json", "--out=elsewhere", "--count", "2", "--set", "my-dataset"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["sheets"]
    assert shown == {"id": "my-dataset", "path": "elsewhere/dataset-my-dataset.png", "pictures": 2}
    with Image.open(project / shown["path"]) as sheet:
        assert sheet.width < whole[0]


@pytest.mark.parametrize("kind", ["mask", "segmentation", "alpha"])
def test_show_draws_a_mask_as_the_loss_takes_it(own_folder: Path, kind: str) -> None:
    """Its left half counts nothing: transparent, label 0, or transparent in the image itself."""
    (own_folder / "config").mkdir()
    for folder in ("datasets", "masks"):
        (own_folder / folder).mkdir()
    transparent = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    transparent.paste((255, 255, 255, 255), (32, 0, 64, 64))
    labels = Image.new("L", (64, 64))
    labels.paste(1, (32, 0, 64, 64))
    (transparent if kind == "alpha" else Image.new("RGB", (64, 64))).save(own_folder / "datasets" / "a.png")
    (labels if kind == "segmentation" else transparent).save(own_folder / "masks" / "a.png")
    images: dict[str, Any] = {"id": "photos", "instance_data_dir": "datasets", "resolution": 64}
    images |= {"caption_strategy": "filename"}
    sets = [images, {"id": "text", "dataset_type": "text_embeds", "default": True}]
    if kind == "alpha":
        images["mask_source"] = "alpha"
    else:
        images["conditioning_data"] = "masks"
        masks = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": kind}
        sets.append(masks | {"instance_data_dir": "masks"})
    config = {"model_flavour": "tiny", "output_dir": "out", "max_train_steps": 1}
    for name, value in {"config.json": config, "multidatabackend.json": sets}.items():
        (own_folder / "config" / name).write_text(json.dumps(value), encoding="utf-8")
    assert run(["show"]) == 0
    with Image.open("out/dataset-photos.png") as sheet:
        left = GAP_PX + LABEL_WIDTH_PX + GAP_PX
        levels = [sheet.getpixel((left + x, GAP_PX + 32)) for x in (8, 56)]
    assert levels == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: expected scan, show, cache, captions, duplicates or delete"),
        (
            ["scna"],
            "dataset scna: no such command: .* Did you mean simpletuner dataset scan",
        ),
        (["show", "--count", "none"], "--count = 'none'"),
        (["show", "--count=0"], "--count = '0'"),
        (["show", "--out"], "--out: nothing follows it"),
        (["scan", "--set", "other"], "--set = 'other': no such dataset: expected one of my-dataset"),
        (["cache", "--set", "my-dataset"], "--set with dataset cache"),
        (["show", "--pictures"], "--pictures with dataset show: expected dataset scan"),
        (["show", "--progress"], "--progress with dataset show: expected dataset scan or cache"),
        (["scan", "--pictures"], "--pictures without --json"),
        (["scan", "--verify"], "--verify with dataset scan: expected dataset cache"),
        (["scan", "--lora_rnak", "4"], "lora_rnak"),
    ],
)
@pytest.mark.usefixtures("project")
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(arguments)


def test_problems_of_all_sets_come_together(project: Path) -> None:
    path = project / "config" / "multidatabackend.json"
    first, text = json.loads(path.read_text(encoding="utf-8"))
    sets = [first | {"id": name, "instance_data_dir": name} for name in ("bare", "empty")]
    for entry in sets:
        (project / entry["id"]).mkdir()
    path.write_text(json.dumps([*sets, text]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run(["scan"])
    assert [str(problem).split(":")[0] for problem in caught.value.problems] == ["bare", "empty"]


@pytest.mark.slow  # brings both encoders in
def test_cache_fills_what_a_run_reads(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache"]) == 0
    assert "The caches are complete." in capsys.readouterr().out
    assert len(list((project / "cache" / "vae").rglob("*.safetensors"))) == 6
    assert len(list((project / "cache" / "text").rglob("*.safetensors"))) >= 6
    assert run(["cache", "--json", "--progress"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sets"][0]["pictures"] == 6
    assert {"what": "scan", "done": 7, "total": 7} in [json.loads(x) for x in err.splitlines() if x[0] == "{"]
    assert run(["cache", "--verify"]) == 0
    said = capsys.readouterr().out
    assert "Captions: 0 encoded" in said
    assert "Images: 0 encoded" in said


def test_help_lists_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "--help"]) == 0
    assert "the crops that the run trains on" in " ".join(capsys.readouterr().out.split())
