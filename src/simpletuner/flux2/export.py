"""LoRA files: written so that other tools load them as they lie, read back before anyone relies on them.

The keys are diffusers' (`transformer.<module>.lora_A.weight`), which ComfyUI reads too. alpha/rank is folded
into B, because loaders disagree about where alpha is kept; the user's alpha stays in our own header.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.base.errors import CheckpointError
from simpletuner.flux2.lora import CUSTOM, PRESETS, Adapter, Range, linears, preset_ranges, whole, wrap
from simpletuner.memory.tensors import open_tensors, save_verified
from simpletuner.runs.layout import LORA_NAME

HEADER_FIELDS = frozenset({"base_model", "comment", "config", "datasets", "licence", "run", "step", "version"})
"""What a caller may put into the header, each as `simpletuner.<field>`: a shared file must not carry more."""

_KEY = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_ADAPTER_METADATA = "lora_adapter_metadata"


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


def save_lora(path: Path, adapter: Adapter, *, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write `adapter` to `path`, and compare what the disk gives back.

    Args:
        metadata: fields of `HEADER_FIELDS`.
        dtype: the type of the file's tensors.

    Raises:
        DiskError: no space, or the file reads back differently.
    """
    header = {
        **header_of(metadata),
        _ADAPTER_METADATA: json.dumps(_adapter_metadata(adapter), sort_keys=True),
        "simpletuner.alpha": repr(adapter.alpha),
        "simpletuner.target": adapter.target,
    }
    save_verified(path, adapter.expanded(), header, dtype)


def header_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What every file of ours says about itself; `metadata` are fields of `HEADER_FIELDS`."""
    unknown = metadata.keys() - HEADER_FIELDS
    if unknown:
        raise ValueError(f"not in HEADER_FIELDS: {', '.join(sorted(unknown))}")
    return {"format": "pt", **{f"simpletuner.{field}": value for field, value in metadata.items()}}


def _adapter_metadata(adapter: Adapter) -> dict[str, Any]:
    """PEFT's configuration as diffusers reads it from the header. alpha = rank, since the scale is in B."""
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "transformer.r": rank,
        "transformer.lora_alpha": rank,
        "transformer.rank_pattern": others,
        "transformer.alpha_pattern": others,
        "transformer.target_modules": list(ranks),
    }


def read_lora(path: Path) -> LoadedLora:
    """The LoRA in `path`, a file or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        CheckpointError: no such file, damaged, or in another program's key format.
    """
    path = path / LORA_NAME if path.is_dir() else path
    try:
        with open_tensors(path) as file:
            tensors, header = dict(file), file.metadata
    except FileNotFoundError:
        raise CheckpointError.of(f"no LoRA at {path}", "a .safetensors file or a run's folder") from None

    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError.of(
                f"{path} has the key {key}",
                "diffusers' LoRA keys (transformer.….lora_A.weight) only",
                "Export it again in diffusers' format.",
            )
        sides.setdefault(match["layer"], {})[match["side"]] = tensor.float()
    broken = [
        name
        for name, pair in sides.items()
        if pair.keys() != {"A", "B"} or pair["A"].ndim != 2 or pair["A"].shape[:1] != pair["B"].shape[1:]
    ]
    if broken or not sides:
        found = f"{broken[0]} without a matching lora_A and lora_B" if broken else "no layers"
        raise CheckpointError.of(f"{path} has {found}", "a whole LoRA")

    is_ours = "simpletuner.alpha" in header
    alpha_of = _AlphaOf(path, json.loads(header.get(_ADAPTER_METADATA, "{}")))
    layers = {}
    for name, pair in sides.items():
        rank = pair["A"].shape[0]
        if is_ours:
            scale = float(header["simpletuner.alpha"]) / rank
            layers[name] = SavedLayer(pair["A"], pair["B"] / scale, scale)
        else:
            layers[name] = SavedLayer(pair["A"], pair["B"], alpha_of(name, rank) / rank)
    first = next(iter(layers.values()))
    return LoadedLora(
        path=path,
        layers=layers,
        alpha=float(header["simpletuner.alpha"]) if is_ours else first.scale * first.a.shape[0],
        target=header.get("simpletuner.target", CUSTOM),
        metadata={field: header[f"simpletuner.{field}"] for field in HEADER_FIELDS if f"simpletuner.{field}" in header},
    )


class _AlphaOf:
    """A layer's alpha by PEFT's rules; without its metadata alpha is the rank, as diffusers has it."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        settings = {key.removeprefix("transformer."): value for key, value in metadata.items()}
        for flag in ("use_dora", "use_rslora"):
            if settings.get(flag):
                raise CheckpointError.of(f"{path} was trained with {flag}", "an ordinary LoRA")
        self.default: float | None = settings.get("lora_alpha")
        self.patterns: dict[str, float] = settings.get("alpha_pattern") or {}

    def __call__(self, layer: str, rank: int) -> float:
        for pattern, alpha in self.patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return float(alpha)
        return float(rank if self.default is None else self.default)


def attach_saved(transformer: nn.Module, saved: LoadedLora, *, strength: float = 1.0, dropout: float = 0.0) -> Adapter:
    """Freeze all that `transformer` has, earlier adapters too, and put `saved` on it.

    Called once for each file; where several adapt one layer their outputs add up. A file of one of our
    presets goes on learning in its rows and columns only.

    Raises:
        CheckpointError: the file's layers are not this model's.
    """
    found = linears(transformer)
    misfits = [name for name, layer in saved.layers.items() if name not in found or not _fits(layer, found[name])]
    if misfits:
        name = misfits[0]
        have = f"{found[name].out_features} × {found[name].in_features}" if name in found else "not there"
        layer = saved.layers[name]
        origin = saved.metadata.get("base_model")
        raise CheckpointError.of(
            f"{saved.path} does not fit this model: {len(misfits)} of {len(saved.layers)} layers, such as "
            f"{name}, which is {layer.b.shape[0]} × {layer.a.shape[1]} in the file and {have} here",
            "the model it was trained on" + (f", {origin}" if origin else ""),
            "Name it with --model_flavour or --pretrained_model_name_or_path.",
        )
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


def _fits(layer: SavedLayer, linear: Any) -> bool:
    return (layer.b.shape[0], layer.a.shape[1]) == (linear.out_features, linear.in_features)


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
