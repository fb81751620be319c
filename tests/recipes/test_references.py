"""Whole runs with reference images: batches whose samples have two, one or none, of different shapes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.recipes.conftest import HERE, Workplace
from tests.recipes.test_offload import STREAMED, looked_at, seen

REFERENCES: dict[str, Any] = {
    "id": "references",
    "type": "local",
    "dataset_type": "conditioning",
    "conditioning_type": "reference_loose",
    "instance_data_dir": "datasets/references",
    "resolution": 80,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/references",
}


def give_references(place: Workplace) -> None:
    """Of six images three have a reference and one has two."""
    folder = place.folder / "datasets" / "references"
    folder.mkdir()
    sizes = {"picture-0": (96, 64), "picture-1": (64, 64), "picture-3.1": (64, 96), "picture-3.2": (80, 80)}
    for index, (name, size) in enumerate({**sizes, "picture-5": (128, 128)}.items()):
        Image.new("RGB", size, (40 * index, 200 - 30 * index, 90)).save(folder / f"{name}.png")
    for entry in place.datasets:
        if "instance_data_dir" in entry:
            entry |= {"crop_aspect": "square", "conditioning_data": "references"}
    place.datasets.append(dict(REFERENCES))
    place.config |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}


@pytest.mark.slow
def test_dropped_references_are_as_none(workplace: Workplace) -> None:
    """With a probability of 1 the run has the losses and the LoRA of one without conditioning sets, bit for bit."""
    workplace.config |= {"max_train_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    workplace.datasets[0]["crop_aspect"] = "square"
    assert workplace.train("--output_dir=output/plain") == 0
    give_references(workplace)
    assert workplace.train("--reference_dropout_probability=1") == 0
    assert workplace.losses() == workplace.losses("plain")
    found, expected = (sorted(workplace.run(name).root.rglob("optimizer.safetensors")) for name in ("run", "plain"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]
    assert workplace.train("--output_dir=output/with") == 0
    assert workplace.losses("with") != workplace.losses()


def test_the_example_of_the_docs_trains(workplace: Workplace, pictures: Path) -> None:
    page = (HERE.parents[1] / "docs" / "edit.md").read_text(encoding="utf-8")
    config, workplace.datasets = map(json.loads, re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    workplace.config = config | {"mixed_precision": "no", "max_workers": 1, "validation_disable": True}
    for folder in ("after", "before"):
        shutil.copytree(pictures, workplace.folder / "datasets" / folder)
    assert workplace.train("--max_train_steps=1") == 0
    assert "references: 6 with 1" in workplace.run("edit").log.read_text()


def full_example(place: Workplace) -> None:
    """References in training, held-out loss and EMA, with TREAD, rollouts and references that see their own alone."""
    looked_at(place)
    give_references(place)
    place.config |= {
        "max_train_steps": 2,
        "num_eval_images": 1,
        "eval_steps_interval": 2,
        "validation_disable": True,
        "reference_attention": "own",
        "reference_dropout_probability": 0.2,
    }


def killed(place: Workplace) -> None:
    assert place.train_apart(kill_at="step:2").returncode < 0
    assert place.train() == 0


def offloaded(place: Workplace) -> None:
    place.config |= STREAMED | {"activation_offload": True}
    assert place.train() == 0


QUANTIZED = {"base_model_precision": "int8-quanto"}
WAYS: dict[str, tuple[dict[str, Any], Callable[[Workplace], None]]] = {
    "killed": ({}, killed),
    "offloaded": ({}, offloaded),
    "quantized and offloaded": (QUANTIZED, offloaded),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "way"), WAYS.values(), ids=WAYS)
def test_the_same_run_in_another_way(
    workplace: Workplace, options: dict[str, Any], way: Callable[[Workplace], None]
) -> None:
    full_example(workplace)
    workplace.config |= options
    assert workplace.train("--output_dir=output/plain") == 0
    way(workplace)
    found, expected = seen(workplace, "run"), seen(workplace, "plain")
    assert found["losses"] == expected["losses"]
    assert found["held out"] == expected["held out"]
    states = [name for name in expected if name.endswith(("optimizer.safetensors", "ema.safetensors"))]
    assert states
    assert [name for name in states if found[name] != expected[name]] == []


@pytest.mark.slow
def test_sharded_it_is_the_run_of_one_process(workplace: Workplace) -> None:
    """Each rank has one sample, with its own number of references. One process and two add the same two numbers, so
    nothing is rounded otherwise.
    """
    give_references(workplace)
    workplace.config |= {"max_train_steps": 2, "train_batch_size": 1, "caption_dropout_probability": 0.0}
    assert workplace.train("--output_dir=output/one", "--gradient_accumulation_steps=2") == 0
    done = workplace.train_apart("--output_dir=output/two", "--num_processes=2", "--fsdp_enable=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert workplace.losses("two") == workplace.losses("one")
