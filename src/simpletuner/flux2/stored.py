"""Weights in files, plain or quantized: find their formats in headers, and read rows, decoded or as stored."""

import contextlib
import itertools
import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.base.errors import AccessError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import TensorEntry, read_headers, read_metadata
from simpletuner.flux2.configs import Component
from simpletuner.flux2.names import TensorRenaming
from simpletuner.memory.precision import SLICE, check_range
from simpletuner.memory.tensors import DTYPE_NAMES

ReadPart = Callable[[str, slice], Tensor]
"""Reads rows of a weight's part into new memory. A dtype that torch lacks is returned as bytes, [rows, row bytes]."""
DecodeRows = Callable[[ReadPart, slice], Tensor]
"""Decodes rows of a weight to fp32, from its parts."""
ALL_ROWS = slice(None)
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
"""Prefixes of the transformer's Linears that can be quantized."""

FLOATING_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of plain weights, as safetensors spells them."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ROW_TILE = 128
"""Rows are decoded in multiples of this, the row count of a tile of scales."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file, not read yet."""

    name: str
    """Name in the file, with the prefix of its component."""
    format: str
    """plain, fp8, int8, int8-convrot, nvfp4 or mxfp8; or the GGUF type."""
    shape: tuple[int, ...]
    """Of the decoded values."""
    parts: Mapping[str, TensorEntry]
    """Its tensors in files: `data`, and the scales of a quantized weight."""
    decode: DecodeRows | None = None
    """None for a plain weight."""
    precision: str | None = None
    """The key of `PRECISIONS` that holds it without conversion; None if there is none."""

    @property
    def is_plain(self) -> bool:
        """Whether it is not quantized."""
        return self.decode is None

    @property
    def is_floating(self) -> bool:
        """Whether its values are floating-point numbers. Those of quantized weights always are, once decoded."""
        return not self.is_plain or self.data.dtype in FLOATING_DTYPES

    @property
    def data(self) -> TensorEntry:
        """The tensor with the values or their codes."""
        return self.parts["data"]

    @property
    def file(self) -> Path:
        """The file that holds `data`."""
        return self.data.file


def stored_weights(files: Sequence[Path], component: Component = "transformer") -> dict[str, StoredWeight]:
    """The weights of `component` in `files`, by name without the component's prefix, in the files' order.

    Weights of other components in an all-in-one checkpoint are left out. No weight is read.

    Raises:
        AccessError: a file is damaged, or holds unsupported formats; the error names each format.
    """
    from simpletuner.flux2.gguf_file import gguf_weights, is_gguf  # imported here: gguf_file imports this module

    plain = tuple(file for file in files if not is_gguf(file))
    weights: dict[str, StoredWeight] = {}
    for file in files:
        if file not in plain:
            in_file = gguf_weights(file, component)
            weights |= {short: in_file[name] for name, short in component_names(in_file, component).items()}
    return weights | safetensors_weights(plain, component)


def check_format(files: tuple[Path, ...], published: str | None = None, component: Component = "transformer") -> None:
    """Raise an AccessError unless `component` can be read from `files`. Reads only headers.

    `published` is a Hub repository with weights that are not quantized, which the error recommends.
    """
    weights = stored_weights(files, component)
    unsupported = _UnsupportedFormats(published)
    for name, weight in weights.items():
        if name.endswith(_BITSANDBYTES):
            unsupported.add(weight.file, "weights quantized by bitsandbytes", name)
        elif weight.is_plain and name.endswith("weight") and weight.data.dtype in _UNSCALED:
            unsupported.add(weight.file, f"{_UNSCALED[weight.data.dtype]} without scales", name)
    unsupported.raise_if_any()


_PREFIXES: Mapping[Component, re.Pattern[str]] = {
    "transformer": re.compile(r"(model\.)?diffusion_model\."),
    "vae": re.compile(r"(vae|first_stage_model)\."),
    "text_encoder": re.compile(r"text_encoders\.\w+\.(transformer\.)?"),
}
"""Prefix of each component's names in an all-in-one checkpoint, and in ComfyUI's transformer files."""


