"""Merge LoRAs into one LoRA of a chosen rank, or into a model's weights."""

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
from simpletuner.flux2.lora_formats import PRESERVED_METADATA, folded, lost_layers, write_adapter
from simpletuner.flux2.lowrank import RankRule, ReducedDelta, reduced, stacked
from simpletuner.flux2.transformer_file import opened_transformer
from simpletuner.memory.tensors import non_finite_count

_TEXT_ENCODER = "text encoder"
"""Kind of a text encoder's keys in `AdapterFile.unread`."""
COMMON_FIELDS = ("base_model", "licence")
"""Fields of our header that a merged file keeps if all of its source files have the same value."""
_FACTOR_FIELDS = frozenset(
    {
        "format",
        "simpletuner.alpha",
        "simpletuner.target",
        ADAPTER_METADATA,
        PRESERVED_METADATA,
        FUSED_RANKS,
        "ss_network_dim",
        "ss_network_alpha",
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
    }
)
"""Header fields that become wrong when the factors change."""

ReportLayers = Callable[[Iterable[str]], Iterable[str]]
"""Iterates over the names of the layers and shows the progress."""


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter file and its strength."""

    file: AdapterFile
    strength: float
    modules: Mapping[str, Factors]
    """The file's modules; parts of fused matrices have the ranks that they had before fusing."""


@dataclass(frozen=True)
class WrittenLora:
    """Summary of a computed LoRA that was written."""

    path: Path
    layers: int
    ranks: tuple[int, int]
    """The lowest and the highest rank of a layer."""
    kept_energy: float
    """The smallest share of its energy that any layer keeps."""
    losses_by_loader: Mapping[str, list[str]]
    """Layers that a loader drops or applies wrongly, by the loader's name."""


def read_adapters(files: Sequence[tuple[Path, float]]) -> list[WeightedAdapter]:
    """Read the adapter files to merge, each with its strength.

    Raises:
        CheckpointError: files cannot be read or merged, or shapes of a layer differ between files. It lists all such
            problems.
    """
    adapters: list[WeightedAdapter] = []
    problems: list[Problem] = []
    for path, strength in files:
        try:
            file = read_adapter(path)
            check_all_read(file)
        except CheckpointError as error:
            problems += error.problems
            continue
        adapters.append(WeightedAdapter(file, strength, unfused(file.modules, file.header)))
    shapes: dict[str, tuple[tuple[int, int], Path]] = {}
    for adapter in adapters:
        misfits = [
            name
            for name, factors in adapter.modules.items()
            if shapes.setdefault(name, (factors.shape, adapter.file.path))[0] != factors.shape
        ]
        if misfits:
            shape, first_path = shapes[misfits[0]]
            own_shape = adapter.modules[misfits[0]].shape
            problems.append(
                Problem(
                    f"{adapter.file.path}: {len(misfits)} of its layers differ in shape from {first_path}, such as "
                    f"{misfits[0]} with {own_shape[0]} × {own_shape[1]}, not {shape[0]} × {shape[1]}",
                    "LoRAs of one model",
                )
            )
    CheckpointError.raise_if(problems)
    return adapters


def unread_notices(adapters: Iterable[WeightedAdapter]) -> list[str]:
    """Sentences that tell the user which keys a merged LoRA leaves out."""
    counts = {adapter.file.path: list(adapter.file.unread.values()).count(_TEXT_ENCODER) for adapter in adapters}
    return [
        f"{path}: {count} keys for the text encoder are left out: FLUX.2's text encoder is never trained."
        for path, count in counts.items()
        if count
    ]


def parts_by_layer(adapters: Iterable[WeightedAdapter]) -> dict[str, list[tuple[Factors, float]]]:
    """The summands of each layer's delta: factors and their strength."""
    parts: dict[str, list[tuple[Factors, float]]] = {}
    for adapter in adapters:
        for name, factors in adapter.modules.items():
            parts.setdefault(name, []).append((factors, adapter.strength))
    return parts


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype, at most fp32, that represents all `tensors`."""
    dtypes = {tensor.dtype for tensor in tensors} or {torch.float16}
    return dtypes.pop() if dtypes in ({torch.float16}, {torch.bfloat16}) else torch.float32


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
        dtype: of the factors; by default the narrowest that represents those of all files.

    Raises:
        ConfigError: `dtype` is fp16 and a factor exceeds its range.
        DiskError: no space, or the file reads back differently.
    """
    tensors = (
        tensor
        for adapter in adapters
        for factors in adapter.modules.values()
        for tensor in vars(factors).values()
        if isinstance(tensor, Tensor)
    )
    dtype = dtype or common_dtype(tensors)
    parts = parts_by_layer(adapters)
    return write_layers(
        target, ((name, reduced(stacked(parts[name]), rule)) for name in report(parts)), lora_format, header, dtype
    )


