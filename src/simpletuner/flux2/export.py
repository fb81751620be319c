"""Write LoRA files that other programs load unchanged, verify them by reading them back, and load LoRAs of any program.

The keys are diffusers' (`transformer.<module>.lora_A.weight`), which ComfyUI reads too. alpha/rank is folded into B,
because loaders disagree about where alpha is stored. Our header keeps the user's alpha.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.base.errors import CheckpointError
from simpletuner.config.flavours import FLAVOURS, Flavour, TransformerSpec, flavour_of_base
from simpletuner.flux2.dialects import check_all_read, read_adapter
from simpletuner.flux2.factors import Kronecker, LowRank
from simpletuner.flux2.fused import unfused
from simpletuner.flux2.header_alpha import ADAPTER_METADATA, checked_alpha
from simpletuner.flux2.lora import (
    CUSTOM,
    PRESETS,
    Adaptable,
    Adapter,
    LinearRange,
    full_range,
    linears,
    preset_ranges,
    wrap,
)
from simpletuner.flux2.lora_formats import peft_metadata
from simpletuner.flux2.modelspec import MODELSPEC_FIELDS
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.memory.tensors import save_verified

HEADER_FIELDS = frozenset(
    {"base_model", "comment", "config", "datasets", "licence", "options", "run", "step", "trigger_phrase", "version"}
)
"""Fields that a caller may put into the header, each as `simpletuner.<field>`: a shared file must not carry others."""


@dataclass(frozen=True)
class SavedLayer:
    """One trained layer: its output is `scale · b · a · x`. Factors are fp32 at full size."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA file's content."""

    path: Path
    layers: dict[str, SavedLayer]
    alpha: float
    """The user's alpha in training."""
    target: str
    """The preset that it was trained with, or "custom"."""
    metadata: dict[str, str]
    """The `HEADER_FIELDS` that the file has; empty for files of other programs."""
    unused: int = 0
    """Number of keys for text encoder layers, which are ignored."""