def component_names(names: Iterable[str], component: Component) -> dict[str, str]:
    """Map each of the file's `names` that belongs to `component` to its name without the component's prefix.

    Names with another component's prefix are left out. If no name has the prefix of `component`, all belong to it.
    """
    names = list(names)
    prefix = _PREFIXES[component]
    if not any(prefix.match(name) for name in names):
        return {name: name for name in names}
    foreign = [pattern for each, pattern in _PREFIXES.items() if each != component]
    return {name: prefix.sub("", name, count=1) for name in names if not any(each.match(name) for each in foreign)}


# Formats of safetensors files. Sources: ComfyUI's ops.py and comfy_kitchen's backends/eager/quantization.py.

_UNSCALED = {"I8": "int8 weights", "U8": "4-bit weights (packed into bytes)", "F4": "4-bit weights (fp4)"}
_BITSANDBYTES = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_SIDE_SUFFIXES = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "comfy_quant",
    "scale_weight",
    "scale_input",
)
"""Last name parts of a quantized layer's tensors besides `weight`. The last two are the older spelling. Input scales
are for quantized activations and are not read."""
_MARKER = "scaled_fp8"
"""Tensor that marks a file of scaled fp8 weights. It is not read."""
QUANTIZATION_METADATA = "_quantization_metadata"
"""Header field that may describe the formats of quantized layers."""
_MARKER_LIMIT = 4096
"""Maximum size in bytes of a layer's `comfy_quant` marker, a JSON text."""
_FP8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_NVFP4_BLOCK, _MXFP8_BLOCK = 16, 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def safetensors_weights(files: tuple[Path, ...], component: Component) -> dict[str, StoredWeight]:
    """Like `stored_weights`, for safetensors files."""
    entries = read_headers(files)
    names = component_names(entries, component)
    short_entries = {short: entries[name] for name, short in names.items()}
    layers = {short.removesuffix(".weight") for short in short_entries if short.endswith(".weight")}
    side_tensors_of: dict[str, dict[str, TensorEntry]] = {layer: {} for layer in layers}
    for short, entry in short_entries.items():
        layer, _, last = short.rpartition(".")
        if layer in layers and last in _SIDE_SUFFIXES:
            side_tensors_of[layer][last] = entry
    markers = _metadata_markers(files, component)
    unsupported, weights = _UnsupportedFormats(), {}
    for name, short in names.items():
        layer, _, last = short.rpartition(".")
        if short == _MARKER or (layer in layers and last in _SIDE_SUFFIXES):
            continue
        side_tensors = side_tensors_of.get(layer, {}) if last == "weight" else {}
        weight = StoredWeight(name, "plain", short_entries[short].shape, {"data": short_entries[short]})
        try:
            marker = markers.get(layer) if last == "weight" else None
            if "comfy_quant" in side_tensors:
                marker = _read_marker(side_tensors["comfy_quant"])
            weights[short] = _with_format(weight, marker, side_tensors)
        except _FormatError as error:
            unsupported.add(weight.file, str(error), name)
    unsupported.raise_if_any()
    return weights


class _FormatError(Exception):
    """An unsupported format; the argument describes it."""


class _UnsupportedFormats:
    """Collect unsupported formats, and raise one error for all of them."""

    def __init__(self, published: str | None = None) -> None:
        self._published = published
        self._names: dict[tuple[Path, str], list[str]] = {}

    def add(self, file: Path, finding: str, name: str) -> None:
        self._names.setdefault((file, finding), []).append(name)

    def raise_if_any(self) -> None:
        example = f", such as that of {self._published}" if self._published else ""
        AccessError.raise_if(
            Problem(
                f"{file} holds {finding} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})",
                "weights in bf16, fp16 or fp32, or in ComfyUI's fp8, int8, nvfp4 or mxfp8",
                f"Name the file that is not quantized{example}: base_model_precision and text_encoder_1_precision "
                "quantize it while it is loaded.",
            )
            for (file, finding), names in self._names.items()
        )


