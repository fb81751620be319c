"""Whole runs over quantized bases, through the real command."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantized_files import write_quantized
from tests.recipes.conftest import Workplace
from tests.unit.flux2.test_load import bfl_tensors


@pytest.mark.slow
def test_a_base_in_fp8_trains_as_its_values_do(
    workplace: Workplace, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's numbers are held as they are, and each product is computed from the values that they stand for."""
    tensors = bfl_tensors(load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    values = write_quantized(workplace.folder / "fp8.safetensors", tensors, "fp8", prefix="model.diffusion_model.")
    save_file(values, workplace.folder / "plain.safetensors")
    given = [f"--pretrained_model_name_or_path={tiny_folder}", "--mixed_precision=bf16"]
    given += ["--base_model_default_dtype=bf16"]
    given += ["--max_train_steps=2"]
    for name in ("fp8", "plain"):
        own = [f"--output_dir=output/{name}", f"--pretrained_transformer_model_name_or_path={name}.safetensors"]
        assert workplace.train(*given, *own) == 0
        said = "The base in fp8wo-torchao, as stored in its file, takes " in capsys.readouterr().out
        assert said == (name == "fp8")
    assert workplace.losses("plain") == workplace.losses("fp8")
    expected, found = (load_file(workplace.run(name).lora) for name in ("plain", "fp8"))
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
