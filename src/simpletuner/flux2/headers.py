"""What a safetensors file holds, read from its first bytes: no weights are loaded, no torch is needed."""

import json
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import AccessError


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type as safetensors spells it, its shape, and which bytes of `file` it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of `file`, by name.

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
