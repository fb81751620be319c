"""Bytes of every kind of weight file, pinned: two runs, or two releases, that computed the same wrote the same file."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.base.files import sha256_file
from simpletuner.config.flavours import TINY, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.export import save_lora
from simpletuner.flux2.lora import attach
from simpletuner.flux2.modelfile import WEIGHTS_NAME, save_transformer
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.tensors import save_tensors

SPEC = TransformerSpec(
    heads=2,
    head_dim=16,
    double_blocks=1,
    single_blocks=1,
    context_dim=24,
    guidance_embeds=True,
    axes=(4, 4, 4, 4),
)
METADATA = {"step": "3", "run": "1f2e", "licence": "Größe ≤ 1", "base_model": "black-forest-labs/FLUX.2-dev"}


def counted(shape: tuple[int, ...], start: int) -> Tensor:
    """Numbers that every dtype here holds exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + start) % 61 - 30).float().reshape(shape)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "b5eda8917283949502137d88e7595b31fe7d06a48d30cff0613e193bc0cd537a"),
        (torch.bfloat16, "317b5999752edeffd534e7406e59cd7087b071933d683b07d27afdf7887cf6de"),
    ],
)
def test_a_lora(tmp_path: Path, dtype: torch.dtype, expected: str) -> None:
    adapter = attach(
        Flux2Transformer(SPEC), LoraOptions(lora_rank=4, lora_alpha=6, flux_lora_target="attention"), seed=0
    )
    state = adapter.state()
    adapter.load({name: counted(tuple(state[name].shape), at) for at, name in enumerate(sorted(state))})
    save_lora(tmp_path / "lora", adapter, metadata=METADATA, dtype=dtype)
    assert sha256_file(tmp_path / "lora") == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "e876bb4482b7394618d548a7c2342bf4624338fdb4ebaf8b4874ec86a2e55afa"),
        (torch.bfloat16, "9ba4ecad8cf8a66ef21e50efb26d1f64475b20b1bdcab7fdf67ac4bf7095a8e8"),
    ],
)
def test_a_transformer(tmp_path: Path, dtype: torch.dtype, expected: str) -> None:
    tensors = {"b.weight": counted((5, 7), 0), "a.weight": counted((3,), 1).double(), "ä.bias": counted((2, 3), 2).T}
    save_transformer(tmp_path, TINY, tensors, metadata=METADATA, dtype=dtype)
    assert sha256_file(tmp_path / WEIGHTS_NAME) == expected


STATE: Mapping[str, Tensor] = {
    "exp_avg/layer.a": counted((4, 3), 0),
    "exp_avg/layer.b": counted((3, 4), 1).to(torch.bfloat16),
    "shift/layer.b": counted((3,), 2).to(torch.float16),
    "codes/layer.a": counted((9,), 3).abs().to(torch.uint8),
    "codes/layer.b": counted((9,), 4).to(torch.int8),
    "count/layer.a": counted((2,), 5).to(torch.int32),
    "step/layer.a": torch.tensor(7.0),
    "seen/layer.a": torch.tensor([True, False]),
    "total/common": torch.tensor(8),
    "wide/common": counted((2,), 6).double(),
    "parameter/layer.a": counted((4, 3), 7).T,
    "none/layer.a": torch.zeros(0, 4),
}
"""One tensor of each dtype and kind of shape that optimizers keep."""


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt"}, "dda33db9f41cbc697c77b64134ab3a703e26c8fe3630990eb63b78a06b8f363e"),
        ({}, "183362cee691321e1b33afc53de885d8201dee4965c4f4d57432cc89642be80e"),
    ],
    ids=["a checkpoint's optimizer.safetensors", "a kept quantized base"],
)
def test_tensors_of_many_types(tmp_path: Path, metadata: Mapping[str, str], expected: str) -> None:
    save_tensors(tmp_path / "file", STATE, metadata)
    assert sha256_file(tmp_path / "file") == expected
