"""LoRAs that are added to a model's weights act as they do beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.file_faults import files_of_at_most
from tests.lora_dialects import draw_lokr, write_dialect
from tests.quantized_files import write_quantized
from tests.unit.flux2.test_extract import SPEC, as_bfl, as_comfyui, as_folder, as_pipeline, base_weights
from tests.unit.flux2.test_load import bfl_tensors
from torch import Tensor

from simpletuner.base.tensorfile import read_metadata
from simpletuner.cli.main import INTERRUPTED, main
from simpletuner.flux2 import merge
from simpletuner.flux2.modelfile import WEIGHTS_NAME
from simpletuner.flux2.transformer_file import opened_transformer

Tensors = dict[str, Tensor]
MODELS: dict[str, tuple[Callable[[Path, Tensors], Path], str]] = {
    "a folder": (as_folder, "merged"),
    "a pipeline": (as_pipeline, "merged"),
    "a single file": (as_bfl, "merged.safetensors"),
    "a single file into a folder": (as_bfl, "merged"),
    "an all-in-one checkpoint": (as_comfyui, "merged.safetensors"),
    "a folder into a single file": (as_folder, "merged.safetensors"),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(path: Path) -> Tensors:
    return load_file(path / WEIGHTS_NAME if path.is_dir() else path)


def in_layout_of(path: Path, weights: Tensors) -> Tensors:
    return weights if path.is_dir() else bfl_tensors(weights, SPEC)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_the_models_and_the_loras_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save, target = MODELS[name]
    model = save(tmp_path / "model", base_weights())
    lora = write_dialect(tmp_path / "lora.safetensors", SPEC, "2b OneTrainer for ComfyUI", blocks_only=True)
    lokr = write_dialect(tmp_path / "lokr.safetensors", SPEC, "11 LyCORIS", draw=draw_lokr, ranks=(2,))
    loras = ("--lora", "lora.safetensors:0.7", "--lora", "lokr.safetensors:-2")
    assert main(["merge", *loras, "--into", str(model), "--output", target, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["output"], said["layers"]) == (target, len(lokr))
    expected = base_weights()
    for layer, delta in lokr.items():
        total = expected[f"{layer}.weight"].double() - 2 * delta + (0.7 * lora[layer] if layer in lora else 0)
        expected[f"{layer}.weight"] = total.float()
    expected, found = in_layout_of(tmp_path / target, expected), written(tmp_path / target)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key
    file = tmp_path / target / WEIGHTS_NAME if (tmp_path / target).is_dir() else tmp_path / target
    record = json.loads(read_metadata(file)["simpletuner.merged"])
    assert [each["file"] for each in record["loras"]] == ["lora.safetensors", "lokr.safetensors"]


def test_at_strength_0_the_model_keeps_its_bits_in_its_dtype(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in base_weights().items()}
    model = as_bfl(tmp_path / "model", weights)
    write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    assert main(["merge", "--lora=lora.safetensors:0", f"--into={model}", "--output=merged.safetensors"]) == 0
    before, after = load_file(model), load_file(tmp_path / "merged.safetensors")
    assert before.keys() == after.keys()
    assert all(after[key].dtype == torch.bfloat16 and torch.equal(after[key], before[key]) for key in before)


def test_a_sum_in_bf16_is_rounded_once(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in base_weights().items()}
    model = as_bfl(tmp_path / "model", weights)
    deltas = [
        write_dialect(tmp_path / f"{seed}.safetensors", SPEC, "1 diffusers", ranks=(1,), seed=seed) for seed in (0, 1)
    ]
    loras = ("--lora=0.safetensors:0.001", "--lora=1.safetensors:0.001")
    assert main(["merge", *loras, f"--into={model}", "--output=merged.safetensors"]) == 0
    name = "single_transformer_blocks.0.attn.to_out"
    exact = weights[f"{name}.weight"].double() + 0.001 * (deltas[0][name] + deltas[1][name])
    found = load_file(tmp_path / "merged.safetensors")["single_blocks.0.linear2.weight"]
    assert (found != exact.bfloat16()).float().mean() < 0.001  # ties that fp32 decides otherwise
    assert (found != weights[f"{name}.weight"]).float().mean() > 0.1


def test_a_quantized_model_is_merged_into_as_bf16(tmp_path: Path) -> None:
    weights = bfl_tensors(base_weights(), SPEC)
    name = "double_blocks.0.img_attn.qkv.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    deltas = write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    assert main(["merge", "--lora=lora.safetensors", "--into=model.safetensors", "--output=merged.safetensors"]) == 0
    found = load_file(tmp_path / "merged.safetensors")
    fused = torch.cat([deltas[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"])
    assert found[name].dtype == torch.bfloat16
    assert (found[name].double() - weights[name].double() - fused).abs().max() <= 2**-8 * fused.abs().max()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("style", ["metadata", "markers", "old"])
@pytest.mark.parametrize("target", ["merged.safetensors", "merged"])
def test_a_merged_quantized_model_does_not_say_that_it_is_quantized(tmp_path: Path, style: str, target: str) -> None:
    write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    write_quantized(tmp_path / "model.safetensors", bfl_tensors(base_weights(), SPEC), "fp8", style=style)
    assert main(["merge", "--lora=lora.safetensors", "--into=model.safetensors", f"--output={target}"]) == 0
    with opened_transformer(tmp_path / "model.safetensors") as model, opened_transformer(tmp_path / target) as merged:
        assert model.other_tensors == merged.other_tensors == 0
        assert all(rows.weight.is_plain for rows in merged.weights.values())


@pytest.mark.parametrize("is_json", [False, True])
def test_layers_that_changed_and_tensors_left_out_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_json: bool
) -> None:
    model = as_comfyui(tmp_path / "model", base_weights())
    deltas = write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    arguments = ["merge", "--lora=lora.safetensors", f"--into={model}", "--output=merged.safetensors"]
    assert main([*arguments, "--json"] if is_json else arguments) == 0
    printed = capsys.readouterr().out
    left_out = f"1 tensors of {model} belong to other components and are not in it."
    if is_json:
        assert json.loads(printed)["notices"] == [left_out]
    else:
        first, second = printed.splitlines()
        assert first.endswith(f", {len(deltas)} layers changed")
        assert second == left_out


def _another_model(_: Path) -> None:
    weights = base_weights()
    weights["transformer_blocks.0.attn.to_q.weight"] = torch.ones(64, 32)
    save_file(weights, "model.safetensors")


def _huge(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in base_weights().items()}
    as_bfl(folder / "model", weights)


def _a_lora(folder: Path) -> None:
    write_dialect(folder / "model.safetensors", SPEC, "1 diffusers")


def _truncated(folder: Path) -> None:
    file = as_bfl(folder / "model", base_weights())
    file.write_bytes(file.read_bytes()[:-9])


BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int, str]] = {
    "another model": (_another_model, (), 6, "1 of 25 layers do not fit"),
    "too large for fp16": (_huge, ("--lora=lora.safetensors:1e7",), 6, "as torch.float16"),
    "a LoRA": (_a_lora, (), 4, "FLUX.2 transformer"),
    "truncated": (_truncated, (), 4, "by its own header"),
    "--rank with --into": (_huge, ("--rank=3",), 2, "--rank with --into"),
    "--to comfyui with --into": (_huge, ("--to=comfyui",), 2, "--to comfyui with --into"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_and_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, more, code, says = BAD[name]
    make(tmp_path)
    write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    before = sorted(tmp_path.iterdir())
    loras = ("--lora=lora.safetensors", *more)
    assert main(["merge", *loras, "--into=model.safetensors", "--output=merged.safetensors"]) == code
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["merged", "merged.safetensors"])
def test_a_full_disk_and_an_interrupt_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    model = as_folder(tmp_path / "model", base_weights())
    write_dialect(tmp_path / "lora.safetensors", SPEC, "1 diffusers")
    arguments = ["merge", "--lora=lora.safetensors", f"--into={model}", f"--output={target}"]
    before = sorted(tmp_path.iterdir())
    with files_of_at_most(20_000):
        assert main(arguments) == 7
    assert target in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as patched:
        patched.setattr("simpletuner.base.machine.free_disk_bytes", lambda _: 1000)
        assert main(arguments) == 7
    assert "1000 B free" in capsys.readouterr().err
    seen = []

    def interrupted(_: Tensor) -> int:
        seen.extend(tmp_path.glob(".*.part"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "non_finite_count", interrupted)
        assert main(arguments) == INTERRUPTED
    assert seen
    assert sorted(tmp_path.iterdir()) == before
    assert main(arguments) == 0
