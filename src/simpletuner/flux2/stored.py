"""Weights as files hold them, plain or quantized: found from headers, and read by rows, decoded or as they are held."""

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
"""Reads these rows of a weight's part into memory of their own. A dtype that torch lacks comes as bytes: [rows, bytes
of a row]."""
DecodeRows = Callable[[ReadPart, slice], Tensor]
"""Returns these rows of a weight in fp32, from its parts."""
ALL_ROWS = slice(None)
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
"""Prefixes of the transformer's Linears that can be held in a precision."""

FLOATING_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of plain weights, as safetensors spells them."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ROW_TILE = 128
"""Rows that are decoded together come in multiples of this, as scales in tiles do."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a file, not yet read."""

    name: str
    """As the file calls it, with the prefix of its component."""
    format: str
    """plain; fp8, int8, int8-convrot, nvfp4, mxfp8; or the type's name in GGUF."""
    shape: tuple[int, ...]
    """Of the values."""
    parts: Mapping[str, TensorEntry]
    """Its tensors in files: `data`, and what a quantized weight has beside it."""
    decode: DecodeRows | None = None
    """None for a plain weight."""
    precision: str | None = None
    """The one of `PRECISIONS` in which a Linear can hold it as it is."""

    @property
    def is_plain(self) -> bool:
        return self.decode is None

    @property
    def is_floating(self) -> bool:
        """Whether its values are floating-point numbers, as those of quantized weights are."""
        return not self.is_plain or self.data.dtype in FLOATING_DTYPES

    @property
    def data(self) -> TensorEntry:
        return self.parts["data"]

    @property
    def file(self) -> Path:
        return self.data.file


def stored_weights(files: Sequence[Path], component: Component = "transformer") -> dict[str, StoredWeight]:
    """The weights of `component` in `files`, by name without the prefix that says whose they are, in the files' order.
    Of an all-in-one checkpoint, those of the other components are left out. No weight is read.

    Raises:
        AccessError: a file is damaged, or holds a format that cannot be read; each format is named.
    """
    from simpletuner.flux2.gguf_file import gguf_weights, is_gguf  # which makes `StoredWeight`s

    plain = tuple(file for file in files if not is_gguf(file))
    found: dict[str, StoredWeight] = {}
    for file in files:
        if file not in plain:
            weights = gguf_weights(file, component)
            found |= {own: weights[name] for name, own in component_names(weights, component).items()}
    return found | safetensors_weights(plain, component)


def check_format(files: tuple[Path, ...], published: str | None = None, component: Component = "transformer") -> None:
    """Raise an AccessError, by headers alone, unless `component` can be read from `files`. The Hub's repository
    `published` has weights that are not quantized.
    """
    weights = stored_weights(files, component)
    refused = _Refused(published)
    for name, weight in weights.items():
        if name.endswith(_BITSANDBYTES):
            refused.add(weight.file, "weights quantized by bitsandbytes", name)
        elif weight.is_plain and name.endswith("weight") and weight.data.dtype in _UNSCALED:
            refused.add(weight.file, f"{_UNSCALED[weight.data.dtype]} without scales", name)
    refused.raise_if_any()


_PREFIXES: Mapping[Component, re.Pattern[str]] = {
    "transformer": re.compile(r"(model\.)?diffusion_model\."),
    "vae": re.compile(r"(vae|first_stage_model)\."),
    "text_encoder": re.compile(r"text_encoders\.\w+\.(transformer\.)?"),
}
"""What stands before a component's names in an all-in-one checkpoint, and in ComfyUI's file of a transformer."""


def component_names(names: Iterable[str], component: Component) -> dict[str, str]:
    """The tensors of `component` among `names` of a file, each with its name without a prefix. Where none has the
    component's prefix, all are.
    """
    names = list(names)
    own = _PREFIXES[component]
    if not any(own.match(name) for name in names):
        return {name: name for name in names}
    others = [pattern for other, pattern in _PREFIXES.items() if other != component]
    return {name: own.sub("", name, count=1) for name in names if not any(each.match(name) for each in others)}


# Formats of safetensors files. Facts: ComfyUI's ops.py and comfy_kitchen's backends/eager/quantization.py.

