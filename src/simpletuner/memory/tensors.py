"""Write and read safetensors files, tensor by tensor. All other modules use these functions."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import TensorData, write_tensors

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Supported dtypes with their names in safetensors."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes to view the bits of a number, by its size in bytes."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write `tensors`, optionally cast to `dtype`, one by one, so that at most one is copied at a time.

    The same content gives the same bytes.
    """
    write_tensors(path, {name: tensor_data(tensor, dtype) for name, tensor in tensors.items()}, metadata)


def tensor_data(tensor: Tensor, dtype: torch.dtype | None = None) -> TensorData:
    """`tensor`, optionally cast to `dtype`, as data for `base.tensorfile`. It is copied only when it is written."""
    dtype = dtype or tensor.dtype

    def data() -> memoryview:
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data

    return TensorData(DTYPE_NAMES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize, data)


def save_verified(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """`save_tensors`, then read the file back and compare it tensor by tensor.

    Raises:
        DiskError: no space, or the file reads back differently.
    """
    with file_errors_reported(path):
        save_tensors(path, tensors, metadata, dtype)
        with open_tensors(path) as file:
            damaged = [
                name
                for name, tensor in tensors.items()
                if name not in file or not torch.equal(file[name], tensor.to("cpu", dtype))
            ]
            has_others = file.keys() != tensors.keys()
    if damaged or has_others:
        raise DiskError.of(
            f"{path} reads back differently from what was written ({len(damaged)} tensors)",
            remedy="Check the disk, then save again.",
        )


class TensorFile(Mapping[str, Tensor]):
    """The tensors of an open file, by name. Each access reads the tensor to the CPU."""

    def __init__(self, names: Collection[str], metadata: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        self.metadata = metadata
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Its tensors are views of the memory-mapped file and stay valid after the context.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: it is not a safetensors file, or an incomplete one.
    """
    # safetensors reports every file that it cannot open as missing.
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(file.keys(), file.metadata() or {}, file.get_tensor)
    except SafetensorError as error:
        raise unreadable_file_error(path, error) from error


def non_finite_count(tensor: Tensor) -> int:
    """Number of elements of `tensor` that are NaN or infinite; 0 on the meta device. One pass if there are none."""
    # A NaN or infinite element makes the sum non-finite; a sum of finite elements may overflow, so they are counted.
    if tensor.is_meta or not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return 0
    return int(tensor.isfinite().logical_not().sum())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name, as views of the memory-mapped file.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: it is not a safetensors file, or an incomplete one.
    """
    with open_tensors(path) as file:
        return dict(file)


def unreadable_file_error(path: Path, error: Exception) -> CheckpointError:
    """The CheckpointError for a weight file that cannot be read."""
    return CheckpointError.of(f"{path} cannot be read ({error})", "a complete .safetensors file")
