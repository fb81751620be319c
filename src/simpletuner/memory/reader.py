"""Read files into host buffers in a thread, one file ahead of its use."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from simpletuner.base.errors import DiskError


@runtime_checkable
class CopyEnd(Protocol):
    """An event that marks the end of a copy out of a buffer, such as a CUDA event."""

    def synchronize(self) -> None:
        """Wait until the copy has ended."""


class FileReader:
    """Read whole files into alternating buffers: a thread reads one file while the previous one is copied to a device.

    The thread ends with this object, or with the process.

    Args:
        buffers: uint8 tensors in host memory, each as large as the largest file; pinned if copies from them should
            overlap with compute.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._copy_ends: list[CopyEnd | None] = [None] * len(buffers)
        """End of the last copy out of each buffer; the buffer may be overwritten after it."""
        self._next_buffer = 0
        """Index of the buffer that is filled next."""
        self._pending: tuple[Path, Future[None]] | None = None
        """The file that is being read into that buffer."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.reads = 0
        """Number of calls of `content`."""
        self.reads_ahead = 0
        """Number of calls of `content` for whose file `begin` had been called."""

    def begin(self, file: Path, size: int) -> None:
        """Begin to read the `size` bytes of `file` in the thread. Drops a file that was begun but not requested."""
        if self._pending is not None:
            if self._pending[0] == file:
                return
            # A read that already runs is not stopped; the thread reads the files one by one.
            self._pending[1].cancel()
        buffer = self._buffers[self._next_buffer][:size]
        self._pending = file, self._pool.submit(read_file, file, buffer, self._copy_ends[self._next_buffer])

    def content(self, file: Path, size: int) -> Tensor:
        """Wait for the `size` bytes of `file` and return them, as a view of a buffer.

        With n buffers, the n-th file begun after this one overwrites them. `keep_until` makes it wait for a copy.

        Raises:
            DiskError: the file is missing, cannot be read, or has another size.
        """
        self.reads += 1
        self.reads_ahead += self._pending is not None and self._pending[0] == file
        self.begin(file, size)
        assert self._pending is not None
        reading, self._pending = self._pending[1], None
        reading.result()
        buffer = self._buffers[self._next_buffer][:size]
        self._copy_ends[self._next_buffer] = None
        self._next_buffer = (self._next_buffer + 1) % len(self._buffers)
        return buffer

    def keep_until(self, end: CopyEnd) -> None:
        """Keep the bytes that `content` returned last until `end`."""
        self._copy_ends[self._next_buffer - 1] = end


def read_file(file: Path, buffer: Tensor, free_at: CopyEnd | None = None) -> None:
    """Fill `buffer` (uint8, contiguous, in host memory) with `file`, after waiting for `free_at`.

    Raises:
        DiskError: the file is missing, cannot be read, or has another size than `buffer`.
    """
    if free_at is not None:
        free_at.synchronize()
    content, size = buffer.numpy().data, 0
    try:
        with file.open("rb", buffering=0) as stream:
            while size < len(content) and (count := stream.readinto(content[size:])):
                size += count
            if size == len(content):
                size = os.fstat(stream.fileno()).st_size  # the file may be longer than the buffer
    except OSError as error:
        raise _unreadable(file, f"cannot be read: {error.strerror}") from error
    if size != len(content):
        raise _unreadable(file, f"has {size} bytes instead of {len(content)}")


def _unreadable(file: Path, finding: str) -> DiskError:
    return DiskError.of(
        f"{file} {finding}",
        remedy="Run the same command again: files of weights that are missing or damaged are written again. If the "
        "disk fails again, give another --group_offload_to_disk_path, or leave it out to keep the weights in memory.",
    )
