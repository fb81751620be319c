"""References from their files to the latents of a batch, and what `dataset scan` tells of them."""

import json
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from PIL import Image
from tests.recipes.conftest import PICTURES, Workplace
from tests.thread_ranks import ALONE
from torch import Tensor

from simpletuner.cli.main import main
from simpletuner.config.load import load
from simpletuner.data.cache.latents import all_batches, fill_latents
from simpletuner.data.manifest import scan
from simpletuner.data.pixels import render
from simpletuner.flux2.text import LeftPaddedCodec
from simpletuner.train.caches import EncoderKeys, PreparedData


def encode(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
    """The mean of each cell, 128 times."""
    return torch.nn.functional.avg_pool2d(images, 16).mean(1, keepdim=True).expand(-1, 128, -1, -1)


@pytest.fixture
def place(own_folder: Path) -> Workplace:
    """Images with 1, 4 and 0 references, from a strict set that shares their cache and a loose set with its own."""
    files = {
        "images": {"a": (80, 64), "b": (80, 64), "c": (80, 64)},
        "before": {"a": (160, 128)},
        "style": {"b.0": (64, 64), "b.1": (96, 128), "b.2": (64, 64)},
    }
    for folder, sizes in files.items():
        (own_folder / folder).mkdir()
        for number, (name, size) in enumerate(sizes.items()):
            # Of the loose ones, the first and the last are the same.
            color = (60 * (number % 2), 90, 200) if folder == "style" else (40 * number, 9, len(folder))
            Image.new("RGB", size, color).save(own_folder / folder / f"{name}.png")
    (own_folder / "before/b.png").write_bytes((own_folder / "images/b.png").read_bytes())
    condition = {"dataset_type": "conditioning", "resolution": 96}
    found = Workplace(own_folder)
    images = PICTURES | {"id": "images", "instance_data_dir": "images", "cache_dir_vae": "cache/shared"}
    found.datasets[0] = images | {"caption_strategy": "filename", "conditioning_data": ["before", "style"]}
    found.datasets += [
        condition
        | {"id": "before", "conditioning_type": "reference_strict", "instance_data_dir": "before"}
        | {"cache_dir_vae": "cache/shared"},
        condition | {"id": "style", "conditioning_type": "reference_loose", "instance_data_dir": "style"},
    ]
    found.write()
    return found


def test_latents_are_made_once_and_read_for_each_sample(place: Workplace) -> None:
    loaded = load([], folder=place.folder, environ={})
    (image_set,) = loaded.datasets.train_sets
    manifest = scan(image_set, loaded.datasets.conditions_of(image_set), seed=0, workers=1)
    batches = [(owner.id, [crop.name for crop in batch]) for owner, batch in all_batches([manifest, manifest], 3)]
    assert batches == [
        ("images", ["a.png", "b.png", "c.png"]),
        ("before", ["a.png"]),
        ("style", ["b.0.png"]),
        ("style", ["b.1.png"]),
    ]
    prepared = PreparedData(loaded, EncoderKeys(LeftPaddedCodec("text"), "vae"), (manifest,), ())
    fill_latents(
        [manifest],
        prepared.latent_store,
        "vae",
        lambda: encode,
        batch_size=3,
        workers=1,
        report=lambda _done, _total: None,
        world=ALONE,
    )
    references = prepared.references(manifest.samples)
    a, b, c = references
    width, height = manifest.samples[0].geometry.target
    own = (128, height // 16, width // 16)
    assert [tuple(latent.shape) for latent in a] == [own]
    assert [tuple(latent.shape) for latent in b] == [own, (128, 4, 4), (128, 6, 5), (128, 4, 4)]
    assert c == []
    for sample, latents in zip(manifest.samples, references, strict=True):
        for crop, latent in zip(sample.references, latents, strict=True):
            pixels = torch.from_numpy(render(crop.read(), crop.geometry)).permute(2, 0, 1).float() / 127.5 - 1
            torch.testing.assert_close(latent, encode(pixels[None])[0])


@pytest.mark.usefixtures("place")
def test_dataset_scan_tells_each_pictures_references(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "scan"]) == 0
    assert "images: references: 1 with none, 1 with 1, 1 with 4." in capsys.readouterr().out
    assert main(["dataset", "scan", "--json", "--pictures"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["sets"]
    assert told["references"] == [{"count": n, "pictures": 1} for n in (0, 1, 4)]
    assert (told["conditioning_data"], told["masks"]) == (["before", "style"], 0)
    a, b, c = told["samples"]
    assert [(each["set"], each["name"]) for each in b["references"]] == [
        ("before", "b.png"),
        ("style", "b.0.png"),
        ("style", "b.1.png"),
        ("style", "b.2.png"),
    ]
    assert a["references"][0]["path"] == "before/a.png"
    assert (a["references"][0]["width"], a["references"][0]["target"]) == (160, a["target"])
    assert (c["references"], c["mask"]) == ([], None)


@pytest.mark.usefixtures("place")
def test_dataset_show_draws_a_row_for_each_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "show", "--out=sheets"]) == 0
    assert "images: 3 crops in sheets/dataset-images.png" in capsys.readouterr().out
    with Image.open("sheets/dataset-images.png") as sheet:
        # Five columns of at least 200 pixels: an image and its four references.
        assert 5 * 200 < sheet.width < 6 * 220
