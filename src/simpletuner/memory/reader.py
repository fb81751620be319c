"""Files read by a thread into host buffers, one file ahead of its use."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from simpletuner.base.errors import DiskError


@runtime_checkable
class CopyEnd(Protocol):
    """The end of a copy out of a buffer, such as a CUDA event."""

    def synchronize(self) -> None:
        """Wait for it."""


class FileReader:
    """Reads whole files into buffers that take turns: while one content is copied to a device, a thread reads the next
    file into the other buffer. The thread ends with this object, or with the process.

    Args:
        buffers: uint8 tensors in host memory, each as large as the largest file; pinned where copies from them run
            beside the compute.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._copied: list[CopyEnd | None] = [None] * len(buffers)
        """When the copy out of each buffer will be done, and it may be overwritten."""
        self._turn = 0
        """The buffer that is read into next."""
        self._begun: tuple[Path, Future[None]] | None = None
        """The file that is being read into it."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.reads = 0
        """Files that were asked for."""
        self.reads_ahead = 0
        """Of these, begun before they were asked for."""

    def begin(self, file: Path, size: int) -> None:
        """Begin to read the `size` bytes of `file` in the thread. A file that was begun and never asked for is
        forgotten.
        """
        if self._begun is not None:
            if self._begun[0] == file:
                return
            # One that runs is not stopped; the thread reads one file after the other.
            self._begun[1].cancel()
        buffer = self._buffers[self._turn][:size]
        self._begun = file, self._pool.submit(read_file, file, buffer, self._copied[self._turn])

    def content(self, file: Path, size: int) -> Tensor:
        """The `size` bytes of `file`, once they are read. The next call may overwrite them if there is one buffer, the
        one after it if there are two, unless `copy_ends` was called for them.

        Raises:
            DiskError: the file is missing, cannot be read, or has another size.
        """
        self.reads += 1
        self.reads_ahead += self._begun is not None and self._begun[0] == file
        self.begin(file, size)
        assert self._begun is not None
        reading, self._begun = self._begun[1], None
        reading.result()
        buffer = self._buffers[self._turn][:size]
        self._copied[self._turn] = None
        self._turn = (self._turn + 1) % len(self._buffers)
        return buffer

    def copy_ends(self, end: CopyEnd) -> None:
        """Keep what `content` returned last until `end`."""
        self._copied[self._turn - 1] = end


def read_file(file: Path, buffer: Tensor, free_at: CopyEnd | None = None) -> None:
    """Fill `buffer` (uint8, contiguous, in host memory) with `file`, once `free_at` has come.

    Raises:
        DiskError: the file is missing, cannot be read, or has another size than `buffer`.
    """
    if free_at is not None:
        free_at.synchronize()
    content, found = buffer.numpy().data, 0
    try:
        with file.open("rb", buffering=0) as stream:
            while found < len(content) and (count := stream.readinto(content[found:])):
                found += count
            if found == len(content):
                found = os.fstat(stream.fileno()).st_size  # a longer one is another file
    except OSError as error:
        raise _unreadable(file, f"cannot be read: {error.strerror}") from error
    if found != len(content):
        raise _unreadable(file, f"holds {found} bytes in place of {len(content)}")


def _unreadable(file: Path, found: str) -> DiskError:
    return DiskError.of(
        f"{file} {found}",
        remedy="Run the same command again: files of weights that are missing or damaged are written anew. Should the "
        "disk fail again, give another --group_offload_to_disk_path, or leave it out to keep the weights in memory.",
    )
