"""Attach adapters of any kind for sampling: a file's factors next to frozen Linears, without trainable parameters.

Factors are applied to the input as `read_adapter` returns them, so an adapter takes about as much memory as its file.
The base weights do not change, whatever their precision.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import file_errors_reported
from simpletuner.flux2.adapter_kinds import FACTOR_SUFFIXES
from simpletuner.flux2.dialects import AdapterFile, check_all_read, read_adapter
from simpletuner.flux2.export import LoadedLora, check_shapes, read_lora
from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank
from simpletuner.flux2.lora import Adaptable, AdapterLayer, adaptable, linears
from simpletuner.memory.tensors import open_tensors

_SLICE = 2**24
"""Approximate number of elements of a LoHa's ΔW computed at a time, where that is cheaper than its factors."""


class FixedLinear(AdapterLayer):
    """A frozen Linear plus the delta of `factors`, which keep their dtype and are cast to that of the input in forward.

    `scale` starts as that of the factors.
    """

    def __init__(self, base: Adaptable, factors: Factors) -> None:
        super().__init__(base, factors.scale)
        device = next(base.parameters()).device
        self.factors = _moved_to(device, factors)
        """Not registered as parameters, so that only the base weights are streamed and counted."""
        self.train(base.training)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        out: Tensor = self.base(x)
        return torch.add(out, delta_product(self.factors, x), alpha=self.scale) if self.is_enabled else out


def _moved_to(device: torch.device, factors: Factors) -> Factors:
    moved: dict[str, Any] = {name: each.to(device) for name, each in vars(factors).items() if isinstance(each, Tensor)}
    return replace(factors, **moved)


def delta_product(factors: Factors, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
    """ΔW · x at a scale of 1, in the dtype of `x`."""
    if isinstance(factors, LowRank):
        return F.linear(F.linear(x, factors.a.to(x.dtype)), factors.b.to(x.dtype))
    return _kronecker_product(factors, x) if isinstance(factors, Kronecker) else _hadamard_product(factors, x)


def _kronecker_product(factors: Kronecker, x: Tensor) -> Tensor:
    """kron(w1, w2) · x = w1 · X · w2ᵀ, with X = x as a (columns of w1, columns of w2) matrix.

    The cheaper of the two products is computed first.
    """
    w1, w2 = factors.w1.to(x.dtype), factors.w2.to(x.dtype)
    (rows1, columns1), (rows2, columns2) = w1.shape, w2.shape
    matrix = x.unflatten(-1, (columns1, columns2))
    if columns1 * rows2 * (columns2 + rows1) <= rows1 * columns2 * (columns1 + rows2):
        out = F.linear(F.linear(matrix, w2).mT, w1).mT
    else:
        out = F.linear(F.linear(matrix.mT, w1).mT, w2)
    out = out.flatten(-2)
    return out if factors.ranges is None else torch.cat([out[..., start:stop] for start, stop in factors.ranges], -1)


def _hadamard_product(factors: Hadamard, x: Tensor) -> Tensor:
    """(B1·A1 ∘ B2·A2) · x.

    ΔW has rank r1·r2. Its factors, computed on each call, are products of all pairs of columns and rows (Khatri-Rao).
    If ΔW itself is cheaper, slices of its rows are computed instead.
    """
    a1, b1, a2, b2 = (each.float() for each in (factors.w1_a, factors.w1_b, factors.w2_a, factors.w2_b))
    rows, columns = factors.shape
    rank = len(a1) * len(a2)
    if rank * (rows + columns) < rows * columns:
        a = (a1[:, None] * a2).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    step = max(1, _SLICE // columns)
    slices = zip(b1.split(step), b2.split(step), strict=True)
    return torch.cat([F.linear(x, ((part1 @ a1) * (part2 @ a2)).to(x.dtype)) for part1, part2 in slices], -1)


def read_for_sampling(path: Path) -> LoadedLora | AdapterFile:
    """Read the adapter in the file `path` for sampling; a LoRA with `read_lora`.

    Raises:
        CheckpointError: the file is missing or damaged, its kind is not supported, or its weights are invalid.
    """
    with file_errors_reported(path, CheckpointError, doing="read"), open_tensors(path) as file:
        has_other_kinds = any(key.rpartition(".")[2] in FACTOR_SUFFIXES for key in file)
    if not has_other_kinds:
        return read_lora(path)
    adapter = read_adapter(path)
    check_all_read(adapter)
    return adapter


def check_fixed(transformer: nn.Module, adapter: AdapterFile) -> None:
    """Check that the layers of `adapter` fit this model.

    Raises:
        CheckpointError: they do not.
    """
    shapes = {name: factors.shape for name, factors in adapter.modules.items()}
    check_shapes(adapter.path, shapes, adapter.header.get("simpletuner.base_model"), linears(transformer))


def attach_fixed(transformer: nn.Module, adapter: AdapterFile) -> dict[str, FixedLinear]:
    """Freeze `transformer`, attach `adapter` and return its layers. Deltas of several adapters for one layer add up.

    Raises:
        CheckpointError: the adapter's layers do not fit this model.
    """
    check_fixed(transformer, adapter)
    transformer.requires_grad_(False)
    layers = {}
    for name, factors in adapter.modules.items():
        layers[name] = FixedLinear(adaptable(transformer, name), factors)
        transformer.set_submodule(name, layers[name])
    return layers
