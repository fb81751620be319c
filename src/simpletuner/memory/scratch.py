"""Tensors put aside between two uses: in memory up to a bound, the others in a file that nothing can leave behind."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from simpletuner.base.files import file_errors_reported


class Scratch:
    """Places for CPU tensors of known shapes, all of type `dtype`. A context manager: at its end they are gone.

    In the order of `shapes`, each is in memory if it fits into what is left of `memory_bytes`; the others share one
    file in `folder`, which has no name there and so vanishes with the process, however that ends. Its space is
    reserved at once: a full disk shows before the work.

    Raises:
        DiskError: no space for the file.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype, memory_bytes: int, folder: Path
    ) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._offsets: dict[int, int] = {}
        self._file: IO[bytes] | None = None
        in_memory = in_file = 0
        for place, shape in enumerate(shapes):
            size = torch.Size(shape).numel() * dtype.itemsize
            if in_memory + size <= memory_bytes:
                in_memory += size
            else:
                self._offsets[place] = in_file
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
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, place: int, tensor: Tensor) -> None:
        """Keep `tensor` in `place`, instead of what was there. One that stays in memory is not copied.

        Raises:
            ValueError: another shape or type than the place has.
            DiskError: the disk failed to keep what it had reserved.
        """
        if tuple(tensor.shape) != tuple(self._shapes[place]) or tensor.dtype != self._dtype:
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} for {self._dtype} {list(self._shapes[place])}")
        if self._file is None or place not in self._offsets:
            self._held[place] = tensor
            return
        left, at = _bytes_of(tensor.contiguous()), self._offsets[place]
        with file_errors_reported(self._folder):
            while left:
                written = os.pwrite(self._file.fileno(), left, at)
                left, at = left[written:], at + written

    def get(self, place: int) -> Tensor:
        """What was put in `place`."""
        if self._file is None or place not in self._offsets:
            return self._held[place]
        tensor = torch.empty(self._shapes[place], dtype=self._dtype)
        left, at = _bytes_of(tensor), self._offsets[place]
        while left:
            read = os.preadv(self._file.fileno(), [left], at)
            left, at = left[read:], at + read
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
