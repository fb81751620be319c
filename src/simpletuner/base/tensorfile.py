"""The safetensors format without torch: what a file holds, and files whose bytes follow from their content.

Eight bytes of header length, little-endian; a JSON header, padded with spaces; the tensors, at offsets that count from
the header's end (https://github.com/safetensors/safetensors#format).
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
    """One tensor of a file: its dtype as safetensors spells it, its shape, and which bytes of `file` it is."""

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
"""Bits of one number, by the dtype's name in safetensors."""

WEIGHT_FILES = (".safetensors", ".gguf")
"""How the name of a single file of weights ends."""

HEADER_LIMIT = 100_000_000
"""Bytes of a header above which safetensors refuses a file."""

_OTHER_CONTAINERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a pickle of PyTorch's (.pt, .pth, .ckpt, .bin)",
    b"\x80\x02": "a pickle of PyTorch's (.pt, .pth, .ckpt, .bin)",
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for",
}
"""What a file is that starts with these bytes."""


def is_weight_file(name: str) -> bool:
    """Whether the value of a model option names a single file of weights, by how it ends."""
    return name.lower().endswith(WEIGHT_FILES)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of `file`, by name. No tensor is read.

    Raises:
        AccessError: it is no safetensors file, or not all of one, or cannot be read.
    """
    header, data_start = _parsed_header(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    size = file.stat().st_size
    whole = max((entry.stop for entry in entries.values()), default=data_start)
    if whole != size:
        raise _broken(file, f"{size:,} bytes long, {whole:,} by its own header")
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """The text fields of a safetensors file's header; those that are no text are left out.

    Raises:
        AccessError: as `read_header`.
    """
    metadata = _parsed_header(file)[0].get("__metadata__")
    fields = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in fields if isinstance(value, str)}


def read_headers(files: tuple[Path, ...]) -> dict[str, TensorEntry]:
    """The tensors of all `files`, by name.

    Raises:
        AccessError: as `read_header`, or two files hold a tensor of one name.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise AccessError.of(
                    f"{file} and {entries[name].file.name} both hold the tensor {name}",
                    "each tensor in one file",
                    "Files of two downloads may lie in one folder: get the folder again.",
                )
            entries[name] = entry
    return entries


def _parsed_header(file: Path) -> tuple[dict[str, object], int]:
    """The header's JSON object, and the position at which the tensors begin."""
    with file_errors_reported(file, AccessError, doing="read"):
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(32)
            length = int.from_bytes(first[:8], "little")
            has_length = 2 <= length <= min(size - 8, HEADER_LIMIT)
            # A length such as 640 begins with a pickle's magic bytes; the JSON object behind it tells them apart.
            is_safetensors = has_length and first[8:9] == b"{"
            for magic, container in _OTHER_CONTAINERS.items():
                if first.startswith(magic) and not is_safetensors:
                    raise AccessError.of(
                        f"{file} is {container}",
                        "a .safetensors file in bf16, fp16 or fp32",
                        "Take the model's .safetensors file instead.",
                    )
            if not has_length:
                raise _broken(file, f"{size:,} bytes long and begins with no safetensors header")
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
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _entry(file: Path, name: str, value: object, data_start: int) -> TensorEntry:
    """The header's `value` for the tensor `name`, checked."""
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
    raise _broken(file, f"damaged: its header says of {name} {str(value)[:120]}")


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _broken(file: Path, what: str) -> AccessError:
    return AccessError.of(
        f"{file} is {what}",
        "a whole .safetensors file",
        "A download may have broken off: get the file again.",
    )


@dataclass(frozen=True)
class TensorData:
    """A tensor that is to be written."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    data: Callable[[], bytes | memoryview]
    """Returns the bytes, in C order; called when they are written, so one tensor at a time is copied."""

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return self.size // max(1, math.prod(self.shape))


def file_order(tensors: Mapping[str, TensorData]) -> list[str]:
    """The names of `tensors` as they lie in a file: wide dtypes first, so that each tensor lies at a multiple of its
    width, then by name.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].width, name))


def file_pieces(tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the header, then each tensor in `file_order`.

    The order is fixed, so the bytes follow from the content: metadata by key, and tensors.
    """
    order = file_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (at, at + tensor.size)}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].data()


def write_tensors(path: Path, tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor. It is a new file: what was there may be in use, as a mapped file or
    under another name. Only an empty one is filled, since `locked_part` makes it and holds its lock.
    """
    if path.exists() and path.stat().st_size:
        path.unlink()
    with path.open("wb") as file:
        file.writelines(file_pieces(tensors, metadata))


def write_verified(path: Path, tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file piece by piece, and compare its hash with that of what was written. No more than one
    tensor is in memory.

    Raises:
        DiskError: it reads back differently.
    """
    written = hashlib.sha256()
    with path.open("wb") as file:
        for piece in file_pieces(tensors, metadata):
            written.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if sha256_file(path) != written.hexdigest():
        raise DiskError.of(f"{path} reads back differently from what was written", remedy="Check the disk, try again.")
