"""Weights as files hold them, plain or quantized: found from headers, and read by rows, decoded or as they are held."""

import contextlib
import importlib
import itertools
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import TensorEntry, read_headers
from simpletuner.flux2.configs import Component
from simpletuner.memory.precision import SLICE, check_range
from simpletuner.memory.tensors import DTYPE_NAMES

ReadPart = Callable[[str, slice], Tensor]
"""Reads these rows of a weight's part into memory of their own. A dtype that torch lacks comes as bytes: [rows, bytes
of a row]."""
DecodeRows = Callable[[ReadPart, slice], Tensor]
"""Returns these rows of a weight in fp32, from its parts."""
WHOLE = slice(None)

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
        """Whether its values are numbers with a point, and not counters or bytes."""
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
        AccessError: a file is damaged, or in a format that cannot be read.
    """
    found: dict[str, StoredWeight] = {}
    for file in files:
        container = _container(file)
        if container is not None:
            found |= container(file)
    plain = tuple(file for file in files if _container(file) is None)
    entries = read_headers(plain)
    for name, own in component_names(entries, component).items():
        found[own] = StoredWeight(name, "plain", entries[name].shape, {"data": entries[name]})
    return found


def _container(file: Path) -> Callable[[Path], Mapping[str, StoredWeight]] | None:
    """Reads the weights of a `file` that is no safetensors file, known by its first bytes. A magic number is a line:
    `b"GGUF": "simpletuner.flux2.gguf_file:gguf_weights"`.
    """
    with file_errors_reported(file, AccessError, doing="read"), file.open("rb") as stream:
        known = _CONTAINERS.get(stream.read(4))
    if known is None:
        return None
    module, _, function = known.partition(":")
    read: Callable[[Path], Mapping[str, StoredWeight]] = getattr(importlib.import_module(module), function)
    return read


_CONTAINERS: Mapping[bytes, str] = {}
"""By the first four bytes: what reads the weights of such a file, as module:function, imported when one is met."""

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


class StoredReader:
    """Reads stored weights by name. Open it with `open_stored`."""

    def __init__(self, weights: Mapping[str, StoredWeight], is_mapped: bool, files: contextlib.ExitStack) -> None:
        self.weights = weights
        self._is_mapped = is_mapped
        self._files = files
        self._opened: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def values(self, name: str, dtype: torch.dtype | None = None, rows: slice = WHOLE) -> Tensor:
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

    def held(self, name: str, rows: slice = WHOLE) -> tuple[str, dict[str, Tensor]] | None:
        """The precision in which the file holds a weight, and these rows of the tensors that `memory.precision.Layout`
        has for it; None for a weight that we hold in no such precision.
        """
        weight = self.weights[name]
        if weight.precision is None:
            return None
        data = self._read(weight.data, rows, False)
        scale = torch.ones(1)
        if "scale" in weight.parts:
            entry = weight.parts["scale"]
            is_by_row = math.prod(entry.shape) > 1
            scale = self._read(entry, rows if is_by_row else WHOLE, False)
        return weight.precision, {"data": data, "scale": scale.float().reshape(-1, 1).expand(len(data), 1).contiguous()}

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
            return [StoredRows(self, name, shape, (WHOLE,))]
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
    def file(self) -> Path:
        return self.reader.weights[self.name].file

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """As `StoredReader.values`."""
        parts = [self.reader.values(self.name, dtype, run) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def held(self) -> tuple[str, dict[str, Tensor]] | None:
        """As `StoredReader.held`."""
        found = [each for run in self.runs if (each := self.reader.held(self.name, run)) is not None]
        if not found:
            return None
        names = found[0][1]
        return found[0][0], {name: torch.cat([fields[name] for _, fields in found]) for name in names}


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
