"""Quantized layers as ComfyUI's files hold them, of random numbers, each with its values computed by hand."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
GROUP = 16
"""Inputs that ConvRot rotates together here: it divides the tiny model's widths."""

FORMATS = ("fp8", "fp8-e5m2", "fp8-rows", "fp8-unscaled", "int8", "int8-rows", "int8-convrot", "nvfp4", "mxfp8")
HELD = {
    **dict.fromkeys(("fp8", "fp8-rows", "fp8-unscaled"), "fp8wo-torchao"),
    **dict.fromkeys(("int8", "int8-rows"), "int8-torchao"),
}
"""Formats that a Linear of ours holds, and in which precision."""


def float8(bits: int, exponent: int, mantissa: int, bias: int) -> float:
    """The number of 8 bits with so many of exponent and mantissa."""
    sign = -1.0 if bits >> 7 else 1.0
    power, fraction = (bits >> mantissa) & (2**exponent - 1), (bits & (2**mantissa - 1)) / 2**mantissa
    if power == 0:
        return float(sign * fraction * 2.0 ** (1 - bias))
    return float(sign * (1 + fraction) * 2.0 ** (power - bias))


E4M3 = np.array([float8(bits, 4, 3, 7) for bits in range(256)])
E5M2 = np.array([float8(bits, 5, 2, 15) for bits in range(256)])
E4M3_BITS = [bits for bits in range(256) if bits & 0x7F != 0x7F]
E5M2_BITS = [bits for bits in range(256) if bits & 0x7F < 0x7C]
"""Of finite numbers."""


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its tensors by the last part of their names, its marker, and its values in fp32."""

    tensors: dict[str, Tensor]
    marker: dict[str, object] | None
    values: Tensor


def tiled(scales: np.ndarray) -> np.ndarray:
    """Block scales [rows, blocks] as cuBLAS reads them: tiles of 128 × 4, a tile's element at
    (row % 32)·16 + (row % 128 // 32)·4 + block % 4.
    """
    rows, blocks = scales.shape
    height, width = math.ceil(rows / 128) * 128, math.ceil(blocks / 4) * 4
    flat = np.zeros(height * width, dtype=scales.dtype)
    for row in range(rows):
        for block in range(blocks):
            tile = (row // 128) * (width // 4) + block // 4
            flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales[row, block]
    return flat.reshape(height, width)


def layer(kind: str, rows: int, columns: int, seed: int = 0) -> Layer:
    """A random layer in the format `kind` of `FORMATS`; its values are about as large as a weight's."""
    draw = np.random.default_rng(seed)
    if kind.startswith("fp8"):
        is_e5m2 = kind == "fp8-e5m2"
        bits = draw.choice(E5M2_BITS if is_e5m2 else E4M3_BITS, (rows, columns)).astype(np.uint8)
        dtype = torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn
        scale = draw.uniform(1e-5, 4e-5, {"fp8-rows": (rows, 1)}.get(kind, ())).astype(np.float32)
        if is_e5m2:
            scale = np.float32(scale / 64)
        values = (E5M2 if is_e5m2 else E4M3)[bits].astype(np.float32)
        tensors = {"weight": torch.tensor(bits).view(dtype)}
        if kind == "fp8-unscaled":
            return Layer(tensors, None, torch.tensor(values))
        marker: dict[str, object] = {"format": "float8_e5m2" if is_e5m2 else "float8_e4m3fn"}
        return Layer(tensors | {"weight_scale": torch.tensor(scale)}, marker, torch.tensor(values * scale))
    if kind.startswith("int8"):
        numbers = draw.integers(-127, 128, (rows, columns))
        scale = draw.uniform(1e-5, 4e-4, () if kind == "int8" else (rows, 1)).astype(np.float32)
        values = numbers.astype(np.float32) * scale
        marker = {"format": "int8_tensorwise"}
        if kind == "int8-convrot":
            marker |= {"convrot": True, "convrot_groupsize": GROUP}
            groups = numbers.reshape(rows, -1, GROUP) @ np.kron(H4, H4)
            values = (groups.reshape(rows, columns) * scale.astype(np.float64)).astype(np.float32)
        tensors = {"weight": torch.tensor(numbers.astype(np.int8)), "weight_scale": torch.tensor(scale)}
        return Layer(tensors, marker, torch.tensor(values))
    if kind == "nvfp4":
        codes = draw.integers(0, 16, (rows, columns))
        scales = draw.integers(0x20, 0x70, (rows, columns // 16)).astype(np.uint8)
        second = np.float32(draw.uniform(1e-4, 3e-4))
        numbers = np.array(E2M1 + [-value for value in E2M1], dtype=np.float32)[codes]
        blocks = (E4M3[scales].astype(np.float32) * second).repeat(16, axis=1)
        tensors = {
            "weight": torch.tensor((codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8)),
            "weight_scale": torch.tensor(tiled(scales)).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(second),
        }
        return Layer(tensors, {"format": "nvfp4"}, torch.tensor(numbers * blocks))
    assert kind == "mxfp8"
    bits = draw.choice(E4M3_BITS, (rows, columns)).astype(np.uint8)
    exponents = draw.integers(105, 115, (rows, columns // 32)).astype(np.uint8)
    powers = np.exp2(exponents.astype(np.float64) - 127).repeat(32, axis=1)
    tensors = {"weight": torch.tensor(bits).view(torch.float8_e4m3fn), "weight_scale": torch.tensor(tiled(exponents))}
    return Layer(tensors, {"format": "mxfp8"}, torch.tensor((E4M3[bits] * powers).astype(np.float32)))


def write_quantized(
    file: Path, tensors: Mapping[str, Tensor], kind: str, *, prefix: str = "", style: str = "markers"
) -> dict[str, Tensor]:
    """Write a file like that of `tensors`, with random quantized layers in place of matrices inside of blocks, or of
    all weights where they are fp8 without scales. Returns the values of all tensors.

    Args:
        prefix: before each name.
        style: where the formats are: in "markers", in the file's "metadata", or by the names of "old" fp8 files.
    """
    written: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    described: dict[str, object] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        owner = name.removesuffix(".weight")
        if kind == "fp8-unscaled":
            written[prefix + name] = tensor.to(torch.float8_e4m3fn)
            values[name] = written[prefix + name].float()
        elif tensor.ndim != 2 or "blocks." not in name:
            written[prefix + name] = values[name] = tensor
        else:
            made = layer(kind, *tensor.shape, seed=index)
            values[name] = made.values
            old = {"weight_scale": "scale_weight"} if style == "old" else {}
            written |= {f"{prefix}{owner}.{old.get(last, last)}": own for last, own in made.tensors.items()}
            if style == "markers":
                text = json.dumps(made.marker).encode()
                written[f"{prefix}{owner}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            described[prefix + owner] = made.marker
    if style == "old":
        written[f"{prefix}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    metadata = json.dumps({"format_version": "1.0", "layers": described})
    save_file(written, file, {"_quantization_metadata": metadata} if style == "metadata" else None)
    return values
