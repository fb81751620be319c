"""LoRAs merged into one and cut to a rank; what two models differ by, as a LoRA."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner import __version__
from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.base.files import sha256_file
from simpletuner.config.options.lora import LoraFormat
from simpletuner.flux2.convert_model import ConvertedModel, convert_model
from simpletuner.flux2.dialects import AdapterFile, check_all_read, read_adapter
from simpletuner.flux2.factors import Factors, LowRank
from simpletuner.flux2.fused import FUSED_RANKS, unfused
from simpletuner.flux2.header_alpha import ADAPTER_METADATA
from simpletuner.flux2.lora_formats import KEPT_METADATA, folded, losses, write_adapter
from simpletuner.flux2.lowrank import RankRule, Reduced, reduced, stacked
from simpletuner.flux2.transformer_file import opened_transformer
from simpletuner.memory.tensors import non_finite_count

_TEXT_ENCODER = "text encoder"
"""What `AdapterFile.unread` calls keys of a text encoder's layers."""
COMMON_FIELDS = ("base_model", "licence")
"""Fields of our header that a merged file keeps where all of its files say the same."""
_OF_THE_FILE = frozenset(
    {
        "format",
        "simpletuner.alpha",
        "simpletuner.target",
        ADAPTER_METADATA,
        KEPT_METADATA,
        FUSED_RANKS,
        "ss_network_dim",
        "ss_network_alpha",
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
    }
)
"""Fields of a header that are not true any more once the factors have changed."""

