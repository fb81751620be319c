"""LoRA files: written so that other tools load them as they lie, read back before anyone relies on them.

The keys are diffusers' (`transformer.<module>.lora_A.weight`), which ComfyUI reads too. alpha/rank is folded
into B, because loaders disagree about where alpha is kept; the user's alpha stays in our own header.
"""

import functools
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
from simpletuner.base.files import file_errors_reported
from simpletuner.config.flavours import FLAVOURS, Flavour, TransformerSpec, flavour_of_base
from simpletuner.flux2.lora import CUSTOM, PRESETS, Adapter, Range, linears, preset_ranges, whole, wrap
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.tensors import non_finite_count, open_tensors, save_verified
from simpletuner.runs.layout import LORA_NAME

HEADER_FIELDS = frozenset({"base_model", "comment", "config", "datasets", "licence", "run", "step", "version"})
"""What a caller may put into the header, each as `simpletuner.<field>`: a shared file must not carry more."""

_KEY = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_ADAPTER_METADATA = "lora_adapter_metadata"
_PLAIN_ENDING = re.compile(r"\^?[\w.-]+")
"""What of PEFT's patterns, which are regular expressions, is read: names. A foreign expression may never end."""
_ALPHA_LIMIT = 1e9
_RANK_LIMIT = 1_000_000
_SAVE_AGAIN = "The file is damaged: take another copy, or save it again with the program that wrote it."


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
        CheckpointError: no such file, damaged, in another program's key format, or with an alpha, a rank or weights
            that make no LoRA.
    """
    with file_errors_reported(path, CheckpointError, doing="read"):
        path = path / LORA_NAME if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError.of(f"no LoRA at {path}", "a .safetensors file or a run's folder")
        with open_tensors(path) as file:
            tensors, header = dict(file), file.metadata

    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError.of(
                f"{path} has the key {key}",
                "diffusers' LoRA keys (transformer.….lora_A.weight) only",
                "Export it again in diffusers' format.",
            )
        if not tensor.is_floating_point():
            raise CheckpointError.of(
                f"{path} holds {key} as {tensor.dtype}",
                "floating-point weights",
                "Export it again without quantization.",
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
    empty = [name for name, pair in sides.items() if not pair["A"].numel() or not pair["B"].numel()]
    if empty:
        shape = "×".join(map(str, sides[empty[0]]["A"].shape))
        raise CheckpointError.of(
            f"{path} has {len(empty)} empty layers, such as {empty[0]} with a lora_A of {shape}",
            "a rank of at least 1",
            _SAVE_AGAIN,
        )

    is_ours = "simpletuner.alpha" in header
    own_alpha = _own_alpha(path, header["simpletuner.alpha"]) if is_ours else None
    alpha_of = _AlphaOf(path, header.get(_ADAPTER_METADATA, "{}"))
    layers = {}
    for name, pair in sides.items():
        rank = pair["A"].shape[0]
        if own_alpha is not None:
            scale = own_alpha / rank
            layers[name] = SavedLayer(pair["A"], pair["B"] / scale, scale)
        else:
            layers[name] = SavedLayer(pair["A"], pair["B"], alpha_of(name, rank) / rank)
    damaged = [name for name, layer in layers.items() if non_finite_count(layer.a) or non_finite_count(layer.b)]
    if damaged:
        raise CheckpointError.of(
            f"{path}: NaN or infinite numbers in {len(damaged)} of {len(layers)} layers, such as {damaged[0]}",
            "finite weights",
            "The file is damaged or was saved from a run that diverged: take an earlier checkpoint.",
        )
    first = next(iter(layers.values()))
    target = header.get("simpletuner.target", CUSTOM)
    return LoadedLora(
        path=path,
        layers=layers,
        alpha=first.scale * first.a.shape[0] if own_alpha is None else own_alpha,
        target=target if target in PRESETS else CUSTOM,
        metadata={field: header[f"simpletuner.{field}"] for field in HEADER_FIELDS if f"simpletuner.{field}" in header},
    )


def _own_alpha(path: Path, text: str) -> float:
    """The alpha in a header of ours."""
    try:
        return _checked_alpha(path, "simpletuner.alpha", float(text))
    except ValueError:
        return _checked_alpha(path, "simpletuner.alpha", text)


def _checked_alpha(path: Path, key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _ALPHA_LIMIT:
        return float(value)
    raise CheckpointError.of(
        f"{path}: {key} = {str(value)[:60]} in its header",
        f"a number above 0, up to {_ALPHA_LIMIT:g}",
        "At an alpha of 0 a LoRA does nothing: save it again with another one. How strongly it acts is chosen where it "
        "is used, as in `simpletuner sample --lora FILE:0.5`.",
    )


class _AlphaOf:
    """A layer's alpha by PEFT's rules; without its metadata alpha is the rank, as diffusers has it.

    Raises:
        CheckpointError: the metadata is damaged, or of another kind of adapter.
    """

    def __init__(self, path: Path, metadata: str) -> None:
        settings = {key.removeprefix("transformer."): value for key, value in _json_object(path, metadata).items()}
        for flag in ("use_dora", "use_rslora"):
            if settings.get(flag):
                raise CheckpointError.of(f"{path} was trained with {flag}", "an ordinary LoRA")
        default = settings.get("lora_alpha")
        self.default = None if default is None else _checked_alpha(path, "lora_alpha", default)
        ranks = {"r": settings["r"]} if "r" in settings else {}
        for key, rank in (ranks | _patterns(path, "rank_pattern", settings)).items():
            if type(rank) is not int or not 0 < rank <= _RANK_LIMIT:
                raise CheckpointError.of(
                    f"{path}: the rank of {key} is {str(rank)[:60]} in its header",
                    f"a whole number from 1 to {_RANK_LIMIT:,}",
                    _SAVE_AGAIN,
                )
        self.by_ending: dict[str, tuple[int, float]] = {}
        """Place in the file and alpha of each pattern; one that begins with ^ is a whole name."""
        for place, (pattern, alpha) in enumerate(_patterns(path, "alpha_pattern", settings).items()):
            ending = pattern.removesuffix("$").replace(r"\.", ".")
            if not _PLAIN_ENDING.fullmatch(ending):
                raise CheckpointError.of(
                    f"{path}: alpha_pattern has the regular expression {pattern[:60]} in its header",
                    "names of layers, or their endings after a dot",
                    "Write the names of the layers out, as PEFT does when it saves.",
                )
            checked = _checked_alpha(path, f"alpha_pattern {pattern[:60]}", alpha)
            self.by_ending.setdefault(ending, (place, checked))

    def __call__(self, layer: str, rank: int) -> float:
        parts = layer.split(".")
        endings = [f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))]
        matches = [self.by_ending[ending] for ending in endings if ending in self.by_ending]
        if matches:
            return min(matches)[1]  # PEFT takes the first of the file
        return float(rank) if self.default is None else self.default


def _json_object(path: Path, text: str) -> dict[str, Any]:
    """The adapter's metadata, from its text in the header."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError.of(
            f"{path}: {_ADAPTER_METADATA} = {text[:60]} in its header", "a JSON object", _SAVE_AGAIN
        )
    return value


