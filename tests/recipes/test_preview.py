"""Validation images drawn on another model with the run's LoRA: what they cost, and what they leave as it was."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.recipes.conftest import HERE, Workplace

from simpletuner.base.errors import AccessError, ConfigError, Stopped

PREVIEWS = {
    "model_flavour": "tiny-klein",
    "caption_dropout_probability": 0.1,
    "max_train_steps": 2,
    "validation_disable": False,
    "validation_resolution": "32x32",
    "validation_step_interval": 1,
    "validation_preview_model": "auto",
    "use_ema": True,
    "ema_validation": "comparison",
}


@pytest.fixture
def previewing(workplace: Workplace) -> Workplace:
    """A klein run that draws on its distilled sibling after each step."""
    workplace.prompts = {"one": "a gradient"}
    workplace.config |= PREVIEWS
    return workplace


def parameters(image: Path) -> dict[str, object]:
    with Image.open(image) as opened:
        return dict(json.loads(opened.info["parameters"]))


@pytest.mark.slow
def test_previews_on_the_distilled_sibling_leave_training_bit_for_bit_as_it_is_also_after_a_signal_in_one(
    previewing: Workplace,
) -> None:
    assert previewing.train("--output_dir=output/plain", "--validation_disable=true") == 0
    ended = previewing.apart(sys.executable, str(HERE / "interrupted.py"), "SIGINT", "validation:1")
    assert ended.returncode == Stopped.exit_code, ended.stderr
    assert previewing.train() == 0
    run, plain = previewing.run(), previewing.run("plain")
    assert previewing.losses() == previewing.losses("plain")
    assert run.lora.read_bytes() == plain.lora.read_bytes()
    name = "optimizer.safetensors"
    assert (run.checkpoint(2) / name).read_bytes() == (plain.checkpoint(2) / name).read_bytes()
    said = parameters(run.validation(2) / "one_32x32_0.png")
    assert (said["model"], said["steps"]) == ("tiny-klein-distilled-1", 4)
    plan = previewing.events("plan")[0]["plan"]
    assert [phase["phase"] for phase in plan["phases"]] == ["text", "latents", "train", "preview"]
    images = [run.validation(step) / "one_32x32_0.png" for step in (0, 1, 2)]
    assert len({image.read_bytes() for image in images}) == 3  # the LoRA acts, and the base is drawn without it


@pytest.mark.slow
def test_a_preview_model_that_is_missing_or_has_other_shapes_ends_the_start_before_anything_is_encoded(
    previewing: Workplace, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, found in ((tiny_folder, "differs from that of tiny-klein"), ("./nowhere", "nowhere: no such folder")):
        assert previewing.train(f"--validation_preview_model={place}") == AccessError.exit_code
        said = capsys.readouterr().err
        assert found in said
        assert "Captions:" not in said
        assert "validation_preview_model" in said
    assert previewing.train("--model_flavour=tiny") == ConfigError.exit_code
    assert "remove it" in capsys.readouterr().err.lower()
