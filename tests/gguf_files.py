"""GGUF files for tests: a transformer in BFL's names, each tensor in the type that is asked for."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor


def random_blocks(name: str, shape: tuple[int, int], *, seed: int = 0) -> np.ndarray:
    """Random bytes of blocks of the type `name`, as [rows, bytes], with scales that give weights of ordinary size."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)
    for place in HALVES[name]:  # fp16 numbers, which random bits would make infinite now and then
        scale = rng.uniform(1e-4, 2e-4, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


HALVES: Mapping[str, tuple[int, ...]] = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""By type: where fp16 scales lie in a block (llama.cpp's ggml-common.h)."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    types: Mapping[str, str],
    *,
    architecture: str | None = "flux",
    prefix: str = "",
) -> dict[str, Tensor]:
    """Write `tensors`, those in `types` as blocks of that type, the others as they are. Returns the values of each, in
    fp32, as the gguf package decodes them.
    """
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].clear()
    values = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if name in types:
            kind = gguf.GGMLQuantizationType[types[name]]
            raw = random_blocks(types[name], (tensor.shape[0], tensor.shape[1]), seed=index)
            writer.add_tensor(prefix + name, raw, raw_dtype=kind)
            values[name] = torch.from_numpy(gguf.dequantize(raw, kind))
        elif tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(prefix + name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            values[name] = tensor.float()
        else:
            writer.add_tensor(prefix + name, tensor.contiguous().numpy())
            values[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
