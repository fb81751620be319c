"""The safetensors format without torch: what a file holds, and files whose bytes follow from their content.

Eight bytes of header length, little-endian; a JSON header, padded with spaces; the tensors, at offsets that count from
the header's end (https://github.com/safetensors/safetensors#format).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import AccessError


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as safetensors spells it, its shape, and which bytes of `file` it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of `file`, by name. No tensor is read.

    Raises:
        AccessError: it is no safetensors file, or not all of one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise _broken(file, f"{size:,} bytes long")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise _broken(file, "not a safetensors file") from None
    header.pop("__metadata__", None)
    entries = {
        name: TensorEntry(
            file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"])
        )
        for name, entry in header.items()
    }
    whole = max((entry.stop for entry in entries.values()), default=8 + length)
    if whole != size:
        raise _broken(file, f"{size:,} bytes long, {whole:,} by its own header")
    return entries


def read_headers(files: tuple[Path, ...]) -> dict[str, TensorEntry]:
    """The tensors of all `files`, by name."""
    return {name: entry for file in files for name, entry in read_header(file).items()}


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


def file_pieces(tensors: Mapping[str, TensorData], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the header, then each tensor.

    The order is fixed, so the bytes follow from the content: metadata by key; wide dtypes first, so that each tensor
    lies at a multiple of its width, then by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].width, name))
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
    """Write a safetensors file, tensor by tensor. It is always a new file: what was there may be in use, as a mapped
    file or under another name.
    """
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.writelines(file_pieces(tensors, metadata))