ReportLayers = Callable[[Iterable[str]], Iterable[str]]
"""Goes over the names of the layers, and shows how far that is."""


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter file and how strongly it acts."""

    file: AdapterFile
    strength: float
    modules: Mapping[str, Factors]
    """Those of the file, what was fused at the ranks of its parts."""


@dataclass(frozen=True)
class WrittenLora:
    """What a LoRA that was computed and written holds."""

    path: Path
    layers: int
    ranks: tuple[int, int]
    """The lowest and the highest of a layer."""
    kept: float
    """Share of its energy that the layer with the largest loss keeps."""
    lost: Mapping[str, list[str]]
    """Layers that a loader drops or gets wrong, by its name."""


def read_adapters(wanted: Sequence[tuple[Path, float]]) -> list[WeightedAdapter]:
    """Read adapter files that are to be added up, each with its strength.

    Raises:
        CheckpointError: every file that cannot be read, or holds what cannot be added up; and layers whose shapes
            differ between files.
    """
    found: list[WeightedAdapter] = []
    problems: list[Problem] = []
    for path, strength in wanted:
        try:
            file = read_adapter(path)
            check_all_read(file)
        except CheckpointError as error:
            problems += error.problems
            continue
        found.append(WeightedAdapter(file, strength, unfused(file.modules, file.header)))
    shapes: dict[str, tuple[tuple[int, int], Path]] = {}
    for adapter in found:
        misfits = [
            name
            for name, factors in adapter.modules.items()
            if shapes.setdefault(name, (factors.shape, adapter.file.path))[0] != factors.shape
        ]
        if misfits:
            shape, other = shapes[misfits[0]]
            own = adapter.modules[misfits[0]].shape
            problems.append(
                Problem(
                    f"{adapter.file.path}: {len(misfits)} of its layers have other shapes than in {other}, such as "
                    f"{misfits[0]} with {own[0]} × {own[1]}, not {shape[0]} × {shape[1]}",
                    "LoRAs of one model",
                )
            )
    CheckpointError.raise_if(problems)
    return found


def unread_notices(adapters: Iterable[WeightedAdapter]) -> list[str]:
    """What is left out of a merged LoRA, in sentences."""
    counts = {adapter.file.path: list(adapter.file.unread.values()).count(_TEXT_ENCODER) for adapter in adapters}
    return [
        f"{path}: {count} keys for the text encoder are left out; FLUX.2's is not trained."
        for path, count in counts.items()
        if count
    ]


def parts_by_layer(adapters: Iterable[WeightedAdapter]) -> dict[str, list[tuple[Factors, float]]]:
    """What each layer's delta is the sum of: factors and their strength."""
    parts: dict[str, list[tuple[Factors, float]]] = {}
    for adapter in adapters:
        for name, factors in adapter.modules.items():
            parts.setdefault(name, []).append((factors, adapter.strength))
    return parts


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds all numbers of `tensors`; fp32 at most."""
    kinds = {tensor.dtype for tensor in tensors} or {torch.float16}
    return kinds.pop() if kinds in ({torch.float16}, {torch.bfloat16}) else torch.float32


def write_merged(
    target: Path,
    adapters: Sequence[WeightedAdapter],
    rule: RankRule,
    lora_format: LoraFormat,
    header: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    report: ReportLayers = lambda layers: layers,
) -> WrittenLora:
    """Write the sum of `adapters`, each layer at the rank of `rule`.

    Args:
        dtype: of the factors; by default the narrowest that holds those of all files.

    Raises:
        ConfigError: `dtype` is fp16 and does not hold a factor.
        DiskError: no space, or the file reads back differently.
    """
    tensors = (
        tensor
        for adapter in adapters
        for factors in adapter.modules.values()
        for tensor in vars(factors).values()
        if isinstance(tensor, Tensor)
    )
    dtype = dtype or widest(tensors)
    parts = parts_by_layer(adapters)
    return write_layers(
        target, ((name, reduced(stacked(parts[name]), rule)) for name in report(parts)), lora_format, header, dtype
    )


def write_layers(
    target: Path,
    layers: Iterable[tuple[str, Reduced]],
    lora_format: LoraFormat,
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> WrittenLora:
    """Write computed `layers`, by name, as a LoRA.

    Raises:
        CheckpointError: there are none.
        ConfigError: `dtype` is fp16 and does not hold a factor.
        DiskError: no space, or the file reads back differently.
    """
    modules: dict[str, LowRank] = {}
    kept = 1.0
    for name, layer in layers:
        factors = folded(layer.factors)
        modules[name] = LowRank(factors.a.to(dtype), factors.b.to(dtype))
        if non_finite_count(modules[name].a) or non_finite_count(modules[name].b):
            largest = max(float(factors.a.abs().max()), float(factors.b.abs().max()))
            raise ConfigError.of(
                f"--dtype = fp16: {name} has a value of {largest:g}",
                f"at most {torch.finfo(torch.float16).max:g}",
                "Give --dtype=bf16.",
            )
        kept = min(kept, layer.kept)
    if not modules:
        raise CheckpointError.of("no layer has anything for a LoRA", "LoRAs with layers, or two models that differ")
    write_adapter(target, modules, lora_format, header)
    ranks = [factors.rank for factors in modules.values()]
    lost: dict[str, list[str]] = {
        loader: list(names) for loader, names in losses(modules, lora_format).items() if names
    }
    return WrittenLora(target, len(modules), (min(ranks), max(ranks)), kept, lost)


def merge_into(
    model: Path,
    target: Path,
    adapters: Sequence[WeightedAdapter],
    *,
    report: Callable[[str], None] = lambda layer: None,
) -> ConvertedModel:
    """Write the transformer of `model` with the sum of `adapters` added to its weights, each in its own dtype. A target
    that ends in .safetensors is a single file in BFL's layout, another one a folder of diffusers'.

    `report` is called with each layer that is changed, when it is.

    Raises:
        CheckpointError: the adapters' layers are not this model's, or their sum is more than a weight's dtype holds.
        AccessError, ConfigError, DiskError: as `convert_model`.
    """
    parts = parts_by_layer(adapters)
    with opened_transformer(model) as found:
        shapes = {name: rows.shape for name, rows in found.weights.items()}
    misfits = [name for name, summands in parts.items() if shapes.get(f"{name}.weight") != summands[0][0].shape]
    if misfits:
        rows, columns = parts[misfits[0]][0][0].shape
        there = shapes.get(f"{misfits[0]}.weight")
        have = "not there" if there is None else " × ".join(map(str, there))
        raise CheckpointError.of(
            f"{len(misfits)} of {len(parts)} layers do not fit {model}, such as {misfits[0]}, which is "
            f"{rows} × {columns} in the LoRA and {have} in the model",
            "the model that the LoRA was trained on",
        )

    def adding(name: str) -> Callable[[Tensor], Tensor]:
        def added(weight: Tensor) -> Tensor:
            report(name)
            total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for factors, strength in parts[name]:
                total += factors.delta() * strength
            made = total.to(weight.dtype)
            if count := non_finite_count(made):
                raise CheckpointError.of(
                    f"{count:,} numbers of {name} are NaN or infinite as {weight.dtype} once the LoRA is added",
                    "finite weights",
                    "Give it a lower strength.",
                )
            return made

        return added

    return convert_model(
        model,
        target,
        "bfl" if target.suffix == ".safetensors" else "diffusers",
        changes={f"{name}.weight": adding(name) for name in parts},
        header=merged_header(adapters),
    )


def merged_header(adapters: Sequence[WeightedAdapter], rule: RankRule | None = None) -> dict[str, str]:
    """The header of a sum: which files it is of, by name, SHA-256 and strength, and what all of them say."""
    record: dict[str, object] = {
        "loras": [
            {"file": adapter.file.path.name, "sha256": sha256_file(adapter.file.path), "strength": adapter.strength}
            for adapter in adapters
        ]
    }
    record |= {} if rule is None else vars(rule)
    header = {"simpletuner.version": __version__, "simpletuner.merged": json.dumps(record)}
    for field in COMMON_FIELDS:
        (value, *others) = {adapter.file.header.get(f"simpletuner.{field}") for adapter in adapters}
        if value is not None and not others:
            header[f"simpletuner.{field}"] = value
    return header


def resized_header(file: AdapterFile, rule: RankRule) -> dict[str, str]:
    """The header of `file` at another rank: what it says of its training, and which file it was."""
    header = {key: value for key, value in file.header.items() if key not in _OF_THE_FILE}
    record = {"file": file.path.name, "sha256": sha256_file(file.path), **vars(rule)}
    return {**header, "simpletuner.resized": json.dumps(record)}