def _patterns(path: Path, key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values by pattern; none where the key is absent or null."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError.of(
            f"{path}: {key} = {str(value)[:60]} in its header", "an object of layers and their values", _SAVE_AGAIN
        )
    return value or {}


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
        trained_on, here = _flavour_of_lora(saved), _flavour_with(found)
        named = f"{origin} ({trained_on.name})" if origin and trained_on and origin != trained_on.name else origin
        named = named or (trained_on.name if trained_on is not None else None)
        raise CheckpointError.of(
            f"{saved.path} does not fit this model{'' if here is None else f', {here.family}'}: {len(misfits)} of "
            f"{len(saved.layers)} layers, such as {name}, which is {layer.b.shape[0]} × {layer.a.shape[1]} in the file "
            f"and {have} here",
            "the model it was trained on" + (f", {named}" if named else ""),
            "Name it with --model_flavour or --pretrained_model_name_or_path."
            if trained_on is None or trained_on is here
            else f"Give --model_flavour {trained_on.name} to use this file.",
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


@functools.cache
def _linear_shapes(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of each Linear."""
    with torch.device("meta"):
        transformer = Flux2Transformer(spec)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears(transformer).items()}


def _flavour_with(found: Mapping[str, Any]) -> Flavour | None:
    """The first flavour with exactly these Linears: the base of its family."""
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in found.items()}
    return next((each for each in FLAVOURS.values() if _linear_shapes(each.transformer) == shapes), None)


def _flavour_of_lora(saved: LoadedLora) -> Flavour | None:
    """The flavour that a LoRA was trained on: by its header, else the first one that all of its layers fit."""
    named = flavour_of_base(saved.metadata.get("base_model", ""))
    shapes = {name: (layer.b.shape[0], layer.a.shape[1]) for name, layer in saved.layers.items()}
    return named or next(
        (each for each in FLAVOURS.values() if shapes.items() <= _linear_shapes(each.transformer).items()), None
    )


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
