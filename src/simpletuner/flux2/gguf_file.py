"""Read headers of GGUF files and decode their blocks, with the `gguf` package of llama.cpp.

Each tensor has its own type. Blocks of quantized tensors never span rows, so any rows can be decoded without the others
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import TensorEntry
from simpletuner.flux2.configs import Component
from simpletuner.flux2.stored import FLOATING_DTYPES, ReadPart, StoredWeight

_ARCHITECTURE = "flux"
_NEWER_TYPE = re.compile(r"\b(\d{1,3})\)? is not a valid GGMLQuantizationType")
"""Error text of a gguf package that is too old for a type, with the type's number. A damaged header would hold a longer
number."""


@dataclass(frozen=True)
class GgufHeader:
    """Content of a GGUF file's header."""

    architecture: str | None
    """`general.architecture`: "flux" for transformers of FLUX.1 and FLUX.2; some programs omit it."""
    tensors: Mapping[str, TensorEntry]
    """Tensors by name; `dtype` is GGUF's type, such as "Q8_0", and `shape` is torch's: (rows, columns)."""


def is_gguf(file: Path) -> bool:
    """Whether `file` begins with GGUF's magic bytes.

    Raises:
        AccessError: `file` cannot be read.
    """
    with file_errors_reported(file, AccessError, doing="read"), file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def read_gguf_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file, without its tensors.

    Raises:
        AccessError: the file is not a complete little-endian GGUF file, or holds an unknown type.
    """
    import gguf

    try:
        with file_errors_reported(file, AccessError, doing="read"):
            reader = gguf.GGUFReader(file)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else str(field.contents())
        tensors = {each.name: _entry(file, each) for each in reader.tensors}
        needed = max((entry.stop for entry in tensors.values()), default=0)
        if needed > len(reader.data):
            raise ValueError(f"{len(reader.data):,} bytes long, at least {needed:,} by its own header")
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        if number := _NEWER_TYPE.search(str(error)):
            raise _unreadable(file, number[1]) from None
        reason = str(error).strip().splitlines()
        raise AccessError.of(
            f"{file} is not a complete GGUF file ({reason[0][:120] if reason else type(error).__name__})",
            "a GGUF file of version 2 or 3",
            "The download may have been interrupted: download the file again.",
        ) from None
    if reader.byte_order != "I":
        raise AccessError.of(f"{file} holds big-endian numbers", "a GGUF file of little-endian numbers")
    unknown = sorted({entry.dtype for entry in tensors.values() if not _is_known(entry.dtype)})
    if unknown:
        raise _unreadable(file, ", ".join(unknown))
    return GgufHeader(architecture, tensors)


def _unreadable(file: Path, types: str) -> AccessError:
    return AccessError.of(
        f"{file} holds tensors of the GGUF type {types}",
        "types that the gguf package can read, such as Q8_0, Q6_K, Q5_K, Q4_K, BF16",
        "Use another file of the same model, or install a newer gguf package.",
    )


def _entry(file: Path, tensor: Any) -> TensorEntry:
    start, size = int(tensor.data_offset), int(tensor.n_bytes)
    shape = tuple(int(side) for side in reversed(tensor.shape))
    return TensorEntry(file, tensor.tensor_type.name, shape, start, start + size)


@functools.cache
def _is_known(type_name: str) -> bool:
    """Whether the package can decode tensors of the type `type_name`."""
    if type_name in FLOATING_DTYPES:
        return True
    try:
        _decoded(np.zeros((1, block_size(type_name)[1]), np.uint8), type_name)
    except NotImplementedError:
        return False
    return True


def block_size(type_name: str) -> tuple[int, int]:
    """Number of weights and bytes in a block of the type `type_name`."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return weights, size


def decoded_rows(rows: UInt8[Tensor, "rows bytes"], type_name: str) -> Float[Tensor, "rows columns"]:
    """Decode whole rows of a tensor of the quantized type `type_name` to fp32.

    Raises:
        NotImplementedError: the package cannot decode this type.
    """
    return torch.from_numpy(_decoded(rows.numpy(), type_name))


def _decoded(rows: Any, type_name: str) -> Any:
    import gguf

    with np.errstate(all="ignore"):  # the check of the weights reports an infinite scale
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name])


def gguf_weights(file: Path, component: Component) -> dict[str, StoredWeight]:
    """The weights of `component` in a GGUF file, by the file's names, without reading them.

    FLUX.2's GGUF files hold transformers only, so other components have no weights.

    Raises:
        AccessError: as `read_gguf_header`, or the file holds another kind of model.
    """
    header = read_gguf_header(file)
    if header.architecture not in (None, _ARCHITECTURE):
        raise AccessError.of(
            f"{file} is a GGUF file of the architecture {header.architecture}",
            f"a FLUX.2 transformer, of the architecture {_ARCHITECTURE}",
            "Text encoders and VAEs are read from .safetensors files.",
        )
    if component != "transformer":
        return {}
    return {name: _stored(name, entry) for name, entry in header.tensors.items()}


def _stored(name: str, entry: TensorEntry) -> StoredWeight:
    if entry.dtype in FLOATING_DTYPES:  # types without blocks, with the same names in safetensors
        return StoredWeight(name, "plain", entry.shape, {"data": entry})

    def decode(read: ReadPart, rows: slice) -> Tensor:
        return decoded_rows(read("data", rows), entry.dtype)

    return StoredWeight(name, entry.dtype, entry.shape, {"data": entry}, decode)
