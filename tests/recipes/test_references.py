"""Whole runs with reference images: batches whose samples have two, one or none, of different shapes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.recipes.conftest import Workplace
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


def test_dropped_references_are_as_none(workplace: Workplace) -> None:
    """With a probability of 1 the run has the losses and the LoRA of one without conditioning sets, bit for bit."""
    workplace.config |= {"max_train_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    workplace.datasets[0]["crop_aspect"] = "square"
    assert workplace.train("--output_dir=output/plain") == 0
    give_references(workplace)
    assert workplace.train("--reference_dropout_probability=1") == 0
    assert workplace.losses() == workplace.losses("plain")
    found, expected = (workplace.run(name).root for name in ("run", "plain"))
    for state in ("optimizer.safetensors",):
        assert [path.read_bytes() for path in found.rglob(state)] == [
            path.read_bytes() for path in expected.rglob(state)
        ]
    assert workplace.train("--output_dir=output/with") == 0
    assert workplace.losses("with") != workplace.losses()


def full_example(place: Workplace) -> None:
    """References in training, held-out loss and EMA, with TREAD, rollouts and references that see their own alone."""
    looked_at(place)
    give_references(place)
    place.config |= {"reference_attention": "own", "reference_dropout_probability": 0.2, "validation_disable": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Workplace:
    """Three steps of the example, once with plain weights and once with quantized ones."""
    place = Workplace(tmp_path_factory.mktemp("references"))
    shutil.copytree(pictures, place.folder / "datasets" / "pictures")
    full_example(place)
    for name, flags in (("plain", []), ("int8", ["--base_model_precision=int8-quanto"])):
        done = place.train_apart(f"--output_dir=output/{name}", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
    return place


def beside(place: Workplace, finished: Workplace) -> None:
    full_example(place)
    for name in ("cache", "output"):
        shutil.copytree(finished.folder / name, place.folder / name)


def changed(flag: dict[str, Any]) -> Callable[[Workplace], str]:
    def run(place: Workplace) -> str:
        place.config |= flag
        assert place.train() == 0
        return "int8" if "base_model_precision" in flag else "plain"

    return run


def killed(place: Workplace) -> str:
    assert place.train_apart(kill_at="step:2").returncode < 0
    assert place.train() == 0
    return "plain"


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        killed,
        changed(STREAMED | {"activation_offload": True}),
        changed(STREAMED | {"base_model_precision": "int8-quanto"}),
        changed({"gradient_checkpointing": False}),
    ],
    ids=["killed", "offloaded", "quantized and offloaded", "not recomputed"],
)
def test_the_same_run_in_another_way(
    workplace: Workplace, finished: Workplace, way: Callable[[Workplace], str]
) -> None:
    beside(workplace, finished)
    name = way(workplace)
    found, expected = seen(workplace, "run"), seen(workplace, name)
    assert found["losses"] == expected["losses"]
    assert found["held out"] == expected["held out"]
    states = [each for each in expected if each.endswith("optimizer.safetensors") or "ema_state" in each]
    assert states
    assert [each for each in states if found[each] != expected[each]] == []


@pytest.mark.slow
def test_sharded_it_is_the_run_of_one_process(workplace: Workplace, finished: Workplace) -> None:
    """Each rank has one sample, with its own number of references. Tolerance: as in test_many_gpus."""
    beside(workplace, finished)
    workplace.config |= {"scheduled_sampling_max_step_offset": 0, "train_batch_size": 1}
    one, other = "--output_dir=output/one", "--output_dir=output/two"
    assert workplace.train_apart(one, "--gradient_accumulation_steps=2").returncode == 0
    done = workplace.train_apart(other, "--num_processes=2", "--fsdp_enable=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert workplace.losses("two") == pytest.approx(workplace.losses("one"), rel=1e-6)
