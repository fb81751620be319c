"""Whole runs over quantized weights, through the real command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

from simpletuner.cli.main import main
from simpletuner.config.precisions import PRECISIONS
from simpletuner.flux2.export import read_lora

HERE = [name for name, known in PRECISIONS.items() if not known.needs_accelerator]


def ends_alike(place: Workplace, one: str, two: str) -> None:
    assert place.run(one).lora.read_bytes() == place.run(two).lora.read_bytes()
    assert place.losses(one) == place.losses(two)


def flags(name: str, **options: object) -> list[str]:
    given = {"output_dir": f"output/{name}"} | options
    return [f"--{key}={value}" for key, value in given.items()]


@pytest.mark.slow
def test_no_change_changes_no_bit(workplace: Workplace, same_bytes: Any) -> None:
    off = {"base_model_precision": "no_change", "text_encoder_1_precision": "no_change"}
    assert workplace.train(*flags("run", **off)) == 0
    same_bytes(workplace)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [*((name, "bf16") for name in HERE), ("int4-quanto", "fp32")])
def test_each_trains_resumes_bit_for_bit_and_exports(
    workplace: Workplace, tiny_folder: Path, name: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"base_model_precision": name, "text_encoder_1_precision": name, "base_model_default_dtype": dtype}
    given |= {"base_model_cache_dir": "kept", "mixed_precision": "bf16" if dtype == "bf16" else "no"}
    given |= {"pretrained_model_name_or_path": tiny_folder}
    assert workplace.train(*flags("whole", **given)) == 0
    assert f"The base in {name} takes " in capsys.readouterr().out
    assert len(list((workplace.folder / "kept").iterdir())) == 2
    for steps in (1, 3):
        assert workplace.train(*flags("parts", **given, max_train_steps=steps)) == 0
    assert "made again" not in capsys.readouterr().out
    ends_alike(workplace, "whole", "parts")
    plain = {key: value for key, value in given.items() if "precision" not in key or key == "mixed_precision"}
    assert workplace.train(*flags("plain", **plain)) == 0
    assert workplace.losses("plain") != workplace.losses("whole")
    near = 0.2 if name == "int2-quanto" else 0.05
    assert workplace.losses("whole") == pytest.approx(workplace.losses("plain"), rel=near)
    learned = read_lora(workplace.run("whole").lora)
    assert all(torch.isfinite(tensor).all() for layer in learned.layers.values() for tensor in (layer.a, layer.b))
    loads_in_diffusers(workplace.run("whole").lora, tiny_folder)


def loads_in_diffusers(lora: Path, model: Path) -> None:
    from diffusers import Flux2Pipeline

    pipe = Flux2Pipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(str(lora.parent))
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.slow
def test_recomputed_or_not_quantized_losses_are_the_same_bits(workplace: Workplace) -> None:
    given = {"base_model_precision": "int8-quanto", "max_train_steps": 2}
    for name, choice in (("on", "true"), ("off", "false")):
        assert workplace.train(*flags(name, **given, gradient_checkpointing=choice)) == 0
    assert workplace.losses("on") == workplace.losses("off")
    one, two = (load_file(workplace.run(name).lora) for name in ("on", "off"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
def test_compiled_it_is_near_and_one_artifact_a_kind(workplace: Workplace) -> None:
    given = {"base_model_precision": "int4-quanto", "max_train_steps": 2}
    assert workplace.train(*flags("eager", **given)) == 0
    done = workplace.train_apart(*flags("compiled", **given, dynamo_backend="inductor"))
    assert done.returncode == 0, done.stderr
    assert "compilations of" in done.stdout
    assert workplace.losses("compiled") == pytest.approx(workplace.losses("eager"), rel=1e-5)


@pytest.mark.parametrize("option", ["base_model_precision", "text_encoder_1_precision"])
@pytest.mark.parametrize("name", ["int4-torchao", "fp8-torchao"])
def test_what_a_cpu_does_not_run_is_refused_before_anything_is_made(
    workplace: Workplace, option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train(f"--{option}={name}") == 2
    assert f"{option} = {name} on a machine without a GPU" in capsys.readouterr().err
    assert not workplace.run().root.exists()
    workplace.config[option] = name
    workplace.write()
    assert main(["dataset", "cache"]) == 2
    assert main(["sample", "--config=config/config.json", "--prompt=a cat"]) == 2
    assert not (workplace.folder / "cache").exists()


@pytest.mark.slow
def test_a_run_is_drawn_from_as_it_was_trained(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    workplace.prompts = {"cat": "a cat"}
    given = {"base_model_precision": "int8-quanto", "text_encoder_1_precision": "int8-quanto", "max_train_steps": 1}
    sizes = {"validation_resolution": 64, "validation_num_inference_steps": 2, "validation_guidance": 1.0}
    workplace.config |= given | sizes
    assert workplace.train() == 0
    capsys.readouterr()
    drawn = []
    for more in ([], ["--base_model_precision=no_change", "--text_encoder_1_precision=no_change"]):
        assert main(["sample", "--run=output/run", "--prompt=a cat", "--seed=1", *more]) == 0
        drawn.append(Image.open(capsys.readouterr().out.strip()).tobytes())
    assert drawn[0] != drawn[1]
    assert json.loads((workplace.run().config).read_text())["base_model_precision"] == "int8-quanto"