def _metadata_markers(files: tuple[Path, ...], component: Component) -> dict[str, Mapping[str, object]]:
    """Markers of layers' formats in the files' metadata, by layer name without a prefix."""
    markers: dict[str, Mapping[str, object]] = {}
    for file in files:
        text = read_metadata(file).get(QUANTIZATION_METADATA)
        if text is None:
            continue
        try:
            fields = json.loads(text)
            layers = {str(name): dict(marker) for name, marker in fields["layers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise AccessError.of(
                f"{file}: its header's {QUANTIZATION_METADATA} cannot be read",
                "ComfyUI's description of quantized layers",
            ) from None
        markers |= {short: layers[name] for name, short in component_names(layers, component).items()}
    return markers


def _read_marker(entry: TensorEntry) -> Mapping[str, object]:
    """The JSON object in a `comfy_quant` tensor."""
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb") as stream:
        stream.seek(entry.start)
        text = stream.read(min(_MARKER_LIMIT, entry.stop - entry.start))
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise _FormatError("a comfy_quant marker that cannot be read") from None


def _with_format(
    weight: StoredWeight, marker: Mapping[str, object] | None, side_tensors: Mapping[str, TensorEntry]
) -> StoredWeight:
    """`weight` with the format that its marker, `side_tensors` and dtype determine.

    Raises:
        _FormatError: the format is not supported.
    """
    data = weight.data
    format_name = None if marker is None else marker.get("format")
    if format_name is not None and not isinstance(format_name, str):
        raise _FormatError("a marker of quantized weights whose format is not a string")
    if "pre_quant_scale" in side_tensors:
        raise _FormatError("quantized weights whose inputs are scaled (pre_quant_scale)")
    if format_name in ("nvfp4", "mxfp8"):
        return _with_blocks(weight, side_tensors, format_name)
    if format_name == "int8_tensorwise":
        assert marker is not None
        group = _rotated_group(marker)
        if data.dtype != "I8" or (group and data.shape[-1] % group):
            raise _FormatError(f"int8_tensorwise weights as {data.dtype} {list(data.shape)}")
        scaled = _scaled(weight, "int8", side_tensors, None if group else "int8-torchao")
        if not group:
            return scaled
        rotated = partial(_unrotate, "scale" in scaled.parts and math.prod(scaled.parts["scale"].shape) > 1, group)
        return replace(scaled, format="int8-convrot", decode=rotated)
    if format_name is not None and (format_name not in _FP8 or _FP8[format_name] != data.dtype):
        raise _FormatError(
            f"weights in the format {format_name}" + (f" as {data.dtype}" if format_name in _FP8 else "")
        )
    if marker is not None and format_name is None:
        raise _FormatError("a marker of quantized weights without a format")
    if data.dtype in _FP8.values() and "weight_scale_2" not in side_tensors:
        precision = "fp8wo-torchao" if data.dtype == "F8_E4M3" else None
        return _scaled(weight, "fp8", side_tensors, precision)
    if side_tensors.keys() - {"input_scale", "scale_input"}:
        title = _UNSCALED.get(data.dtype, f"weights as {data.dtype}")
        raise _FormatError(f"{title} with scales but no ComfyUI marker")
    return weight


def _scaled(
    weight: StoredWeight, format_name: str, side_tensors: Mapping[str, TensorEntry], precision: str | None
) -> StoredWeight:
    """8-bit weights with one scale, one scale for each row, or no scale."""
    scale = side_tensors.get("weight_scale", side_tensors.get("scale_weight"))
    rows = weight.shape[0] if weight.shape else 1
    if scale is None and format_name == "int8":
        raise _FormatError("int8 weights without scales")
    if scale is not None and (
        scale.dtype not in FLOATING_DTYPES or (scale.shape not in ((rows,), (rows, 1)) and math.prod(scale.shape) != 1)
    ):
        raise _FormatError(f"{format_name} weights with scales as {scale.dtype} {list(scale.shape)}")
    parts = weight.parts if scale is None else {**weight.parts, "scale": scale}
    is_by_row = scale is not None and math.prod(scale.shape) > 1
    return replace(
        weight,
        format=format_name,
        parts=parts,
        decode=partial(_rescale, scale is not None, is_by_row),
        precision=precision if len(weight.shape) == 2 else None,
    )


def _with_blocks(weight: StoredWeight, side_tensors: Mapping[str, TensorEntry], format_name: str) -> StoredWeight:
    """nvfp4 or mxfp8 weights: each block of a row has a scale; scales are tiled in the kernels' layout."""
    data, scale, second = weight.data, side_tensors.get("weight_scale"), side_tensors.get("weight_scale_2")
    is_nvfp4 = format_name == "nvfp4"
    block = _NVFP4_BLOCK if is_nvfp4 else _MXFP8_BLOCK
    expected = ("U8", "F8_E4M3") if is_nvfp4 else ("F8_E4M3", "U8")
    if (
        len(data.shape) != 2
        or scale is None
        or (data.dtype, scale.dtype.replace("F8_E8M0", "U8")) != expected
        or (is_nvfp4 and (second is None or second.dtype != "F32" or math.prod(second.shape) != 1))
    ):
        raise _FormatError(f"{format_name} weights as {data.dtype} {list(data.shape)} with scales that do not match")
    rows, columns = data.shape[0], data.shape[1] * (2 if is_nvfp4 else 1)
    blocks = -(-columns // block)
    tiled = (-(-rows // _ROW_TILE) * _ROW_TILE, -(-blocks // 4) * 4)
    if columns % block or math.prod(scale.shape) != math.prod(tiled):
        raise _FormatError(f"{format_name} weights of {rows} × {columns} with scales {list(scale.shape)}")
    parts = {**weight.parts, "scale": replace(scale, shape=tiled, dtype="F8_E4M3" if is_nvfp4 else "U8")}
    if is_nvfp4 and second is not None:
        parts["scale_2"] = second
    decode = partial(_decode_nvfp4 if is_nvfp4 else _decode_mxfp8, blocks)
    return replace(weight, format=format_name, shape=(rows, columns), parts=parts, decode=decode)


def _rescale(has_scale: bool, is_by_row: bool, read: ReadPart, rows: slice) -> Tensor:
    """Rows q·s: codes times scale."""
    values = read("data", rows).float()
    if not has_scale:
        return values
    scale = read("scale", rows if is_by_row else ALL_ROWS).float()
    return values.mul_(scale.reshape(-1, *[1] * (values.dim() - 1)) if is_by_row else scale.reshape(()))


def _rotated_group(marker: Mapping[str, object]) -> int:
    """Group size of ConvRot's input rotation; 0 without ConvRot."""
    group = marker.get("convrot_groupsize", 256) if marker.get("convrot") else 0
    if not isinstance(group, int) or (group and (group < 4 or 4 ** round(math.log(group, 4)) != group)):
        raise _FormatError(f"int8_tensorwise weights rotated by groups of {group}")
    return group


def _unrotate(is_by_row: bool, group: int, read: ReadPart, rows: slice) -> Tensor:
    """Rows (q·H)·s. H is a Kronecker power of half a 4×4 Hadamard matrix: symmetric and its own inverse.

    The sums of q are exact in fp32, so each value is rounded once.
    """
    quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    data = read("data", rows).float()
    values = data
    for power in range(round(math.log(group, 4))):
        split = values.reshape(-1, 4, 4**power)
        values = torch.einsum("ij,bjk->bik", quarter, split).reshape(data.shape)
    scale = read("scale", rows if is_by_row else ALL_ROWS).float()
    return values.mul_(scale.reshape(-1, 1) if is_by_row else scale.reshape(()))


def _tiles(read: ReadPart, rows: slice, blocks: int) -> Tensor:
    """Block scales of `rows`, [rows, blocks], from 128 × 4 tiles that store rows r, r + 32, r + 64 and r + 96 side by
    side.
    """
    first = rows.start // _ROW_TILE
    tiled = read("scale", slice(first * _ROW_TILE, -(-rows.stop // _ROW_TILE) * _ROW_TILE))
    across = tiled.shape[1] // 4
    flat = tiled.view(torch.uint8).view(-1, across, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(-1, across * 4)
    start = rows.start - first * _ROW_TILE
    return flat[start : start + rows.stop - rows.start, :blocks].contiguous().view(tiled.dtype)


def _decode_nvfp4(blocks: int, read: ReadPart, rows: slice) -> Tensor:
    """4-bit E2M1 values, high bits first, times (tensor scale · block scale)."""
    packed = read("data", rows)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(len(packed), blocks, _NVFP4_BLOCK)
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes.int()]
    scale = read("scale_2", ALL_ROWS).reshape(()) * _tiles(read, rows, blocks).float()
    return values.mul_(scale[..., None]).view(len(packed), -1)


def _decode_mxfp8(blocks: int, read: ReadPart, rows: slice) -> Tensor:
    """Values q·2^(e − 127); e = 255 means NaN."""
    values = read("data", rows).float()
    exponent = _tiles(read, rows, blocks).int()
    scale = (exponent << 23).view(torch.float32)  # the bits of 2^(e − 127), except for e = 0 and e = 255
    scale = scale.masked_fill(exponent == 0, 2.0**-127).masked_fill(exponent == 255, math.nan)
    return values.view(len(values), blocks, _MXFP8_BLOCK).mul_(scale[..., None]).view(len(values), -1)


def native_precisions(
    stored: Mapping[str, StoredWeight], renaming: TensorRenaming, prefixes: tuple[str, ...] = BLOCKS
) -> dict[str, str]:
    """Precisions of Linears that can keep their file's format, by the Linear's name after `renaming`.

    Only Linears whose names start with one of `prefixes` are considered.
    """
    return {
        target.removesuffix(".weight"): weight.precision
        for name, weight in stored.items()
        if weight.precision is not None and (new := renaming(name)) is not None
        for target in new.names
        if target.startswith(prefixes)
    }


class StoredReader:
    """Read stored weights by name. Create it with `open_stored`."""

    def __init__(self, weights: Mapping[str, StoredWeight], is_mapped: bool, files: contextlib.ExitStack) -> None:
        self.weights = weights
        self._is_mapped = is_mapped
        self._files = files
        self._opened: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def values(self, name: str, dtype: torch.dtype | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """Read `rows` of a weight to the CPU, as `dtype`; by default in the file's dtype, or fp32 if it is quantized.

        Quantized weights are decoded a few rows at a time, so little memory is needed besides the result.

        Raises:
            ConfigError: `dtype` is fp16 and cannot represent all values.
        """
        weight = self.weights[name]
        if weight.decode is None:
            tensor = self._read(weight.data, rows, self._is_mapped)
            if dtype is not None:
                check_range(tensor, dtype, name)
            return tensor if dtype is None else tensor.to(dtype)
        start, stop, _ = rows.indices(weight.shape[0])
        result = torch.empty((stop - start, *weight.shape[1:]), dtype=dtype or torch.float32)
        step = max(1, SLICE * weight.shape[0] // max(1, math.prod(weight.shape)) // _ROW_TILE) * _ROW_TILE
        row = start
        while row < stop:
            # Slices end at multiples of `step`, and thus of a tile, even if the first one starts within a tile.
            end = min(stop, (row // step + 1) * step)
            part = weight.decode(lambda part, rows: self._read(weight.parts[part], rows, False), slice(row, end))
            check_range(part, result.dtype, name)
            result[row - start : end - start] = part
            row = end
        return result

    def native_tensors(self, name: str, rows: slice = ALL_ROWS) -> dict[str, Tensor]:
        """Rows of the tensors in which `memory.precision.WeightLayout` holds a weight of this `precision`.

        The weight's `precision` must not be None.
        """
        weight = self.weights[name]
        data = self._read(weight.data, rows, False)
        scale = torch.ones(1)
        if "scale" in weight.parts:
            entry = weight.parts["scale"]
            is_by_row = math.prod(entry.shape) > 1
            scale = self._read(entry, rows if is_by_row else ALL_ROWS, False)
        return {"data": data, "scale": scale.float().reshape(-1, 1).expand(len(data), 1).contiguous()}

    def gathered(self, name: str, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of a weight at the integers in `index`, as `dtype`: [*index.shape, *row shape]. Reads only these."""
        if self._is_mapped and self.weights[name].is_plain:
            return self.values(name)[index].to(dtype)
        rows, inverse = index.unique(return_inverse=True)
        values = [self.values(name, dtype, slice(row, row + 1)) for row in rows.tolist()]
        return torch.cat(values)[inverse]

    def parts(self, name: str, cut: Callable[[Tensor], Sequence[Tensor]]) -> list["StoredRows"]:
        """Split a weight into row ranges, as `cut` splits a tensor by rows. Reads nothing."""
        shape = self.weights[name].shape
        if not shape:
            return [StoredRows(self, name, shape, (ALL_ROWS,))]
        return [StoredRows(self, name, (len(rows), *shape[1:]), _runs(rows)) for rows in cut(torch.arange(shape[0]))]

    def _read(self, entry: TensorEntry, rows: slice, is_mapped: bool) -> Tensor:
        """Read rows of a tensor: a view of the mapped file, or new memory."""
        count = entry.shape[0] if entry.shape else 1
        size = (entry.stop - entry.start) // max(1, count)
        start, stop, _ = rows.indices(count)
        first, length = entry.start + start * size, (stop - start) * size
        with file_errors_reported(entry.file, AccessError, doing="read"):
            if not length:
                data = torch.empty(0, dtype=torch.uint8)
            elif is_mapped:
                data = torch.frombuffer(self._mapped(entry.file), dtype=torch.uint8, count=length, offset=first)
            else:
                data = torch.empty(length, dtype=torch.uint8)
                file = self._file(entry.file)
                file.seek(first)
                if _read_into(file, data.numpy().data) != length:
                    raise AccessError.of(f"{entry.file} ends early", "a complete file", "Get the file again.")
        dtype = _TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            return data.view(stop - start, size)
        return data.view(dtype).view((stop - start, *entry.shape[1:]) if entry.shape else ())

    def _file(self, path: Path) -> BinaryIO:
        """The open file at `path`."""
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(path.open("rb", buffering=0))
        return self._opened[path]

    def _mapped(self, path: Path) -> mmap.mmap:
        """The memory map of the file at `path`."""
        # Tensors keep the mapping alive. It is copy-on-write, since torch requires writable memory.
        if path not in self._maps:
            self._maps[path] = mmap.mmap(self._file(path).fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


@dataclass(frozen=True)
class StoredRows:
    """Rows of a stored weight, not read yet."""

    reader: StoredReader
    name: str
    shape: tuple[int, ...]
    runs: tuple[slice, ...]
    """Ranges of the weight's rows, in order."""

    def __getitem__(self, rows: slice) -> "StoredRows":
        index = torch.cat([torch.arange(run.start, run.stop) for run in self.runs])[rows]
        return replace(self, shape=(len(index), *self.shape[1:]), runs=_runs(index))

    @property
    def weight(self) -> StoredWeight:
        """The weight that the rows belong to."""
        return self.reader.weights[self.name]

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the rows; see `StoredReader.values`."""
        parts = [self.reader.values(self.name, dtype, run) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def native_tensors(self) -> dict[str, Tensor]:
        """Read the rows in their file format; see `StoredReader.native_tensors`."""
        parts = [self.reader.native_tensors(self.name, run) for run in self.runs]
        return parts[0] if len(parts) == 1 else {name: torch.cat([each[name] for each in parts]) for name in parts[0]}


@contextlib.contextmanager
def open_stored(weights: Mapping[str, StoredWeight], *, is_mapped: bool = True) -> Iterator[StoredReader]:
    """Open the files of `weights` for reading. Tensors stay valid after the files are closed.

    Args:
        is_mapped: whether plain tensors are views of the memory-mapped file; otherwise each is read into new memory,
            and no file stays mapped.
    """
    with contextlib.ExitStack() as files:
        yield StoredReader(weights, is_mapped, files)


def _runs(index: Tensor) -> tuple[slice, ...]:
    """Ranges of consecutive numbers in `index`. An empty `index` has one empty range."""
    if not len(index):
        return (slice(0, 0),)
    breaks = [0, *(index.diff() != 1).nonzero().flatten().add(1).tolist(), len(index)]
    return tuple(slice(int(index[first]), int(index[last - 1]) + 1) for first, last in itertools.pairwise(breaks))


def _read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Fill `buffer` from a raw file. Returns the number of bytes read, fewer at the end of the file."""
    filled = 0
    while filled < len(buffer) and (count := file.readinto(buffer[filled:])):  # type: ignore[attr-defined]
        filled += count
    return filled
