"""Formats of weights that cannot be loaded are known from the header, by the name that people have for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.formats import check_format
from simpletuner.flux2.source import locate

LAYER = "double_blocks.0.img_attn.proj"
FP8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
FORMATS: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "comfyui-old": (
        {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{LAYER}.scale_weight": torch.ones(1)},
        {},
        r"fp8 weights \(e4m3\) with scales, as ComfyUI writes them",
    ),
    "comfyui-new": (
        {f"{LAYER}.weight_scale": torch.ones(()), f"{LAYER}.comfy_quant": torch.zeros(30, dtype=torch.uint8)},
        {},
        r"fp8 weights \(e4m3\) with scales, as ComfyUI writes them",
    ),
    "comfyui-metadata": (
        {},
        {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}})},
        r"fp8 weights \(e4m3\) with scales, as ComfyUI writes them",
    ),
    "plain-fp8": ({}, {}, r"fp8 weights \(e4m3\) without scales"),
    "e5m2": ({f"{LAYER}.weight": torch.ones(4, 4).to(torch.float8_e5m2)}, {}, r"fp8 weights \(e5m2\) without scales"),
    "int8": (
        {f"{LAYER}.weight": torch.ones(4, 4, dtype=torch.int8), f"{LAYER}.weight_scale": torch.ones(4, 1)},
        {},
        "int8 weights with scales",
    ),
    "nvfp4": (
        {f"{LAYER}.weight": torch.ones(4, 2, dtype=torch.uint8), f"{LAYER}.weight_scale_2": torch.ones(())},
        {},
        r"4-bit weights \(packed into bytes\) with scales",
    ),
    "bitsandbytes": (
        {f"{LAYER}.weight": torch.ones(8, 1, dtype=torch.uint8), f"{LAYER}.weight.absmax": torch.ones(1)},
        {},
        "weights quantized by bitsandbytes",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_format_is_named_with_the_file_to_take_instead(name: str, tmp_path: Path) -> None:
    tensors, metadata, found = FORMATS[name]
    file = tmp_path / "flux2.safetensors"
    save_file({f"{LAYER}.weight": FP8} | tensors, file, metadata)
    with pytest.raises(AccessError, match=rf"flux2\.safetensors holds {found}.*Name the file that is not quantized"):
        check_format((file,))


def test_a_file_in_a_format_that_cannot_be_read_is_refused_when_the_model_is_located(
    tiny_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    fp8 = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(fp8, tmp_path / "fp8.safetensors")
    options = ModelOptions(
        model_flavour="tiny",
        pretrained_model_name_or_path=str(tiny_folder),
        pretrained_transformer_model_name_or_path=str(tmp_path / "fp8.safetensors"),
    )
    with pytest.raises(AccessError, match=r"fp8\.safetensors holds fp8 weights \(e4m3\) without scales"):
        locate(options, report=print)


@pytest.mark.parametrize(
    ("name", "start", "found"),
    [
        ("flux2-Q8_0.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("flux2.safetensors", b"GGUF\3\0\0\0", "a GGUF file"),
        ("flux2.ckpt", b"PK\3\4", "a pickle of PyTorch's"),
        ("flux2.pt", b"\x80\2", "a pickle of PyTorch's"),
        ("flux2.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_another_container_is_named(name: str, start: bytes, found: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(start + bytes(100))
    options = ModelOptions(
        model_flavour="tiny",
        pretrained_model_name_or_path=str(tiny_folder),
        pretrained_transformer_model_name_or_path=str(file),
    )
    with pytest.raises(AccessError, match=rf"{name} is {found}.*Take the model's \.safetensors file"):
        locate(options, report=print)
