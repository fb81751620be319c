"""LoRAs and whole models of the embedded klein: on its distilled sibling, on another flavour and in diffusers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace
from tests.small_decoder import CHANNELS, WEIGHTS, make_small_decoder

from simpletuner.cli.main import main

SMALL = ["--prompt", "fish", "--width", "32", "--height", "48", "--steps", "1", "--mixed_precision", "no"]


@pytest.fixture
def klein(workplace: Workplace) -> Workplace:
    workplace.config |= {"model_flavour": "tiny-klein", "max_train_steps": 1, "gradient_accumulation_steps": 1}
    return workplace


@pytest.mark.slow
def test_a_lora_fits_base_and_distilled_and_is_refused_elsewhere(
    klein: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert klein.train() == 0
    lora = str(klein.run().lora)
    capsys.readouterr()
    assert main(["sample", "--model_flavour=tiny-klein-distilled", "--lora", lora, *SMALL]) == 0
    assert "was trained on" not in capsys.readouterr().err
    refused = f"{lora} does not fit this model, tiny: 32 of 32 layers"
    remedy = "tiny-klein-1 (tiny-klein). Give --model_flavour tiny-klein to use this file."
    for command in (
        ["sample", "--model_flavour=tiny", "--lora", lora, *SMALL],
        ["train", "--model_flavour=tiny", "--output_dir=output/other", "--init_lora", lora],
    ):
        assert main(command) == 6
        told = capsys.readouterr().err
        assert refused in told
        assert remedy in told


@pytest.mark.slow
def test_a_whole_model_with_a_small_decoder_is_a_pipeline_for_diffusers(
    klein: Workplace, tiny_klein_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import Flux2KleinPipeline

    for name in ("lora_rank", "lora_alpha"):
        klein.config.pop(name, None)
    klein.config |= {"model_type": "full", "learning_rate": 1e-4, "pretrained_model_name_or_path": "base"}
    (klein.folder / "base").symlink_to(tiny_klein_folder)
    klein.write()
    assert main(["dataset", "cache"]) == 0
    # A single file beside others, with no config of its own.
    small = make_small_decoder(tiny_klein_folder / "vae", klein.folder / "small")
    (klein.folder / "vaes").mkdir()
    file = klein.folder / "vaes" / "full_encoder_small_decoder.safetensors"
    (small / WEIGHTS).rename(file)
    (file.parent / "another.safetensors").touch()
    klein.config["pretrained_vae_model_name_or_path"] = str(file)
    capsys.readouterr()
    assert klein.train() == 0
    model = klein.run().model
    printed = capsys.readouterr().out
    told = [line for line in printed.splitlines() if line.startswith("Images: 0 encoded")]
    assert [line.endswith(" s, 6 already cached.") for line in told] == [True]
    assert f"In diffusers: Flux2KleinPipeline.from_pretrained({str(model.relative_to(klein.folder))!r})" in printed
    assert sorted(path.name for path in (model / "vae").iterdir()) == ["config.json", WEIGHTS]

    pipe = Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32)
    assert pipe.vae.config.decoder_block_out_channels == CHANNELS
    assert not pipe.config.is_distilled
    ours = load_file(model / "transformer" / WEIGHTS)
    assert pipe.transformer.state_dict().keys() == ours.keys()
    assert all(tensor.equal(ours[name].float()) for name, tensor in pipe.transformer.state_dict().items())
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "Flux2KleinPipeline"
