"""Every optimizer trains the embedded model through the real command, and goes on exactly where it was killed."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

from simpletuner.config.optimizers import OPTIMIZERS

RATES = {"prodigy": 1.0, "adafactor": 0.05}
AVERAGED = {"use_ema": True, "ema_decay": 0.5}


def trained_bytes(place: Workplace, run: str) -> dict[str, bytes]:
    """All that a run leaves of what it learned."""
    root = place.run(run).root
    files = [*root.glob("*.safetensors"), *root.glob("ema/*.safetensors"), *root.glob("checkpoints/*/optimizer.*")]
    files += root.glob("checkpoints/*/ema/*.safetensors")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def settings(name: str) -> dict[str, Any]:
    more = {"learning_rate": RATES.get(name, 3e-3), "max_train_steps": 4, "gradient_accumulation_steps": 1}
    return more | {"optimizer": name, "checkpoint_step_interval": 2} | AVERAGED


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_and_started_again_it_ends_the_same(workplace: Workplace, name: str) -> None:
    moment = "checkpoint:4" if name == "prodigy" else "step:3"
    workplace.config |= settings(name) | {"lora_plus_ratio": 1.0 if name == "prodigy" else 2.0}
    assert workplace.train("--output_dir=output/straight") == 0
    killed = workplace.train_apart(kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert workplace.train() == 0
    assert [event["resumed_from"] for event in workplace.events("run")] == [None, 2]
    assert trained_bytes(workplace, "run") == trained_bytes(workplace, "straight")
    assert workplace.losses() == workplace.losses("straight")
    learned = load_file(workplace.run().lora)
    assert any(tensor.any() for key, tensor in learned.items() if "lora_B" in key)


@pytest.mark.slow
def test_an_average_and_being_looked_at_change_no_bit_of_the_run(workplace: Workplace) -> None:
    """Schedule-free weights are switched for every picture, loss, average and checkpoint; they come back exactly."""
    workplace.config |= {"optimizer": "adamw_schedulefree", "checkpoint_step_interval": 100, "max_train_steps": 2}
    workplace.config["num_eval_images"] = 1
    workplace.datasets.append(dict(workplace.datasets[0], id="held", dataset_type="eval", cache_dir_vae="cache/held"))
    assert workplace.train("--output_dir=output/plain", "--eval_steps_interval=100") == 0
    workplace.config |= {"checkpoint_step_interval": 1, "eval_steps_interval": 1} | AVERAGED
    assert workplace.train() == 0
    plain, looked = trained_bytes(workplace, "plain"), trained_bytes(workplace, "run")
    lora = "pytorch_lora_weights.safetensors"
    one, two = (load_file(workplace.run(name).lora) for name in ("plain", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert plain.keys() == {lora, "checkpoints/step-000002/optimizer.safetensors"}
    assert looked.keys() - plain.keys() == {
        f"ema/{lora}", f"checkpoints/step-000001/ema/{lora}", f"checkpoints/step-000002/ema/{lora}",
        "checkpoints/step-000001/optimizer.safetensors",
    }  # fmt: skip
    measured = [event for event in workplace.events("validation") if event["loss"] is not None]
    assert measured[0]["ema_loss"] == measured[0]["loss"]
    assert measured[-1]["ema_loss"] != measured[-1]["loss"]


@pytest.mark.slow
def test_no_decay_is_the_live_adapter_bit_for_bit(workplace: Workplace) -> None:
    workplace.config |= {"use_ema": True, "ema_decay": 0.0, "max_train_steps": 2}
    assert workplace.train() == 0
    for folder in (workplace.run().root, workplace.run().checkpoint(1)):
        name = "pytorch_lora_weights.safetensors"
        assert (folder / "ema" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "mode",
    ["comparison", pytest.param("ema_only", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)],
)
def test_the_averages_pictures_lie_beside_the_live_ones(workplace: Workplace, mode: str) -> None:
    workplace.prompts = {"one": "a gradient", "two": "another"}
    workplace.config |= {
        "use_ema": True,
        "ema_decay": 0.9,
        "ema_validation": mode,
        "learning_rate": 0.05,
        "max_train_steps": 1,
        "validation_disable": False,
        "validation_resolution": "32x32",
        "validation_num_inference_steps": 1,
    }
    assert workplace.train() == 0
    folder = workplace.run().validation(1)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    live = {"one_32x32_0.png", "two_32x32_0.png"} if mode != "ema_only" else set()
    average = {"ema/one_32x32_0.png", "ema/two_32x32_0.png"} if mode != "none" else set()
    assert found == live | average | {"sheet.png"}
    pictures = [picture for event in workplace.events("validation") for picture in event["pictures"]]
    last = {str(Path(p["path"]).relative_to("validation/step-000001")): p["is_ema"] for p in pictures[2:]}
    assert last == dict.fromkeys(live, False) | dict.fromkeys(average, True)
    with Image.open(folder / "sheet.png") as sheet:
        columns = {"comparison": 3, "ema_only": 2, "none": 2}[mode]
        assert sheet.width == _sheet_width(columns)
    if mode == "comparison":
        with Image.open(folder / "one_32x32_0.png") as one, Image.open(folder / "ema" / "one_32x32_0.png") as other:
            assert one.tobytes() != other.tobytes()


def _sheet_width(columns: int) -> int:
    from simpletuner.data.sheet import GAP_PX, LABEL_WIDTH_PX

    return GAP_PX + (LABEL_WIDTH_PX + GAP_PX) * (columns + 1)