_UNSCALED = {"I8": "int8 weights", "U8": "4-bit weights (packed into bytes)", "F4": "4-bit weights (fp4)"}
_BITSANDBYTES = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_SIDES = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "comfy_quant",
    "scale_weight",
    "scale_input",
)
"""Last parts of the names of tensors beside a quantized layer's weight. The last two are the older spelling. Scales of
inputs are for activations that are quantized too, and are not read."""
_MARKER = "scaled_fp8"
QUANTIZATION_METADATA = "_quantization_metadata"
"""The field of a file's header that may say the formats of quantized layers."""
_MARKER_LIMIT = 4096
"""Bytes of the JSON text that describes a layer's format."""
_FP8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_NVFP4_BLOCK, _MXFP8_BLOCK = 16, 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def safetensors_weights(files: tuple[Path, ...], component: Component) -> dict[str, StoredWeight]:
    """As `stored_weights`, for safetensors files."""
    entries = read_headers(files)
    names = component_names(entries, component)
    own = {short: entries[name] for name, short in names.items()}
    layers = {short.removesuffix(".weight") for short in own if short.endswith(".weight")}
    sides: dict[str, dict[str, TensorEntry]] = {layer: {} for layer in layers}
    for short, entry in own.items():
        layer, _, last = short.rpartition(".")
        if layer in layers and last in _SIDES:
            sides[layer][last] = entry
    described = _described(files, component)
    refused, found = _Refused(), {}
    for name, short in names.items():
        layer, _, last = short.rpartition(".")
        if short == _MARKER or (layer in layers and last in _SIDES):
            continue
        beside = sides.get(layer, {}) if last == "weight" else {}
        weight = StoredWeight(name, "plain", own[short].shape, {"data": own[short]})
        try:
            about = described.get(layer) if last == "weight" else None
            if "comfy_quant" in beside:
                about = _read_marker(beside["comfy_quant"])
            found[short] = _quantized(weight, about, beside)
        except _FormatError as error:
            refused.add(weight.file, str(error), name)
    refused.raise_if_any()
    return found


class _FormatError(Exception):
    """A format that cannot be read, in words."""


class _Refused:
    """Collects formats that cannot be read, and raises them together."""

    def __init__(self, published: str | None = None) -> None:
        self._published = published
        self._names: dict[tuple[Path, str], list[str]] = {}

    def add(self, file: Path, what: str, name: str) -> None:
        self._names.setdefault((file, what), []).append(name)

    def raise_if_any(self) -> None:
        instead = f", such as that of {self._published}" if self._published else ""
        AccessError.raise_if(
            Problem(
                f"{file} holds {what} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})",
                "weights in bf16, fp16 or fp32, or in ComfyUI's fp8, int8, nvfp4 or mxfp8",
                f"Name the file that is not quantized{instead}: base_model_precision and text_encoder_1_precision "
                "quantize it as it is loaded.",
            )
            for (file, what), names in self._names.items()
        )


