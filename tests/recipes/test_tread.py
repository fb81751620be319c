"""TREAD in whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

SNIPPETS = Path(__file__).parents[1] / "fixtures" / "quickstart"


def routes(ratio: float, start: int = 1, end: int = -2) -> dict[str, Any]:
    route = {"selection_ratio": ratio, "start_layer_idx": start, "end_layer_idx": end}
    return {"tread_config": {"routes": [route]}}


@pytest.mark.slow
def test_keeping_all_changes_no_bit(workplace: Workplace, uninterrupted: Workplace) -> None:
    workplace.config |= routes(1.0)
    assert workplace.train() == 0
    ours, theirs = workplace.run(), uninterrupted.run()
    # Tensors, not files: the header's fingerprint of the configuration is another.
    found, expected = load_file(ours.lora), load_file(theirs.lora)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(value) for key, value in expected.items())
    optimizers = [(run.checkpoint(3) / "optimizer.safetensors").read_bytes() for run in (ours, theirs)]
    assert optimizers[0] == optimizers[1]
    assert workplace.losses() == uninterrupted.losses()


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_an_interrupted_run_ends_the_same(workplace: Workplace, gradient_checkpointing: bool) -> None:
    workplace.config |= routes(0.5) | {"gradient_checkpointing": gradient_checkpointing}
    assert workplace.train("--output_dir=output/whole") == 0
    assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train() == 0
    assert workplace.run().lora.read_bytes() == workplace.run("whole").lora.read_bytes()
    assert workplace.losses() == workplace.losses("whole")


@pytest.mark.slow
def test_what_is_looked_at_is_not_routed(workplace: Workplace) -> None:
    """With a rate of nothing the model stays what it is: routed or not, losses differ, looks do not."""
    held_out = {"id": "held-out", "dataset_type": "eval", "cache_dir_vae": "cache/eval"}
    workplace.datasets.insert(0, workplace.datasets[0] | held_out)
    workplace.prompts = {"one": "a gradient"}
    workplace.config |= {
        "max_train_steps": 1,
        "learning_rate": 1e-20,
        "adam_weight_decay": 0.0,
        "validation_disable": False,
        "validation_resolution": "32x32",
        "validation_num_inference_steps": 2,
        "num_eval_images": 2,
    }
    assert workplace.train("--output_dir=output/plain") == 0
    workplace.config |= routes(0.25)
    assert workplace.train() == 0
    looked = [[event["loss"] for event in workplace.events("validation", name)] for name in ("plain", "run")]
    assert looked[0] == looked[1]
    pictures = [workplace.run(name).validation(1) / "one_32x32_0.png" for name in ("plain", "run")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert workplace.losses() != workplace.losses("plain")


@pytest.mark.parametrize(
    ("snippet", "place"),
    [("tread-start2", "blocks 2–6"), pytest.param("tread-start4", "block 4", marks=pytest.mark.slow)],
)
def test_the_quickstarts_routes_are_told(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], snippet: str, place: str
) -> None:
    workplace.config |= json.loads((SNIPPETS / f"{snippet}.json").read_bytes())
    assert workplace.train("--max_train_steps=1") == 0
    text = capsys.readouterr().out
    assert f"TREAD keeps 8 of 16 image tokens in {place} of 8, at 64x64." in text
    assert "selection_ratio" not in text


def test_a_route_outside_of_another_model_is_found_before_the_pictures_are_read(
    workplace: Workplace, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.config |= routes(0.5, 2, 50) | {"pretrained_model_name_or_path": str(tiny_folder)}
    assert workplace.train() == 2
    assert "end_layer_idx = 50: expected -8 to 7: the model has 8 blocks" in capsys.readouterr().err
    assert not [event for event in workplace.events("phase") if event["phase"] == "scan"]
