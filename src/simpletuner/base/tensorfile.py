"""The safetensors format without torch: read headers, and write files with deterministic bytes.

A file has eight bytes of header length, little-endian; a JSON header, padded with spaces; and the tensors, at offsets
from the header's end (https://github.com/safetensors/safetensors#format).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.files import file_errors_reported, sha256_file


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its dtype as safetensors spells it, its shape, and its byte range in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


DTYPE_BITS: Mapping[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
"""Bits per element, by the dtype's name in safetensors."""

WEIGHT_FILES = (".safetensors", ".gguf")
"""Suffixes of single weight files."""

HEADER_LIMIT = 100_000_000
"""Maximum header size in bytes that safetensors accepts."""

_OTHER_CONTAINERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a PyTorch pickle (.pt, .pth, .ckpt, .bin)",
    b"\x80\x02": "a PyTorch pickle (.pt, .pth, .ckpt, .bin)",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
"""Descriptions of other file types, by their first bytes."""


def is_weight_file(name: str) -> bool:
    """Whether the value of a model option names a single weight file, by its suffix."""
    return name.lower().endswith(WEIGHT_FILES)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The entries of the tensors in `file`, by name. No tensor is read.

    Raises:
        AccessError: the file is not a safetensors file, is incomplete, or cannot be read.
    """
    header, data_start = _parsed_header(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    size = file.stat().st_size
    expected_size = max((entry.stop for entry in entries.values()), default=data_start)
    if expected_size != size:
        raise _broken(file, f"{size:,} bytes long, {expected_size:,} by its own header")
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file's header. Values that are not text are left out.

    Raises:
        AccessError: as `read_header`.
    """
    metadata = _parsed_header(file)[0].get("__metadata__")
    fields = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in fields if isinstance(value, str)}


def read_headers(files: tuple[Path, ...]) -> dict[str, TensorEntry]:
    """The entries of the tensors in all `files`, by name.

    Raises:
        AccessError: as `read_header`, or two files have a tensor of the same name.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise AccessError.of(
                    f"{file} and {entries[name].file.name} both have the tensor {name}",
                    "each tensor in one file",
                    "The folder may have files of two downloads: download it again.",
                )
            entries[name] = entry
    return entries


def _parsed_header(file: Path) -> tuple[dict[str, object], int]:
    """The header's JSON object, and the file offset of the first tensor."""
    with file_errors_reported(file, AccessError, doing="read"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(32)
            length = int.from_bytes(first[:8], "little")
            has_length = 2 <= length <= min(size - 8, HEADER_LIMIT)
            # A length such as 640 has the first bytes of a pickle; the "{" after it distinguishes them.
            is_safetensors = has_length and first[8:9] == b"{"
            for magic, container in _OTHER_CONTAINERS.items():
                if first.startswith(magic) and not is_safetensors:
                    raise AccessError.of(
                        f"{file} is {container}",
                        "a .safetensors file in bf16, fp16 or fp32",
                        "Use the model's .safetensors file instead.",
                    )
            if not has_length:
                raise _broken(file, f"{size:,} bytes long and has no safetensors header")
            stream.seek(8)
            text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _broken(file, "not a safetensors file") from None
    if not isinstance(header, dict):
        raise _broken(file, "not a safetensors file")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _entry(file: Path, name: str, value: object, data_start: int) -> TensorEntry:
    """Check the header's `value` for the tensor `name`, and make its entry."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        isinstance(dtype, str)
        and _are_counts(shape)
        and _are_counts(offsets)
        and len(offsets) == 2
        and offsets[0] <= offsets[1]
        and (dtype not in DTYPE_BITS or math.prod(shape) * DTYPE_BITS[dtype] == 8 * (offsets[1] - offsets[0]))
    ):
        return TensorEntry(file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    raise _broken(file, f"damaged: its header entry for {name} is {str(value)[:120]}")


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers in [0, 2**63)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _broken(file: Path, finding: str) -> AccessError:
    return AccessError.of(
        f"{file} is {finding}",
        "a complete .safetensors file",
        "The download may have been interrupted: download the file again.",
    )


@dataclass(frozen=True)
class TensorData:
    """A tensor to be written."""

    dtype: str
    """The dtype as safetensors spells it."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    data: Callable[[], bytes | memoryview]
    """Returns the bytes in C order. Called when they are written, so that only one tensor is copied at a time."""

    @property
    def width(self) -> int:
        """Bytes per element."""
        return self.size // max(1, math.prod(self.shape))


def file_order(tensors: Mapping[str, TensorData]) -> list[str]:
    """The names of `tensors` in the order of the file: wide dtypes first, then by name.

    So each tensor's offset is a multiple of its width.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].width, name))


def file_pieces(tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the header, then each tensor in `file_order`.

    Metadata is sorted by key and the order of tensors is fixed, so equal content gives equal bytes.
    """
    order = file_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, offset + tensor.size)}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].data()


def write_tensors(path: Path, tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor.

    A file with content at `path` is replaced, not overwritten: it may be memory-mapped or hard-linked. An empty file
    is filled in place, because `locked_part` has created and locked it.
    """
    if path.exists() and path.stat().st_size:
        path.unlink()
    with path.open("wb") as file:
        file.writelines(file_pieces(tensors, metadata))


def write_verified(path: Path, tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file piece by piece, then read it back and compare the hash.

    At most one tensor is in memory.

    Raises:
        DiskError: the file reads back differently.
    """
    written = hashlib.sha256()
    with path.open("wb") as file:
        for piece in file_pieces(tensors, metadata):
            written.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if sha256_file(path) != written.hexdigest():
        raise DiskError.of(
            f"{path} reads back differently from what was written", remedy="Check the disk, then try again."
        )
