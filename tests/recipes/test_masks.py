"""Masks in whole runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.recipes.conftest import TEXT, Workplace

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"
MASKS: dict[str, Any] = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "datasets/masks",
    "cache_dir_vae": "cache/masks",
}


def add_masks(place: Workplace, share: float, **keys: Any) -> None:
    """Give each picture a mask that is white on the left `share` of it."""
    folder = place.folder / "datasets" / "masks"
    folder.mkdir()
    for path in sorted((place.folder / "datasets" / "pictures").glob("*.png")):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size)
            mask.paste(255, (0, 0, round(share * picture.width), picture.height))
        mask.save(folder / path.name)
    place.datasets[0] |= {"conditioning_data": "masks"} | keys
    place.datasets.append(dict(MASKS))


def tensors(place: Workplace, name: str = "run") -> dict[str, torch.Tensor]:
    """Those of the LoRA: the header knows the options, which may differ."""
    return load_file(place.run(name).lora)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_masks_of_ones_change_no_bit(workplace: Workplace, uninterrupted: Workplace) -> None:
    add_masks(workplace, 1)
    workplace.config["masked_loss_floor"] = 0.25
    assert workplace.train() == 0
    assert_equal(tensors(workplace), tensors(uninterrupted))
    optimizers = [place.run().checkpoint(3) / "optimizer.safetensors" for place in (workplace, uninterrupted)]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()
    assert workplace.losses() == uninterrupted.losses()


ROUTE = {"routes": [{"selection_ratio": 0.25, "start_layer_idx": 1, "end_layer_idx": -2}]}
ROLLOUT = {
    "scheduled_sampling_max_step_offset": 40,
    "scheduled_sampling_probability": 1.0,
    "scheduled_sampling_reflexflow": True,
}
COMPANY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "killed": ({}, {}),
    "offloaded": ({}, {"enable_group_offload": True, "gradient_checkpointing": True}),
    "quantized, averaged": ({"base_model_precision": "int8-quanto", "use_ema": True}, {}),
    "routed, rolled out": ({"tread_config": ROUTE} | ROLLOUT, {}),
}
"""Options of both runs, and what the second has besides, which must change no bit."""


@pytest.mark.slow
@pytest.mark.parametrize("company", COMPANY)
def test_masks_beside_other_features(workplace: Workplace, company: str) -> None:
    """A run that is interrupted or offloaded ends with the bits of one that is not, with masks drawn at random."""
    both, second = COMPANY[company]
    add_masks(workplace, 0.5)
    workplace.config |= {"masked_loss_probability": 0.6, "masked_loss_floor": 0.1, "max_train_steps": 2} | both
    assert workplace.train("--output_dir=output/whole") == 0
    workplace.config |= second
    if company == "killed":
        killed = workplace.train_apart(kill_at="step:1")
        assert killed.returncode == -9, killed.stderr
    elif not second:
        assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train() == 0
    assert_equal(tensors(workplace), tensors(workplace, "whole"))
    assert workplace.losses() == workplace.losses("whole")
    if "use_ema" in both:
        averages = [workplace.run(name).checkpoint(2) / "ema" for name in ("run", "whole")]
        files = [sorted(path.name for path in folder.rglob("*.safetensors")) for folder in averages]
        assert files[0] == files[1] != []
        assert_equal(*(load_file(folder / files[0][0]) for folder in averages))


@pytest.mark.slow
def test_alpha_weighs_as_a_mask_of_the_same_levels_does(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the colors below the alpha channel are those of the image, all is equal but the cached pixels' keys."""
    add_masks(workplace, 0.5)
    datasets = workplace.folder / "datasets"
    shutil.copytree(datasets / "pictures", datasets / "cut-out")
    for path in sorted((datasets / "cut-out").glob("*.png")):
        with Image.open(path) as picture, Image.open(datasets / "masks" / path.name) as mask:
            picture.putalpha(mask)
            picture.save(path)
    assert workplace.train("--output_dir=output/mask", "--max_train_steps=1") == 0
    own = {"instance_data_dir": "datasets/cut-out", "mask_source": "alpha", "conditioning_data": []}
    workplace.datasets = [workplace.datasets[0] | own, dict(TEXT)]
    assert workplace.train("--output_dir=output/alpha", "--max_train_steps=1") == 0
    assert "composited on white" not in capsys.readouterr().out
    assert workplace.losses("alpha") == workplace.losses("mask")


def test_masks_under_which_nothing_counts_end_the_run_before_it_encodes(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    add_masks(workplace, 0)
    assert workplace.train() == 3
    said = capsys.readouterr().err
    assert "6 masks are all black in the trained crop" in said
    assert said.count("datasets/masks/") == 6
    assert not list((workplace.folder / "cache" / "text").rglob("*.safetensors"))


def json_blocks(text: str) -> list[Any]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@pytest.mark.slow
def test_the_example_of_the_page_runs(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """As written, but for the number of steps."""
    config, datasets = json_blocks(PAGE.read_text(encoding="utf-8"))[:2]
    add_masks(workplace, 0.5)
    (workplace.folder / "datasets" / "pictures").rename(workplace.folder / datasets[0]["instance_data_dir"])
    (workplace.folder / "datasets" / "masks").rename(workplace.folder / datasets[1]["instance_data_dir"])
    workplace.config, workplace.datasets = config, datasets
    assert workplace.train("--max_train_steps=2", "--validation_disable") == 0
    assert "6 images have one; on average" in capsys.readouterr().out