def write_layers(
    target: Path,
    layers: Iterable[tuple[str, ReducedDelta]],
    lora_format: LoraFormat,
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> WrittenLora:
    """Write computed `layers`, given by name, as a LoRA.

    Raises:
        CheckpointError: there are no layers.
        ConfigError: `dtype` is fp16 and a factor exceeds its range.
        DiskError: no space, or the file reads back differently.
    """
    modules: dict[str, LowRank] = {}
    least_kept = 1.0
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
        least_kept = min(least_kept, layer.kept_energy)
    if not modules:
        raise CheckpointError.of("no layer has a delta to write", "LoRAs with layers, or two models that differ")
    write_adapter(target, modules, lora_format, header)
    ranks = [factors.rank for factors in modules.values()]
    losses_by_loader: dict[str, list[str]] = {
        loader: list(names) for loader, names in lost_layers(modules, lora_format).items() if names
    }
    return WrittenLora(target, len(modules), (min(ranks), max(ranks)), least_kept, losses_by_loader)


def merge_into(
    model: Path,
    target: Path,
    adapters: Sequence[WeightedAdapter],
    *,
    report: Callable[[str], None] = lambda layer: None,
) -> ConvertedModel:
    """Write the transformer of `model` with the sum of `adapters` added to its weights.

    The weights keep their dtypes, but quantized ones become bf16. A target that ends in .safetensors becomes a single
    file in BFL's layout; any other, a diffusers folder. `report` is called with the name of each layer that changes.

    Raises:
        CheckpointError: the adapters' layers do not fit the model, or a sum exceeds the range of a weight's dtype.
        AccessError, ConfigError, DiskError: as `convert_model`.
    """
    parts = parts_by_layer(adapters)
    with opened_transformer(model) as transformer:
        shapes = {name: rows.shape for name, rows in transformer.weights.items()}
    misfits = [name for name, summands in parts.items() if shapes.get(f"{name}.weight") != summands[0][0].shape]
    if misfits:
        rows, columns = parts[misfits[0]][0][0].shape
        in_model = shapes.get(f"{misfits[0]}.weight")
        model_shape = "missing" if in_model is None else " × ".join(map(str, in_model))
        raise CheckpointError.of(
            f"{len(misfits)} of {len(parts)} layers do not fit {model}, such as {misfits[0]}, which is "
            f"{rows} × {columns} in the LoRA and {model_shape} in the model",
            "the model that the LoRA was trained on",
        )

    def delta_adder(name: str) -> Callable[[Tensor], Tensor]:
        def add_deltas(weight: Tensor) -> Tensor:
            report(name)
            total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for factors, strength in parts[name]:
                total += factors.delta() * strength
            merged = total.to(weight.dtype)
            if count := non_finite_count(merged):
                raise CheckpointError.of(
                    f"{count:,} numbers of {name} are NaN or infinite as {weight.dtype} once the LoRA is added",
                    "finite weights",
                    "Use a lower strength.",
                )
            return merged

        return add_deltas

    return convert_model(
        model,
        target,
        "bfl" if target.suffix == ".safetensors" else "diffusers",
        changes={f"{name}.weight": delta_adder(name) for name in parts},
        header=merged_header(adapters),
    )


def merged_header(adapters: Sequence[WeightedAdapter], rule: RankRule | None = None) -> dict[str, str]:
    """The header of a merged file: name, SHA-256 and strength of each source file, and the fields that all share."""
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
    """The header of `file` at another rank: its training fields, and name and SHA-256 of the source file."""
    header = {key: value for key, value in file.header.items() if key not in _FACTOR_FIELDS}
    record = {"file": file.path.name, "sha256": sha256_file(file.path), **vars(rule)}
    return {**header, "simpletuner.resized": json.dumps(record)}
