"""Tensor files written by all ranks together: each rank writes one file, with whole tensors."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError
from simpletuner.base.files import sha256_file
from simpletuner.base.tensorfile import TensorData, file_order, file_pieces
from simpletuner.memory.shard import Split
from simpletuner.memory.tensors import DTYPE_NAMES, load_tensors, tensor_data
from simpletuner.memory.world import World

_SHARE = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors")
"""End of a share's file name, as Hugging Face's libraries number the shards of a model."""


@dataclass(frozen=True)
class RankTensor:
    """A rank's part of a tensor, with its split."""

    local: Tensor
    split: Split | None = None
    """How the whole tensor is split. None: every rank holds the same whole tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.local.shape) if self.split is None else self.split.shape

    def whole(self, world: World, to: int) -> Tensor | None:
        """The whole tensor on rank `to`; None on the others. All ranks call it."""
        if self.split is not None:
            return self.split.gather(self.local, world, to)
        return self.local if world.rank == to else None


def distribute(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Distribute tensors of `sizes` bytes over `ranks`; returns names by rank.

    Deterministic: the largest first, each to the rank with the fewest bytes. Ranks that get no tensor, always the last
    ones, are left out.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = totals.index(min(totals))
        shares[rank].append(name)
        totals[rank] += sizes[name]
    return [share for share in shares if share]


def share_names(stem: str, count: int) -> list[str]:
    """Names of `count` files: "optimizer-00001-of-00002.safetensors" and so on."""
    return [f"{stem}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def write_shares(
    folder: Path,
    stem: str,
    tensors: Mapping[str, RankTensor],
    metadata: Mapping[str, str],
    world: World,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write `tensors`, optionally cast to `dtype`, into files `stem`-0000k-of-0000n.safetensors of `folder`.

    All ranks call it, with tensors of the same names, shapes and dtypes. Each of the `writing_ranks` writes its share
    and reads it back. A rank needs memory for one gathered tensor at a time.

    Returns:
        The SHA-256 of this rank's file, by file name, if it wrote one; and each tensor's file name, for all ranks.

    Raises:
        OSError: this rank's file cannot be written. The other ranks return normally.
        DiskError: this rank's file reads back differently.
    """
    described = {name: _described(tensor, dtype) for name, tensor in tensors.items()}
    shares = distribute({name: data.size for name, data in described.items()}, world.writing_ranks)
    files = share_names(stem, len(shares))
    owners = {name: rank for rank, share in enumerate(shares) for name in share}
    gathered: dict[str, Tensor] = {}

    def gathered_bytes(name: str) -> Callable[[], bytes | memoryview]:
        return lambda: tensor_data(gathered.pop(name), dtype).data()

    own_tensors = {
        name: TensorData(described[name].dtype, described[name].shape, described[name].size, gathered_bytes(name))
        for name, rank in owners.items()
        if rank == world.rank
    }
    writer = _ShareWriter(folder / files[world.rank]) if own_tensors else None
    pieces = file_pieces(own_tensors, metadata)
    if writer is not None:
        writer.write(pieces)
    # In file order, which is each share's order too. A rank whose disk is full still takes part in every gather.
    for name in file_order(described):
        whole = tensors[name].whole(world, owners[name])
        if whole is not None and writer is not None:
            gathered[name] = whole
            writer.write(pieces)
            gathered.clear()
    hashes = {} if writer is None else {writer.path.name: writer.close()}
    return hashes, {name: files[rank] for name, rank in owners.items()}


def share_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the tensors saved as `stem`, in order: `stem`.safetensors, or the shares of several ranks.

    Raises:
        FileNotFoundError: there are no files.
        CheckpointError: shares are missing.
    """
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    counts = {
        int(match[2])
        for path in folder.glob(f"{stem}-*.safetensors")
        if (match := _SHARE.fullmatch(path.name.removeprefix(stem)))
    }
    if not counts:
        raise FileNotFoundError(f"{single} is missing")
    names = share_names(stem, max(counts))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or len(counts) > 1:
        raise CheckpointError.of(
            f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} holds the shares of two checkpoints",
            f"{names[0]} to {names[-1]}" if missing else "those of one",
        )
    return [folder / name for name in names]


def load_shares(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors saved as `stem` by any number of ranks, by name, as views of memory-mapped files.

    Raises:
        FileNotFoundError: there is no file.
        CheckpointError: files are missing or cannot be read.
    """
    return {name: tensor for path in share_files(folder, stem) for name, tensor in load_tensors(path).items()}


def _described(tensor: RankTensor, dtype: torch.dtype | None) -> TensorData:
    """Dtype, shape and size of the whole tensor in the file, without data."""
    whole = torch.empty(tensor.shape, dtype=tensor.local.dtype, device="meta")
    return TensorData(
        DTYPE_NAMES[dtype or whole.dtype], tensor.shape, whole.numel() * (dtype or whole.dtype).itemsize, bytes
    )


class _ShareWriter:
    """Write a file piece by piece. After an error it writes nothing more, and `close` raises the error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        try:
            self._file = path.open("xb")
        except OSError as error:
            self._error = error

    def write(self, pieces: Iterator[bytes | memoryview]) -> None:
        """Write the next of `pieces`."""
        if self._error is not None:
            return
        try:
            piece = next(pieces)
            self._hash.update(piece)
            self._file.write(piece)
        except OSError as error:
            self._error = error
            with contextlib.suppress(OSError):  # closing flushes the buffer
                self._file.close()

    def close(self) -> str:
        """Close the file, read it back, and return its SHA-256.

        Raises:
            OSError: the file could not be written.
            DiskError: the file reads back differently.
        """
        if self._error is not None:
            raise self._error
        self._file.close()
        digest = sha256_file(self.path)
        if digest != self._hash.hexdigest():
            raise DiskError.of(
                f"{self.path} reads back differently from what was written", remedy="Check the disk, then save again."
            )
        return digest
