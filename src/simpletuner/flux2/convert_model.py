"""Convert transformers between diffusers folders and single files in BFL's layout, which ComfyUI loads.

Tensors are renamed, split, concatenated and written one by one with unchanged bits, so a round trip is exact.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from simpletuner.base import machine
from simpletuner.base.errors import AccessError, CheckpointError, ConfigError, DiskError, Problem
from simpletuner.base.files import file_errors_reported, sync_directory, write_json
from simpletuner.base.parts import locked_part
from simpletuner.base.sizes import format_size
from simpletuner.base.tensorfile import DTYPE_BITS, TensorData, read_header, write_verified
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.configs import Config
from simpletuner.flux2.modelfile import WEIGHTS_NAME
from simpletuner.flux2.names import to_bfl, transformer_renaming
from simpletuner.flux2.source import Weights, transformer_spec
from simpletuner.flux2.spec import transformer_from_tensors, transformer_to_diffusers
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.flux2.transformer_file import OpenTransformer, opened_transformer, transformer_folder
from simpletuner.memory.tensors import tensor_data

MODEL_FORMATS = ("diffusers", "bfl", "comfyui")
"""Formats that a model can be converted to. ComfyUI reads BFL's layout, so the last two are the same."""


@dataclass(frozen=True)
class ConvertedModel:
    """Result of `convert_model`."""

    path: Path
    """The folder or file."""
    tensors: int
    bytes: int
    left_out: int
    """Number of source tensors that belong to other components: a VAE or a text encoder."""


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read only when it is written."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def changed(self, change: Callable[[Tensor], Tensor] | None) -> "_LazyTensor":
        """This tensor with `change` applied when it is read; unchanged if `change` is None."""
        return self if change is None else replace(self, read=lambda: change(self.read()))

    def data_to_write(self) -> TensorData:
        """The tensor in the form that `write_verified` takes."""
        return TensorData(self.dtype, self.shape, self.size, lambda: tensor_data(self.read()).data())


def holds_model(path: Path) -> bool:
    """Whether `path` is a diffusers folder with a transformer, or a safetensors file with a transformer's weights.

    False for an adapter, whose tensors have other names.

    Raises:
        AccessError: `path` is a file, but not a complete safetensors file.
    """
    if path.is_dir():
        return transformer_folder(path) is not None
    names = read_header(path)
    renaming = transformer_renaming(names)
    diffusers_names = [renamed.names[0] for name in names if (renamed := renaming(name)) is not None]
    return "x_embedder.weight" in diffusers_names


def convert_model(
    source: Path,
    target: Path,
    to: str,
    *,
    changes: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    header: Mapping[str, str] = MappingProxyType({}),
) -> ConvertedModel:
    """Write the transformer of `source` to `target`.

    Args:
        source: a diffusers folder of a transformer or of a whole pipeline, or a single file with BFL's or diffusers'
            names. A file may have ComfyUI's prefix and may hold other components.
        target: a folder for "diffusers", a .safetensors file for the other formats. It must not exist.
        to: one of `MODEL_FORMATS`.
        changes: functions that map weights, by diffusers' names; each keeps shape and dtype. If there are any,
            quantized weights are decoded to bf16.
        header: fields to add to the source's.

    Raises:
        ConfigError: `to` is unknown, or `target` does not fit it or exists already.
        AccessError: `source` is not a complete FLUX.2 transformer, is quantized while there are no `changes`, or cannot
            be stored in a single file. The message names the defect.
        CheckpointError: a file of the weights is missing or damaged.
        DiskError: no space, or the file reads back differently. Nothing remains at `target`.
    """
    _check_target(target, to)
    with file_errors_reported(source, AccessError, doing="read"), opened_transformer(source) as transformer:
        tensors = {
            name: tensor.changed(changes.get(name))
            for name, tensor in _lazy_tensors(transformer, dequantized=bool(changes)).items()
        }
        spec = _checked_spec(source, tensors, transformer.config)
        metadata = {**transformer.header, **header}
        written_tensors = tensors if to == "diffusers" else _in_bfl_layout(tensors)
        size = sum(tensor.size for tensor in written_tensors.values())
        free = machine.free_disk_bytes(target.parent)
        if size > free:
            raise DiskError.of(
                f"{target} needs {format_size(size)}, but its disk has {format_size(free)} free",
                remedy="Free some space, or choose a target on another disk.",
            )
        if to == "diffusers":
            _write_folder(target, spec, written_tensors, metadata)
        else:
            if transformer_from_tensors({name: tensor.shape for name, tensor in tensors.items()}) != spec:
                raise AccessError.of(
                    f"{source} has a config.json whose axes_dims_rope, rope_theta or eps differ from FLUX.2's",
                    "FLUX.2's values: a single file cannot store others",
                )
            _write_single(target, written_tensors, metadata)
    return ConvertedModel(target, len(written_tensors), size, transformer.other_tensors)


def save_single(folder: Path, target: Path) -> None:
    """Write a saved transformer, from one process or several, to `target` as one file in BFL's layout.

    An existing `target` is replaced. At most one fused tensor is in memory.

    Raises:
        DiskError: no space, or the file reads back differently.
        CheckpointError: a file of the weights is missing or damaged.
    """
    try:
        with opened_transformer(folder) as transformer:
            _write_single(target, _in_bfl_layout(_lazy_tensors(transformer)), transformer.header)
    except AccessError as error:
        raise CheckpointError(*error.problems) from error


