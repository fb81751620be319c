"""Scratch storage for tensors: in host memory up to a limit, beyond it in an unnamed temporary file."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from simpletuner.base.files import file_errors_reported


class Scratch:
    """Storage for CPU tensors of known shapes, all in `dtype`. A context manager that discards them on exit.

    In the order of `shapes`, a tensor is kept in memory if it still fits into `memory_bytes`. The others share one
    file in `folder` that has no name, so it vanishes with the process. Its space is reserved at once, so that a full
    disk is noticed before the work begins.

    Raises:
        DiskError: no space for the file.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype, memory_bytes: int, folder: Path
    ) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._folder = folder
        self._tensors: dict[int, Tensor] = {}
        self._offsets: dict[int, int] = {}
        self._file: IO[bytes] | None = None
        in_memory = in_file = 0
        for index, shape in enumerate(shapes):
            size = torch.Size(shape).numel() * dtype.itemsize
            if in_memory + size <= memory_bytes:
                in_memory += size
            else:
                self._offsets[index] = in_file
                in_file += size
        self.file_bytes = in_file
        """Size of the file; 0 without one."""
        if in_file:
            with file_errors_reported(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by __exit__
                try:
                    os.posix_fallocate(self._file.fileno(), 0, in_file)
                except OSError:
                    self._file.close()
                    raise

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def put(self, index: int, tensor: Tensor) -> None:
        """Store `tensor` at `index`, replacing the former one. In memory it is not copied.

        Raises:
            ValueError: shape or dtype differ from those of `shapes`.
            DiskError: the disk could not write to the reserved space.
        """
        if tuple(tensor.shape) != tuple(self._shapes[index]) or tensor.dtype != self._dtype:
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} for {self._dtype} {list(self._shapes[index])}")
        if self._file is None or index not in self._offsets:
            self._tensors[index] = tensor
            return
        remaining, offset = _bytes_of(tensor.contiguous()), self._offsets[index]
        with file_errors_reported(self._folder):
            while remaining:
                written = os.pwrite(self._file.fileno(), remaining, offset)
                remaining, offset = remaining[written:], offset + written

    def get(self, index: int) -> Tensor:
        """The tensor at `index`."""
        if self._file is None or index not in self._offsets:
            return self._tensors[index]
        tensor = torch.empty(self._shapes[index], dtype=self._dtype)
        remaining, offset = _bytes_of(tensor), self._offsets[index]
        while remaining:
            read = os.preadv(self._file.fileno(), [remaining], offset)
            remaining, offset = remaining[read:], offset + read
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
