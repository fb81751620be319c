"""safetensors files whose bytes follow from their content."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


def with_sorted_metadata(data: bytes) -> bytes:
    """The safetensors file `data` with the fields of its header's metadata in alphabetical order.

    The library writes them in a random order, so the same tensors would have another hash each time. Format
    (https://github.com/safetensors/safetensors#format): eight bytes of length, little-endian; a JSON header,
    filled up with spaces; the tensors, at places counted from the header's end.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


@dataclass(frozen=True)
class Entry:
    """A tensor on its way into a file."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    data: Callable[[], bytes | memoryview]
    """Gives the bytes, in C order; called when they are written, so one tensor at a time is copied."""


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor. Its bytes follow from its content: wide types first, as the format's
    own library has it so that each lies at a multiple of its width, then by name. It is always a new file: what was
    there may be in use, as a mapped file or under another name.
    """
    order = sorted(entries, key=lambda name: (-_width(entries[name]), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name in order:
        entry = entries[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (at, at + entry.size)}
        at += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(entries[name].data())


def _width(entry: Entry) -> int:
    """Bytes of one number."""
    return entry.size // max(1, math.prod(entry.shape))
