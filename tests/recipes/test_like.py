"""`train --like FILE` on the images of the first run: the same bits, from the options in the file's header alone."""

import json

import pytest
from safetensors import safe_open
from tests.recipes.conftest import Workplace


@pytest.mark.slow
def test_a_run_like_another_on_its_images_is_that_run(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    place = cached_workplace
    place.config |= {"lora_alpha": 2, "gradient_accumulation_steps": 1, "modelspec_trigger_phrase": "a zorb"}
    place.config |= {"max_train_steps": 2, "checkpoint_step_interval": 0, "seed": 7}
    assert place.train() == 0
    first = place.run().lora
    # What is about this machine, and no more, comes from the configuration.
    machine = ("output_dir", "validation_disable", "vae_batch_size", "text_encoder_batch_size", "write_batch_size")
    place.config = {name: place.config[name] for name in (*machine, "max_workers", "modelspec_trigger_phrase")}
    assert place.train(f"--like={first}", "--output_dir=output/second") == 0
    told = capsys.readouterr().err
    assert f"From {first}: " in told
    assert "lora_alpha = 2" in told
    assert "output_dir = 'output/second'" in told
    assert place.run("second").lora.read_bytes() == first.read_bytes()
    with safe_open(first, framework="pt") as file:
        header = file.metadata()
    assert str(place.folder) not in json.dumps(header)
    assert header["modelspec.trigger_phrase"] == "a zorb"
    assert header["modelspec.architecture"] == "Flux.2-tiny/lora"
    assert header["modelspec.resolution"].endswith("x64")
