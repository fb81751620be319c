"""Whole runs of the embedded klein: what must change nothing changes no bit, and what is drawn is the pipeline's."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.recipes.conftest import CONFIG, Workplace

from simpletuner.flux2.generate import initial_noise

pytestmark = pytest.mark.slow

PROMPT = "a soft gradient"
IMAGE = "one_64x48_0.png"
DRAWN: dict[str, Any] = {
    "validation_disable": False,
    "validation_resolution": "64x48",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 3,
    "learning_rate": 1e-2,
}
OFFLOADED = {
    "enable_group_offload": True,
    "group_offload_use_stream": True,
    "group_offload_text_encoder": True,
    "group_offload_vae": True,
    "activation_offload": True,
    "offload_during_startup": True,
    "text_encoder_mode": "streamed",
}
ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


def laid_out(folder: Path, pictures: Path, model: Path) -> Workplace:
    shutil.copytree(pictures, folder / "datasets" / "pictures")
    config = CONFIG | DRAWN | {"model_flavour": "tiny-klein", "pretrained_model_name_or_path": str(model)}
    return Workplace(folder, config, prompts={"one": PROMPT})


@pytest.fixture
def klein(own_folder: Path, pictures: Path, tiny_klein_folder: Path) -> Workplace:
    """A working folder whose runs train the embedded klein."""
    return laid_out(own_folder, pictures, tiny_klein_folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_klein_folder: Path) -> Workplace:
    """A run of the embedded klein that was left alone."""
    place = laid_out(tmp_path_factory.mktemp("klein"), pictures, tiny_klein_folder)
    done = place.train_apart()
    assert done.returncode == 0, done.stderr
    return place


def left_by(place: Workplace, name: str = "run") -> dict[str, Any]:
    """Losses, images, and the tensors of all weight files; their headers name the configuration."""
    run = place.run(name)
    found: dict[str, Any] = {"losses": place.losses(name)}
    for path in run.root.rglob("*.png"):
        found[str(path.relative_to(run.root))] = path.read_bytes()
    for path in run.root.rglob("*.safetensors"):
        tensors = load_file(path)
        for key, value in tensors.items():
            found[f"{path.relative_to(run.root)} {key}"] = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in other if one[name] != other[name]] == []


def test_a_run_with_everything_offloaded_and_streamed_is_the_run_without(klein: Workplace, plain: Workplace) -> None:
    """With caches of its own, so that a streamed Qwen3 and a streamed VAE encode here."""
    klein.config |= OFFLOADED
    assert klein.train() == 0
    assert_same(left_by(klein), left_by(plain))


def test_recomputing_changes_no_bit(klein: Workplace, plain: Workplace) -> None:
    shutil.copytree(plain.folder / "cache", klein.folder / "cache")
    klein.config |= {"gradient_checkpointing": False}
    assert klein.train() == 0
    assert_same(left_by(klein), left_by(plain))


def test_killed_and_started_again_it_ends_the_same(klein: Workplace, plain: Workplace) -> None:
    killed = klein.train_apart(kill_at="step:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert klein.train() == 0
    assert_same(left_by(klein), left_by(plain))


def test_validation_images_are_those_of_diffusers_with_the_saved_lora(plain: Workplace) -> None:
    """By true guidance of 4. An image is rounded to 8 bits: a value between two levels may go either way."""
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(
        plain.config["pretrained_model_name_or_path"], dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)

    def expected() -> np.ndarray[Any, Any]:
        image = pipeline(
            prompt=PROMPT,
            latents=initial_noise(42, width=64, height=48),
            height=48,
            width=64,
            num_inference_steps=2,
            guidance_scale=4.0,
            max_sequence_length=64,
            output_type="np",
        ).images[0]
        return image * 255

    def drawn(step: int) -> np.ndarray[Any, Any]:
        return np.asarray(Image.open(plain.run().validation(step) / IMAGE), dtype=np.float32)

    assert np.abs(drawn(0) - expected()).max() <= 0.51
    assert np.abs(drawn(0) - drawn(3)).max() > 2
    pipeline.load_lora_weights(str(plain.run().lora.parent))
    assert np.abs(drawn(3) - expected()).max() <= 0.51


@pytest.mark.parametrize(
    "options",
    [
        {"tread_config": ROUTES, "use_ema": True, "scheduled_sampling_max_step_offset": 100, "lora_dropout": 0.1},
        {"model_type": "full", "learning_rate": 1e-4, "use_ema": True, "ema_decay": 0.5},
    ],
    ids=["LoRA with TREAD, rollouts and EMA", "full with EMA"],
)
def test_what_trains_dev_trains_klein_and_resumes_with_the_same_bits(
    klein: Workplace, plain: Workplace, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain.folder / "cache", klein.folder / "cache")
    klein.config |= options | {"validation_disable": True}
    if "model_type" in options:
        del klein.config["lora_rank"]
    assert klein.train("--output_dir=output/whole") == 0
    assert klein.train("--max_train_steps=1") == 0
    assert klein.train() == 0
    assert_same(left_by(klein), left_by(klein, "whole"))
    assert klein.losses() != plain.losses()
    if "model_type" in options:
        told = "In diffusers: Flux2KleinPipeline.from_pretrained('output/run/model')"
        assert told in capsys.readouterr().out
        from diffusers import Flux2KleinPipeline

        model = Flux2KleinPipeline.from_pretrained("output/run/model", dtype=torch.float32).transformer
        trained = load_file("output/run/model/transformer/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_a_quantized_and_offloaded_text_encoder_has_the_bits_of_a_resident_one(klein: Workplace) -> None:
    klein.config |= {"validation_disable": True, "max_train_steps": 1, "text_encoder_1_precision": "int8-quanto"}
    assert klein.train("--output_dir=output/resident") == 0
    shutil.move(klein.folder / "cache", klein.folder / "first")
    klein.config |= OFFLOADED
    assert klein.train() == 0
    assert klein.losses() == klein.losses("resident")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (klein.folder / "first", klein.folder / "cache")
    )
    assert first == second