def _described(files: tuple[Path, ...], component: Component) -> dict[str, Mapping[str, object]]:
    """What the files' text fields say of the format of layers, by name without a prefix."""
    found: dict[str, Mapping[str, object]] = {}
    for file in files:
        text = read_metadata(file).get(QUANTIZATION_METADATA)
        if text is None:
            continue
        try:
            fields = json.loads(text)
            layers = {str(name): dict(about) for name, about in fields["layers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise AccessError.of(
                f"{file}: its header's {QUANTIZATION_METADATA} cannot be read",
                "ComfyUI's description of quantized layers",
            ) from None
        found |= {short: layers[name] for name, short in component_names(layers, component).items()}
    return found


def _read_marker(entry: TensorEntry) -> Mapping[str, object]:
    """The JSON object in a `comfy_quant` tensor."""
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb") as stream:
        stream.seek(entry.start)
        text = stream.read(min(_MARKER_LIMIT, entry.stop - entry.start))
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise _FormatError("a comfy_quant marker that cannot be read") from None


def _quantized(
    weight: StoredWeight, about: Mapping[str, object] | None, beside: Mapping[str, TensorEntry]
) -> StoredWeight:
    """`weight` with the format that its marker, the tensors `beside` it and its dtype tell.

    Raises:
        _FormatError: that cannot be read.
    """
    data = weight.data
    kind = None if about is None else about.get("format")
    if kind is not None and not isinstance(kind, str):
        raise _FormatError("a marker of quantized weights whose format is not a string")
    if "pre_quant_scale" in beside:
        raise _FormatError("quantized weights whose inputs are scaled (pre_quant_scale)")
    if kind == "nvfp4":
        return _with_blocks(weight, beside, "nvfp4")
    if kind == "mxfp8":
        return _with_blocks(weight, beside, "mxfp8")
    if kind == "int8_tensorwise":
        assert about is not None
        group = _rotated_group(about)
        if data.dtype != "I8" or (group and data.shape[-1] % group):
            raise _FormatError(f"int8_tensorwise weights as {data.dtype} {list(data.shape)}")
        made = _scaled(weight, "int8", beside, None if group else "int8-torchao")
        if not group:
            return made
        rotated = partial(_unrotate, "scale" in made.parts and math.prod(made.parts["scale"].shape) > 1, group)
        return replace(made, format="int8-convrot", decode=rotated)
    if kind is not None and (kind not in _FP8 or _FP8[kind] != data.dtype):
        raise _FormatError(f"weights in the format {kind}" + (f" as {data.dtype}" if kind in _FP8 else ""))
    if about is not None and kind is None:
        raise _FormatError("a marker of quantized weights without a format")
    if data.dtype in _FP8.values() and "weight_scale_2" not in beside:
        held = "fp8wo-torchao" if data.dtype == "F8_E4M3" else None
        return _scaled(weight, "fp8", beside, held)
    if beside.keys() - {"input_scale", "scale_input"}:
        stored = _UNSCALED.get(data.dtype, f"weights as {data.dtype}")
        raise _FormatError(f"{stored} with scales and no marker of ComfyUI's")
    return weight


def _scaled(weight: StoredWeight, kind: str, beside: Mapping[str, TensorEntry], precision: str | None) -> StoredWeight:
    """Numbers of 8 bits with one scale, or one for each row; without any, the numbers themselves."""
    scale = beside.get("weight_scale", beside.get("scale_weight"))
    rows = weight.shape[0] if weight.shape else 1
    if scale is None and kind == "int8":
        raise _FormatError("int8 weights without scales")
    if scale is not None and (
        scale.dtype not in FLOATING_DTYPES or (scale.shape not in ((rows,), (rows, 1)) and math.prod(scale.shape) != 1)
    ):
        raise _FormatError(f"{kind} weights with scales as {scale.dtype} {list(scale.shape)}")
    parts = weight.parts if scale is None else {**weight.parts, "scale": scale}
    is_by_row = scale is not None and math.prod(scale.shape) > 1
    return replace(
        weight,
        format=kind,
        parts=parts,
        decode=partial(_rescale, scale is not None, is_by_row),
        precision=precision if len(weight.shape) == 2 else None,
    )


def _with_blocks(weight: StoredWeight, beside: Mapping[str, TensorEntry], kind: str) -> StoredWeight:
    """nvfp4 or mxfp8: each row's blocks have scales, in tiles as the kernels read them."""
    data, scale, second = weight.data, beside.get("weight_scale"), beside.get("weight_scale_2")
    is_nvfp4 = kind == "nvfp4"
    block = _NVFP4_BLOCK if is_nvfp4 else _MXFP8_BLOCK
    expected = ("U8", "F8_E4M3") if is_nvfp4 else ("F8_E4M3", "U8")
    if (
        len(data.shape) != 2
        or scale is None
        or (data.dtype, scale.dtype.replace("F8_E8M0", "U8")) != expected
        or (is_nvfp4 and (second is None or second.dtype != "F32" or math.prod(second.shape) != 1))
    ):
        raise _FormatError(f"{kind} weights as {data.dtype} {list(data.shape)} with other scales than it has")
    rows, columns = data.shape[0], data.shape[1] * (2 if is_nvfp4 else 1)
    blocks = -(-columns // block)
    tiled = (-(-rows // _ROW_TILE) * _ROW_TILE, -(-blocks // 4) * 4)
    if columns % block or math.prod(scale.shape) != math.prod(tiled):
        raise _FormatError(f"{kind} weights of {rows} × {columns} with scales {list(scale.shape)}")
    parts = {**weight.parts, "scale": replace(scale, shape=tiled, dtype="F8_E4M3" if is_nvfp4 else "U8")}
    if is_nvfp4 and second is not None:
        parts["scale_2"] = second
    decode = partial(_decode_nvfp4 if is_nvfp4 else _decode_mxfp8, blocks)
    return replace(weight, format=kind, shape=(rows, columns), parts=parts, decode=decode)


def _rescale(has_scale: bool, is_by_row: bool, read: ReadPart, rows: slice) -> Tensor:
    """q·s."""
    values = read("data", rows).float()
    if not has_scale:
        return values
    scale = read("scale", rows if is_by_row else ALL_ROWS).float()
    return values.mul_(scale.reshape(-1, *[1] * (values.dim() - 1)) if is_by_row else scale.reshape(()))


def _rotated_group(about: Mapping[str, object]) -> int:
    """Inputs that ConvRot rotates together; 0 without it."""
    group = about.get("convrot_groupsize", 256) if about.get("convrot") else 0
    if not isinstance(group, int) or (group and (group < 4 or 4 ** round(math.log(group, 4)) != group)):
        raise _FormatError(f"int8_tensorwise weights rotated by groups of {group}")
    return group


def _unrotate(is_by_row: bool, group: int, read: ReadPart, rows: slice) -> Tensor:
    """(q·H)·s with H the ⊗ⁿ of a 4×4 Hadamard matrix / 2, which is symmetric and its own inverse. The sums of q are
    exact in fp32, so that each value is rounded once.
    """
    quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    data = read("data", rows).float()
    values = data
    for place in range(round(math.log(group, 4))):
        split = values.reshape(-1, 4, 4**place)
        values = torch.einsum("ij,bjk->bik", quarter, split).reshape(data.shape)
    scale = read("scale", rows if is_by_row else ALL_ROWS).float()
    return values.mul_(scale.reshape(-1, 1) if is_by_row else scale.reshape(()))


def _tiles(read: ReadPart, rows: slice, blocks: int) -> Tensor:
    """These rows of block scales, [rows, blocks], from tiles of 128 × 4 of which each holds rows r, r + 32, r + 64 and
    r + 96 side by side.
    """
    first = rows.start // _ROW_TILE
    tiled = read("scale", slice(first * _ROW_TILE, -(-rows.stop // _ROW_TILE) * _ROW_TILE))
    across = tiled.shape[1] // 4
    flat = tiled.view(torch.uint8).view(-1, across, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(-1, across * 4)
    start = rows.start - first * _ROW_TILE
    return flat[start : start + rows.stop - rows.start, :blocks].contiguous().view(tiled.dtype)


def _decode_nvfp4(blocks: int, read: ReadPart, rows: slice) -> Tensor:
    """E2M1 of 4 bits, the high ones first, times (the tensor's scale · the block's)."""
    packed = read("data", rows)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(len(packed), blocks, _NVFP4_BLOCK)
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes.int()]
    scale = read("scale_2", ALL_ROWS).reshape(()) * _tiles(read, rows, blocks).float()
    return values.mul_(scale[..., None]).view(len(packed), -1)


def _decode_mxfp8(blocks: int, read: ReadPart, rows: slice) -> Tensor:
    """q·2^(e − 127); an e of 255 means not a number."""
    values = read("data", rows).float()
    exponent = _tiles(read, rows, blocks).int()
    scale = (exponent << 23).view(torch.float32)  # the bits of 2^(e − 127), but for the ends
    scale = scale.masked_fill(exponent == 0, 2.0**-127).masked_fill(exponent == 255, math.nan)
    return values.view(len(values), blocks, _MXFP8_BLOCK).mul_(scale[..., None]).view(len(values), -1)


def held_precisions(
    stored: Mapping[str, StoredWeight], renaming: TensorRenaming, within: tuple[str, ...] = BLOCKS
) -> dict[str, str]:
    """The precision in which each Linear can be held as its file has it, by the name that `renaming` leads to, of those
    that begin with one of `within`.
    """
    return {
        target.removesuffix(".weight"): weight.precision
        for name, weight in stored.items()
        if weight.precision is not None and (new := renaming(name)) is not None
        for target in new.names
        if target.startswith(within)
    }


class StoredReader:
    """Reads stored weights by name. Open it with `open_stored`."""

    def __init__(self, weights: Mapping[str, StoredWeight], is_mapped: bool, files: contextlib.ExitStack) -> None:
        self.weights = weights
        self._is_mapped = is_mapped
        self._files = files
        self._opened: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def values(self, name: str, dtype: torch.dtype | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """The weight, or some rows of it, on the CPU as `dtype`: by default a plain one as the file has it, a quantized
        one in fp32. It is decoded some rows at a time, so that little is in memory beside the result.

        Raises:
            ConfigError: `dtype` is fp16 and does not hold all values.
        """
        weight = self.weights[name]
        if weight.decode is None:
            tensor = self._read(weight.data, rows, self._is_mapped)
            if dtype is not None:
                check_range(tensor, dtype, name)
            return tensor if dtype is None else tensor.to(dtype)
        start, stop, _ = rows.indices(weight.shape[0])
        made = torch.empty((stop - start, *weight.shape[1:]), dtype=dtype or torch.float32)
        step = max(1, SLICE * weight.shape[0] // max(1, math.prod(weight.shape)) // _ROW_TILE) * _ROW_TILE
        at = start
        while at < stop:
            # Slices end at multiples of the tile, wherever the first one begins.
            end = min(stop, (at // step + 1) * step)
            part = weight.decode(lambda part, rows: self._read(weight.parts[part], rows, False), slice(at, end))
            check_range(part, made.dtype, name)
            made[at - start : end - start] = part
            at = end
        return made

    def held(self, name: str, rows: slice = ALL_ROWS) -> dict[str, Tensor]:
        """These rows of the tensors that `memory.precision.Layout` has for a weight in its `precision`, which is not
        None.
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
        """The rows of an integer tensor `index`, as `dtype`: its shape, then a row's. Only these are read."""
        if self._is_mapped and self.weights[name].is_plain:
            return self.values(name)[index].to(dtype)
        rows, places = index.unique(return_inverse=True)
        values = [self.values(name, dtype, slice(row, row + 1)) for row in rows.tolist()]
        return torch.cat(values)[places]

    def parts(self, name: str, cut: Callable[[Tensor], Sequence[Tensor]]) -> list["StoredRows"]:
        """The weight cut into parts, as `cut` cuts a tensor by rows. None is read yet."""
        shape = self.weights[name].shape
        if not shape:
            return [StoredRows(self, name, shape, (ALL_ROWS,))]
        return [StoredRows(self, name, (len(own), *shape[1:]), _runs(own)) for own in cut(torch.arange(shape[0]))]

    def _read(self, entry: TensorEntry, rows: slice, is_mapped: bool) -> Tensor:
        """Rows of a tensor: a part of the mapped file, or in memory of their own."""
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
                    raise AccessError.of(f"{entry.file} ends early", "a file that is whole", "Get the file again.")
        dtype = _TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            return data.view(stop - start, size)
        return data.view(dtype).view((stop - start, *entry.shape[1:]) if entry.shape else ())

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(path.open("rb", buffering=0))
        return self._opened[path]

    def _mapped(self, path: Path) -> mmap.mmap:
        # Tensors keep the mapping for as long as they need it. A private copy, since torch wants writable memory.
        if path not in self._maps:
            self._maps[path] = mmap.mmap(self._file(path).fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


@dataclass(frozen=True)
class StoredRows:
    """Some rows of a stored weight, not yet read."""

    reader: StoredReader
    name: str
    shape: tuple[int, ...]
    runs: tuple[slice, ...]
    """Of the weight's rows, in order."""

    def __getitem__(self, rows: slice) -> "StoredRows":
        index = torch.cat([torch.arange(run.start, run.stop) for run in self.runs])[rows]
        return replace(self, shape=(len(index), *self.shape[1:]), runs=_runs(index))

    @property
    def weight(self) -> StoredWeight:
        return self.reader.weights[self.name]

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """As `StoredReader.values`."""
        parts = [self.reader.values(self.name, dtype, run) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def held(self) -> dict[str, Tensor]:
        """As `StoredReader.held`."""
        found = [self.reader.held(self.name, run) for run in self.runs]
        return found[0] if len(found) == 1 else {name: torch.cat([each[name] for each in found]) for name in found[0]}


@contextlib.contextmanager
def open_stored(weights: Mapping[str, StoredWeight], *, is_mapped: bool = True) -> Iterator[StoredReader]:
    """Open the files of `weights`. Tensors outlive it.

    Args:
        is_mapped: whether plain tensors are parts of the mapped file; otherwise each is read into memory of its own,
            and the file takes none beside it.
    """
    with contextlib.ExitStack() as files:
        yield StoredReader(weights, is_mapped, files)


def _runs(index: Tensor) -> tuple[slice, ...]:
    """The runs of successive numbers in `index`; of an empty one, one without a row."""
    if not len(index):
        return (slice(0, 0),)
    breaks = [0, *(index.diff() != 1).nonzero().flatten().add(1).tolist(), len(index)]
    return tuple(slice(int(index[first]), int(index[last - 1]) + 1) for first, last in itertools.pairwise(breaks))


def _read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Fill `buffer` from a raw file; returns the bytes that came."""
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):  # type: ignore[attr-defined]
        done += count
    return done