def _check_target(target: Path, to: str) -> None:
    if to not in MODEL_FORMATS:
        raise ConfigError.of(
            f"models cannot be converted to {to}",
            f"one of {', '.join(MODEL_FORMATS)}",
            "Other formats are for LoRAs only.",
        )
    is_file = target.suffix == ".safetensors"
    if to == "diffusers" and is_file:
        raise ConfigError.of(f"{target} is named like a file", "the name of a folder, which diffusers loads")
    if to != "diffusers" and not is_file:
        raise ConfigError.of(f"{target} does not end in .safetensors", f"the name of the single file that {to} loads")
    if os.path.lexists(target):
        raise ConfigError.of(f"{target} exists already", "a new name", "Remove it first, or choose another name.")
    if not target.absolute().parent.is_dir():
        raise ConfigError.of(f"{target.parent}: no such folder", "an existing folder")


def _lazy_tensors(transformer: OpenTransformer, *, dequantized: bool = False) -> dict[str, _LazyTensor]:
    """The tensors of `transformer`; with `dequantized`, quantized ones are decoded to bf16.

    Raises:
        AccessError: some tensors are quantized and `dequantized` is False.
    """
    tensors, quantized = {}, []
    for name, rows in transformer.weights.items():
        weight = rows.weight
        if weight.is_floating and weight.is_plain:
            tensors[name] = _LazyTensor(weight.data.dtype, rows.shape, rows.values)
        elif dequantized and weight.is_floating:
            tensors[name] = _LazyTensor("BF16", rows.shape, partial(rows.values, torch.bfloat16))
        else:
            quantized.append(f"{name} as {weight.data.dtype}")
    if quantized:
        raise AccessError.of(
            f"{transformer.path}: quantized ({len(quantized)}): {', '.join(quantized[:4])}",
            "weights in bf16, fp16 or fp32",
            "Convert the unquantized file.",
        )
    return tensors


def _checked_spec(source: Path, tensors: Mapping[str, _LazyTensor], config: Config | None) -> TransformerSpec:
    """The spec of the transformer, checked to have exactly its tensors.

    Raises:
        AccessError: tensors are missing, unknown or have the wrong shape.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        spec = (
            transformer_from_tensors(shapes) if config is None else transformer_spec(Weights((), config), source.name)
        )
    except KeyError as error:
        raise AccessError.of(f"{source} has no tensor {error}", "a FLUX.2 transformer") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise AccessError.of(f"{source}: {error}", "a FLUX.2 transformer") from None
    expected = {name: tuple(tensor.shape) for name, tensor in empty_transformer(spec).state_dict().items()}
    wrong = [name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]]
    AccessError.raise_if(
        Problem(f"{source}: {defect} ({len(names)}): {', '.join(sorted(names)[:4])}", remedy="Is the file complete?")
        for defect, names in (
            ("missing", expected.keys() - shapes.keys()),
            ("unknown", shapes.keys() - expected.keys()),
            ("wrong shape", wrong),
        )
        if names
    )
    return spec


def _in_bfl_layout(tensors: Mapping[str, _LazyTensor]) -> dict[str, _LazyTensor]:
    """Convert `tensors` from diffusers' to BFL's layout: fuse query, key and value, swap the last norm's halves.

    Raises:
        AccessError: query, key and value of one layer have different dtypes, so one tensor cannot hold them.
    """
    joined: dict[str, list[_LazyTensor | None]] = {}
    swapped = set()
    for name, tensor in tensors.items():
        bfl_module = to_bfl(name.removesuffix(".weight"))
        assert bfl_module is not None  # a FLUX.2 transformer has no other tensors
        # BFL's norms call their weights scale.
        leaf = "scale" if bfl_module.name.endswith("_norm") else "weight"
        fused_name = f"{bfl_module.name}.{leaf}"
        joined.setdefault(fused_name, [None] * bfl_module.parts)[bfl_module.part] = tensor
        swapped |= {fused_name} if bfl_module.swaps_halves else set()
    fused_tensors = {}
    for name, slots in joined.items():
        parts = [part for part in slots if part is not None]
        first = parts[0]
        if len(parts) < len(slots) or any(part.dtype != first.dtype for part in parts):
            raise AccessError.of(f"{name} cannot be fused: parts are missing or have different dtypes")
        shape = (first.shape[0] * len(parts), *first.shape[1:])
        fused_tensors[name] = _LazyTensor(first.dtype, shape, _joining(parts, is_swapped=name in swapped))
    return fused_tensors


def _joining(parts: list[_LazyTensor], *, is_swapped: bool) -> Callable[[], Tensor]:
    if is_swapped:
        (whole,) = parts
        return lambda: torch.cat(whole.read().chunk(2)[::-1])
    return lambda: parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])


def _write_single(target: Path, tensors: Mapping[str, _LazyTensor], metadata: Mapping[str, str]) -> None:
    with file_errors_reported(target), locked_part(target) as part:
        write_verified(part, {name: tensor.data_to_write() for name, tensor in tensors.items()}, metadata)
        os.replace(part, target)
        sync_directory(target.absolute().parent)


def _write_folder(
    target: Path, spec: TransformerSpec, tensors: Mapping[str, _LazyTensor], metadata: Mapping[str, str]
) -> None:
    with file_errors_reported(target), locked_part(target, is_folder=True) as part:
        write_json(part / "config.json", transformer_to_diffusers(spec))
        written = {name: tensor.data_to_write() for name, tensor in tensors.items()}
        write_verified(part / WEIGHTS_NAME, written, metadata)
        os.replace(part, target)
        sync_directory(target.absolute().parent)
