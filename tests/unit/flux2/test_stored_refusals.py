"""Formats of weights that cannot be loaded are known from the header, by the name that people have for them."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.source import locate
from simpletuner.flux2.stored import check_format

LAYER = "double_blocks.0.img_attn.proj"
FP8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
INT8, PACKED = torch.ones(4, 16, dtype=torch.int8), torch.ones(4, 8, dtype=torch.uint8)
ONE = torch.ones(())


def marked(text: str, **tensors: Tensor) -> dict[str, Tensor]:
    """A layer's tensors, with a marker."""
    return {**tensors, "comfy_quant": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "int8 without a marker": ({"weight": INT8, "weight_scale": ONE}, "int8 weights with scales but no ComfyUI marker"),
    "int8 without scales": ({"weight": INT8}, "int8 weights without scales"),
    "int8 marked, without scales": (
        marked('{"format": "int8_tensorwise"}', weight=INT8),
        "int8 weights without scales",
    ),
    "packed without a marker": (
        {"weight": PACKED, "weight_scale_2": ONE},
        "4-bit weights .packed into bytes. with scales",
    ),
    "packed without scales": ({"weight": PACKED}, "4-bit weights .packed into bytes. without scales"),
    "bitsandbytes": ({"weight": PACKED, "weight.absmax": torch.ones(1)}, "weights quantized by bitsandbytes"),
    "a newer format": (marked('{"format": "convrot_w4a4"}', weight=PACKED), "weights in the format convrot_w4a4"),
    "AWQ": (marked('{"format": "awq_w4a16"}', weight=PACKED), "weights in the format awq_w4a16"),
    "scaled inputs": ({"weight": FP8, "pre_quant_scale": ONE}, "quantized weights whose inputs are scaled"),
    "no format": (marked("{}", weight=FP8), "a marker of quantized weights without a format"),
    "a format that is a list": (
        marked('{"format": []}', weight=FP8),
        "a marker of quantized weights whose format is not a string",
    ),
    "a damaged marker": (marked('{"format": ', weight=FP8), "a comfy_quant marker that cannot be read"),
    "a marker that is a list": (marked("[1]", weight=FP8), "a comfy_quant marker that cannot be read"),
    "another dtype": (marked('{"format": "float8_e5m2"}', weight=FP8), "weights in the format float8_e5m2 as F8_E4M3"),
    "scales of blocks": ({"weight": FP8, "weight_scale": torch.ones(2, 2)}, r"fp8 weights with scales as F32 \[2, 2\]"),
    "scales that are no numbers": ({"weight": FP8, "weight_scale": ONE.int()}, "fp8 weights with scales as I32"),
    "scales of plain weights": ({"weight": torch.ones(1, 1), "weight_scale": ONE}, "weights as F32 with scales"),
    "nvfp4 without scales": (marked('{"format": "nvfp4"}', weight=PACKED), "nvfp4 weights as U8"),
    "nvfp4 with few scales": (
        marked('{"format": "nvfp4"}', weight=PACKED, weight_scale=FP8, weight_scale_2=ONE),
        r"nvfp4 weights of 4 × 16 with scales \[4, 4\]",
    ),
    "mxfp8 in int8": (marked('{"format": "mxfp8"}', weight=INT8, weight_scale=PACKED), "mxfp8 weights as I8"),
    "ConvRot of another size": (
        marked('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 8}', weight=INT8, weight_scale=ONE),
        "int8_tensorwise weights rotated by groups of 8",
    ),
    "ConvRot wider than the layer": (
        marked('{"format": "int8_tensorwise", "convrot": true}', weight=INT8, weight_scale=ONE),
        "int8_tensorwise weights as I8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_that_cannot_be_read_is_named_with_the_file_to_take_instead(name: str, tmp_path: Path) -> None:
    tensors, found = REFUSED[name]
    file = tmp_path / "flux2.safetensors"
    save_file({f"{LAYER}.{last}": tensor for last, tensor in tensors.items()}, file)
    with pytest.raises(AccessError, match=rf"flux2\.safetensors holds {found}.*Name the file that is not quantized"):
        check_format((file,))


def test_all_formats_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "flux2.safetensors"
    layers = {f"{LAYER}.{index}.weight_scale": ONE.clone() for index in range(3)}
    weights = {f"{LAYER}.{index}.weight": (INT8, INT8.clone(), PACKED)[index] for index in range(3)}
    save_file(layers | weights, file)
    with pytest.raises(AccessError) as caught:
        check_format((file,))
    assert [problem.found.partition(" holds ")[2] for problem in caught.value.problems] == [
        f"int8 weights with scales but no ComfyUI marker ({LAYER}.0.weight and 1 more)",
        f"4-bit weights (packed into bytes) with scales but no ComfyUI marker ({LAYER}.2.weight)",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 1}', '{"layers": {"a": 1}}', "[" * 100_000])
def test_a_damaged_description_of_the_layers_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "flux2.safetensors"
    save_file({f"{LAYER}.weight": FP8}, file, {"_quantization_metadata": text})
    with pytest.raises(AccessError, match="its header's _quantization_metadata cannot be read"):
        check_format((file,))


def test_a_file_in_a_format_that_cannot_be_read_is_refused_when_the_model_is_located(
    tiny_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    int8 = {name: tensor.to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(int8, tmp_path / "int8.safetensors")
    options = ModelOptions(
        model_flavour="tiny",
        pretrained_model_name_or_path=str(tiny_folder),
        pretrained_transformer_model_name_or_path=str(tmp_path / "int8.safetensors"),
    )
    started = time.monotonic()
    with pytest.raises(AccessError, match=r"int8\.safetensors holds int8 weights without scales"):
        locate(options, report=print)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("name", "start", "found"),
    [
        ("flux2.ckpt", b"PK\3\4", "a PyTorch pickle"),
        ("flux2.pt", b"\x80\2", "a PyTorch pickle"),
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
    with pytest.raises(AccessError, match=rf"{name} is {found}.*Use the model's \.safetensors file"):
        locate(options, report=print)
