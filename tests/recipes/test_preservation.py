"""docs/preservation.md in whole runs."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

from resume_matrix import ADAPTER_LIMIT, LOSS_LIMIT, distance

PAGE = (Path(__file__).parents[2] / "docs" / "preservation.md").read_text(encoding="utf-8")

HELD: dict[str, Any] = {
    "preservation": "class",
    "preservation_weight": 0.5,
    "preservation_trigger": "gradient",
    "preservation_class": "image",
}
ROUTE = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


def add_regularization(place: Workplace) -> None:
    """A second set, of two of the same images, that is held at the base."""
    folder = place.folder / "datasets" / "others"
    shutil.copytree(place.folder / "datasets" / "pictures", folder)
    for index in range(2, 6):
        for suffix in ("png", "txt"):
            (folder / f"picture-{index}.{suffix}").unlink()
    keys = {"id": "others", "instance_data_dir": "datasets/others", "cache_dir_vae": "cache/others"}
    place.datasets.insert(1, place.datasets[0] | keys | {"is_regularisation_data": True, "loss_weight": 0.5})


def assert_same_lora(place: Workplace, one: str, other: str) -> None:
    ours, theirs = (load_file(place.run(name).lora) for name in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert place.losses(one) == place.losses(other)


@pytest.mark.slow
def test_a_weight_of_0_is_the_run_without_it_bit_for_bit(cached_workplace: Workplace) -> None:
    place = cached_workplace
    place.config |= {"max_train_steps": 2, "lora_dropout": 0.1}
    assert place.train("--output_dir=output/without") == 0
    place.config |= HELD | {"preservation_weight": 0}
    assert place.train() == 0
    assert_same_lora(place, "run", "without")
    assert {event["preservation_loss"] for event in place.events("step")} == {None}


OFFLOAD = {"enable_group_offload": True, "group_offload_use_stream": "true", "gradient_checkpointing": False}
"""Changes no bit of a run."""

FEATURES: dict[str, dict[str, Any]] = {
    "tread, rollout and average": {
        "tread_config": ROUTE,
        "scheduled_sampling_max_step_offset": 40,
        "use_ema": True,
        "ema_decay": 0.9,
        "lora_dropout": 0.1,
    },
    "quantized": {"base_model_precision": "int8-quanto", "mixed_precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("features", FEATURES)
def test_it_trains_and_resumes_with(workplace: Workplace, features: str) -> None:
    """A second loss and a regularization set: killed after the second step and resumed, then with other memory."""
    place = workplace
    add_regularization(place)
    place.config |= HELD | FEATURES[features] | {"max_train_steps": 3}
    assert place.train("--output_dir=output/whole") == 0
    held = [event["preservation_loss"] for event in place.events("step", "whole")]
    assert held[0] == 0 or features == "quantized", "the adapter of a first step is the base"
    assert max(held) > 0
    killed = place.train_apart(kill_at="step:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert place.train() == 0
    assert_same_lora(place, "run", "whole")
    again = {event["step"]: event["preservation_loss"] for event in place.events("step")}
    assert [again[step] for step in sorted(again)] == held
    place.config |= OFFLOAD | {"output_dir": "output/offload"}
    assert place.train() == 0
    assert_same_lora(place, "offload", "whole")
    if "use_ema" in place.config:
        averages = [load_file(place.run(name).root / "ema" / place.run().lora.name) for name in ("run", "whole")]
        assert all(torch.equal(averages[0][key], value) for key, value in averages[1].items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_what_one_accumulates(workplace: Workplace) -> None:
    """Copies (DDP) and shards (FSDP2), alike to the bit.

    A step adds four gradients: one process as ((g₀ + p₀) + g₁) + p₁, two as (g₀ + p₀) + (g₁ + p₁). The adapters of
    three steps were 6.8e-8 apart. The second loss is a small difference of large numbers: 1.5e-6.
    """
    place = workplace
    add_regularization(place)
    place.config |= HELD | {"max_train_steps": 3, "lora_dropout": 0.1, "scheduled_sampling_max_step_offset": 40}
    for name, flags in (
        ("alone", ["--num_processes=1", "--gradient_accumulation_steps=2"]),
        ("ddp", ["--num_processes=2", "--gradient_accumulation_steps=1"]),
        ("fsdp", ["--num_processes=2", "--gradient_accumulation_steps=1", "--fsdp_enable"]),
    ):
        done = place.train_apart(f"--output_dir=output/{name}", *flags)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert_same_lora(place, "fsdp", "ddp")
    assert place.losses("ddp") == pytest.approx(place.losses("alone"), rel=LOSS_LIMIT)
    assert distance(place.run("ddp").lora, place.run("alone").lora) <= ADAPTER_LIMIT
    held = {
        name: [event["preservation_loss"] for event in place.events("step", name)] for name in ("alone", "ddp", "fsdp")
    }
    assert held["fsdp"] == held["ddp"]
    assert held["ddp"] == pytest.approx(held["alone"], rel=1e-5)


@pytest.mark.slow
def test_the_pages_example_runs_as_it_stands(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    config, datasets = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[:2])
    add_regularization(workplace)
    for text in (workplace.folder / "datasets" / "pictures").glob("*.txt"):
        text.write_text(text.read_text().replace("a soft gradient", "a zwx gradient"))
    (workplace.folder / "datasets" / "pictures" / "picture-0.txt").write_text("no word of it")
    workplace.config = config
    workplace.datasets = datasets
    assert workplace.train() == 0
    told = capsys.readouterr().out
    assert "preservation class: 1 of 6 captions do not contain 'zwx' and take no part: no word of it" in told
    assert ", preservation loss 0." in told
    assert len(workplace.losses("preserved")) == config["max_train_steps"]
