"""LoRA files: written so that other tools load them as they lie, read back before anyone relies on them.

The keys are diffusers' (`transformer.<module>.lora_A.weight`), which ComfyUI reads too. alpha/rank is folded
into B, because loaders disagree about where alpha is kept; the user's alpha stays in our own header.
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
from simpletuner.flux2.lora import CUSTOM, PRESETS, Adaptable, Adapter, Range, linears, preset_ranges, whole, wrap
from simpletuner.flux2.lora_formats import peft_metadata
from simpletuner.flux2.modelspec import MODELSPEC_FIELDS
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.memory.tensors import save_verified

HEADER_FIELDS = frozenset(
    {"base_model", "comment", "config", "datasets", "licence", "options", "run", "step", "trigger_phrase", "version"}
)
"""What a caller may put into the header, each as `simpletuner.<field>`: a shared file must not carry more."""


@dataclass(frozen=True)
class SavedLayer:
    """One layer as it was trained: its output is `scale · b · a · x`, fp32, full size."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA file's content."""

    path: Path
    layers: dict[str, SavedLayer]
    alpha: float
    """As the user gave it for training."""
    target: str
    """The preset it was trained with, or "custom"."""
    metadata: dict[str, str]
    """The `HEADER_FIELDS` that the file has. Empty for other programs' files."""
    unused: int = 0
    """Keys of a text encoder's layers, which are not adapted here."""


def save_lora(path: Path, adapter: Adapter, *, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write `adapter` to `path`, and compare what the disk gives back.

    Args:
        metadata: fields of `HEADER_FIELDS`.
        dtype: the type of the file's tensors.

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
    """What every file of ours says about itself; `metadata` are fields of `HEADER_FIELDS` and of `MODELSPEC_FIELDS`."""
    unknown = metadata.keys() - HEADER_FIELDS - MODELSPEC_FIELDS
    if unknown:
        raise ValueError(f"not in HEADER_FIELDS: {', '.join(sorted(unknown))}")
    own = {name if name in MODELSPEC_FIELDS else f"simpletuner.{name}": value for name, value in metadata.items()}
    return {"format": "pt", **own}


def read_lora(path: Path) -> LoadedLora:
    """The LoRA in `path`, in any program's dialect: a file, or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        CheckpointError: no such file, damaged, without a layer of FLUX.2, with an alpha, a rank or weights that make no
            LoRA, or another kind of adapter.
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
                f"{file.path} holds a {title}, in {name} for one",
                "a LoRA, the kind of adapter that is trained",
                "`simpletuner sample --lora FILE` draws with it.",
            )
        a, b, scale = factors.a.float(), factors.b.float(), factors.scale
        if own_alpha is not None:  # folded into B, and taken out again
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
    """The alpha in a header of ours."""
    try:
        return checked_alpha(path, "simpletuner.alpha", float(text))
    except ValueError:
        return checked_alpha(path, "simpletuner.alpha", text)


def attach_saved(transformer: nn.Module, saved: LoadedLora, *, strength: float = 1.0, dropout: float = 0.0) -> Adapter:
    """Freeze all that `transformer` has, earlier adapters too, and put `saved` on it.

    Called once for each file; where several adapt one layer their outputs add up. A file of one of our
    presets goes on learning in its rows and columns only.

    Raises:
        CheckpointError: the file's layers are not this model's.
    """
    found = linears(transformer)
    shapes = {name: (layer.b.shape[0], layer.a.shape[1]) for name, layer in saved.layers.items()}
    check_shapes(saved.path, shapes, saved.metadata.get("base_model"), found)
    ranges = preset_ranges(transformer, PRESETS[saved.target]) if saved.target in PRESETS else {}
    transformer.requires_grad_(False)
    layers = {}
    for name, linear in found.items():
        if name not in saved.layers:
            continue
        layer = saved.layers[name]
        place = ranges.get(name, whole(linear))
        layers[name] = wrap(
            transformer,
            name,
            *_live(saved.path, name, layer, place),
            place=place,
            scale=layer.scale * strength,
            dropout=dropout,
        )
    return Adapter(layers, target=saved.target, alpha=saved.alpha)


def check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, int]], base_model: str | None, found: Mapping[str, Adaptable]
) -> None:
    """Check that an adapter fits a model.

    Args:
        path: of the adapter.
        shapes: rows and columns of what it adds, by layer.
        base_model: that its header names.
        found: the model's Linears.

    Raises:
        CheckpointError: layers that the model lacks, or has with another shape.
    """
    here = {name: (linear.out_features, linear.in_features) for name, linear in found.items()}
    misfits = [name for name, shape in shapes.items() if here.get(name) != shape]
    if not misfits:
        return
    name = misfits[0]
    rows, columns = shapes[name]
    have = f"{here[name][0]} × {here[name][1]}" if name in here else "not there"
    trained_on, flavour = _flavour_of_adapter(shapes, base_model), _flavour_with(here)
    named = f"{base_model} ({trained_on.name})" if base_model and trained_on and base_model != trained_on.name else None
    named = named or base_model or (trained_on.name if trained_on is not None else None)
    raise CheckpointError.of(
        f"{path} does not fit this model{'' if flavour is None else f', {flavour.family}'}: {len(misfits)} of "
        f"{len(shapes)} layers, such as {name}, which is {rows} × {columns} in the file and {have} here",
        "the model it was trained on" + (f", {named}" if named else ""),
        "Name it with --model_flavour or --pretrained_model_name_or_path."
        if trained_on is None or trained_on is flavour
        else f"Give --model_flavour {trained_on.name} to use this file.",
    )


@functools.cache
def linear_shapes(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of each Linear."""
    found = linears(empty_transformer(spec))
    return {name: (linear.out_features, linear.in_features) for name, linear in found.items()}


def _flavour_with(shapes: Mapping[str, tuple[int, int]]) -> Flavour | None:
    """The first flavour with exactly these Linears: the base of its family."""
    return next((each for each in FLAVOURS.values() if linear_shapes(each.transformer) == shapes), None)


def _flavour_of_adapter(shapes: Mapping[str, tuple[int, int]], base_model: str | None) -> Flavour | None:
    """The flavour that an adapter was trained on: by its header, else the first one that all of its layers fit."""
    return flavour_of_base(base_model or "") or next(
        (each for each in FLAVOURS.values() if shapes.items() <= linear_shapes(each.transformer).items()), None
    )


def _live(path: Path, name: str, layer: SavedLayer, place: Range) -> tuple[Tensor, Tensor]:
    """The part of a layer inside `place`; outside there must be nothing."""
    a = layer.a[:, slice(*place.columns)]
    b = layer.b[slice(*place.rows)]
    if a.count_nonzero() != layer.a.count_nonzero() or b.count_nonzero() != layer.b.count_nonzero():
        raise CheckpointError.of(
            f"{path}: {name} has weights outside the rows and columns of its preset",
            "a file as this program wrote it",
            "Remove simpletuner.target from its header if it was changed on purpose.",
        )
    return a.clone(), b.clone()