def save_lora(path: Path, adapter: Adapter, *, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write `adapter` to `path`, then read the file back and compare.

    Args:
        metadata: fields of `HEADER_FIELDS`.
        dtype: of the file's tensors.

    Raises:
        DiskError: no space, or the file reads back differently.
    """
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    header = {
        **header_of(metadata),
        ADAPTER_METADATA: json.dumps(peft_metadata(ranks), sort_keys=True),
        "simpletuner.alpha": repr(adapter.alpha),
        "simpletuner.target": adapter.target,
    }
    save_verified(path, adapter.expanded(), header, dtype)


def header_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of our files, with `metadata`: fields of `HEADER_FIELDS` and of `MODELSPEC_FIELDS`."""
    unknown = metadata.keys() - HEADER_FIELDS - MODELSPEC_FIELDS
    if unknown:
        raise ValueError(f"not in HEADER_FIELDS: {', '.join(sorted(unknown))}")
    fields = {name if name in MODELSPEC_FIELDS else f"simpletuner.{name}": value for name, value in metadata.items()}
    return {"format": "pt", **fields}


def read_lora(path: Path) -> LoadedLora:
    """Read the LoRA in `path`, in any program's dialect: a file, or a folder with `pytorch_lora_weights.safetensors`.

    Raises:
        CheckpointError: the file is missing or damaged, has no layer of FLUX.2, has an alpha, a rank or weights that
            are invalid, or holds another kind of adapter.
    """
    file = read_adapter(path)
    check_all_read(file)
    text = file.header.get("simpletuner.alpha")
    own_alpha = None if text is None else _own_alpha(file.path, text)
    layers = {}
    for name, factors in unfused(file.modules, file.header).items():
        if not isinstance(factors, LowRank):
            title = "LoKr" if isinstance(factors, Kronecker) else "LoHa"
            raise CheckpointError.of(
                f"{file.path} holds a {title}, for example in {name}",
                "a LoRA, the only kind of adapter that can be trained",
                "`simpletuner sample --lora FILE` generates images with it.",
            )
        a, b, scale = factors.a.float(), factors.b.float(), factors.scale
        if own_alpha is not None:  # undo the folding into B
            scale = own_alpha / factors.rank
            b = b / (scale / factors.scale)
        layers[name] = SavedLayer(a, b, scale)
    first = next(iter(layers.values()))
    target = file.header.get("simpletuner.target", CUSTOM)
    return LoadedLora(
        path=file.path,
        layers=layers,
        alpha=first.scale * first.a.shape[0] if own_alpha is None else own_alpha,
        target=target if target in PRESETS else CUSTOM,
        metadata={
            field: file.header[f"simpletuner.{field}"]
            for field in HEADER_FIELDS
            if f"simpletuner.{field}" in file.header
        },
        unused=len(file.unread),
    )


def _own_alpha(path: Path, text: str) -> float:
    """The alpha in our own header field."""
    try:
        return checked_alpha(path, "simpletuner.alpha", float(text))
    except ValueError:
        return checked_alpha(path, "simpletuner.alpha", text)


def attach_saved(transformer: nn.Module, saved: LoadedLora, *, strength: float = 1.0, dropout: float = 0.0) -> Adapter:
    """Freeze `transformer`, earlier adapters included, and attach `saved` to it with trainable parameters.

    Call it once for each file; deltas of several files for one layer add up. A file that names one of our presets
    keeps training only the rows and columns of that preset.

    Raises:
        CheckpointError: the file's layers do not fit this model.
    """
    model_linears = linears(transformer)
    shapes = {name: (layer.b.shape[0], layer.a.shape[1]) for name, layer in saved.layers.items()}
    check_shapes(saved.path, shapes, saved.metadata.get("base_model"), model_linears)
    ranges = preset_ranges(transformer, PRESETS[saved.target]) if saved.target in PRESETS else {}
    transformer.requires_grad_(False)
    layers = {}
    for name, linear in model_linears.items():
        if name not in saved.layers:
            continue
        layer = saved.layers[name]
        adapted_range = ranges.get(name, full_range(linear))
        layers[name] = wrap(
            transformer,
            name,
            *_adapted_part(saved.path, name, layer, adapted_range),
            adapted_range=adapted_range,
            scale=layer.scale * strength,
            dropout=dropout,
        )
    return Adapter(layers, target=saved.target, alpha=saved.alpha)


def check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, int]], base_model: str | None, model_linears: Mapping[str, Adaptable]
) -> None:
    """Check that an adapter fits a model.

    Args:
        path: of the adapter file.
        shapes: rows and columns of each layer's delta.
        base_model: as the adapter's header names it.
        model_linears: the model's Linears.

    Raises:
        CheckpointError: the model lacks some layers, or has them with another shape.
    """
    model_shapes = {name: (linear.out_features, linear.in_features) for name, linear in model_linears.items()}
    misfits = [name for name, shape in shapes.items() if model_shapes.get(name) != shape]
    if not misfits:
        return
    name = misfits[0]
    rows, columns = shapes[name]
    model_shape = f"{model_shapes[name][0]} × {model_shapes[name][1]}" if name in model_shapes else "missing"
    trained_on, flavour = _flavour_of_adapter(shapes, base_model), _flavour_with(model_shapes)
    base_title = (
        f"{base_model} ({trained_on.name})" if base_model and trained_on and base_model != trained_on.name else None
    )
    base_title = base_title or base_model or (trained_on.name if trained_on is not None else None)
    raise CheckpointError.of(
        f"{path} does not fit this model{'' if flavour is None else f', {flavour.family}'}: {len(misfits)} of "
        f"{len(shapes)} layers, such as {name}, which is {rows} × {columns} in the file and {model_shape} in the model",
        "the model it was trained on" + (f", {base_title}" if base_title else ""),
        "Name it with --model_flavour or --pretrained_model_name_or_path."
        if trained_on is None or trained_on is flavour
        else f"Give --model_flavour {trained_on.name} to use this file.",
    )


@functools.cache
def linear_shapes(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of each Linear."""
    by_name = linears(empty_transformer(spec))
    return {name: (linear.out_features, linear.in_features) for name, linear in by_name.items()}


def _flavour_with(shapes: Mapping[str, tuple[int, int]]) -> Flavour | None:
    """The first flavour that has exactly these Linears: the base model of its family."""
    return next((each for each in FLAVOURS.values() if linear_shapes(each.transformer) == shapes), None)


def _flavour_of_adapter(shapes: Mapping[str, tuple[int, int]], base_model: str | None) -> Flavour | None:
    """The flavour that an adapter was trained on: by its header, else the first flavour that all of its layers fit."""
    return flavour_of_base(base_model or "") or next(
        (each for each in FLAVOURS.values() if shapes.items() <= linear_shapes(each.transformer).items()), None
    )


def _adapted_part(path: Path, name: str, layer: SavedLayer, adapted_range: LinearRange) -> tuple[Tensor, Tensor]:
    """`a` and `b` of a layer, cut to `adapted_range`. Everything outside it must be zero."""
    a = layer.a[:, slice(*adapted_range.columns)]
    b = layer.b[slice(*adapted_range.rows)]
    if a.count_nonzero() != layer.a.count_nonzero() or b.count_nonzero() != layer.b.count_nonzero():
        raise CheckpointError.of(
            f"{path}: {name} has weights outside the rows and columns of its preset",
            "the file as simpletuner wrote it",
            "If it was edited on purpose, remove simpletuner.target from its header.",
        )
    return a.clone(), b.clone()
