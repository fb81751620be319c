"""Tensors that are split by rows, and the files that ranks write together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.file_faults import files_of_at_most
from tests.ranks import in_ranks

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import sha256_file
from simpletuner.memory.shard import RowSplit
from simpletuner.memory.shares import RankTensor, distribute, load_shares, share_files, share_names, write_shares
from simpletuner.memory.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_row_is_on_one_rank_as_fsdp_puts_it(rows: int, ranks: int) -> None:
    whole = torch.arange(rows * 4).view(rows, 2, 2)
    splits = [RowSplit((rows, 2, 2), rank, ranks) for rank in range(ranks)]
    parts = [split.of(whole) for split in splits]
    chunks = torch.chunk(whole, ranks)  # as FSDP2 does
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=False))
    assert torch.equal(torch.cat(parts), whole)
    assert [tuple(part.shape) for part in parts] == [split.local_shape for split in splits]
    pairs = [(part, split) for part, split in zip(parts, splits, strict=True) if part.numel()]
    assert all(part.flatten()[0] == 4 * split.rows.start == split.first_element for part, split in pairs)


def test_shares_are_even_and_the_same_on_every_rank() -> None:
    sizes = {"a": 10, "b": 7, "c": 5, "d": 4, "e": 0}
    assert distribute(sizes, 2) == [["a", "d"], ["b", "c", "e"]]
    assert distribute(dict(reversed(sizes.items())), 2) == distribute(sizes, 2)
    assert distribute({"a": 1}, 3) == [["a"]]
    assert distribute({}, 2) == []


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.tensor([1.5, -0.0, float("nan")]),
        "narrow": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }
    shared = {name: RankTensor(tensor) for name, tensor in tensors.items()}
    hashes, files = write_shares(tmp_path, "state", shared, {"format": "pt"}, ALONE)
    (file,) = share_files(tmp_path, "state")
    assert hashes.keys() == {file.name} == set(files.values()) == set(share_names("state", 1))
    for name, tensor in load_shares(tmp_path, "state").items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8))


def test_missing_shares_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors is missing"):
        share_files(tmp_path, "state")
    (tmp_path / "state-00002-of-00003.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"lacks state-00001-of-00003\.safetensors, state-00003-of-00003"):
        share_files(tmp_path, "state")
    for name in (*share_names("state", 3), "state-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="two checkpoints"):
        share_files(tmp_path, "state")


def write_together(world: World, folder: str) -> list[Any]:
    """Write split and replicated tensors by all ranks; the second time the disk of the last rank is full."""
    wholes = {"odd": torch.arange(15.0).view(5, 3), "large": torch.randn(8, 500), "none": torch.ones(1, 2).bfloat16()}
    splits = {name: RowSplit(tuple(whole.shape), world.rank, world.size) for name, whole in wholes.items()}
    shared = {name: RankTensor(splits[name].of(whole), splits[name]) for name, whole in wholes.items()}
    shared["replica"] = RankTensor(torch.tensor(2.0))
    hashes, _ = write_shares(Path(folder), "state", shared, {}, world)
    with files_of_at_most(100 if world.rank == world.size - 1 else 2**20):
        try:
            write_shares(Path(folder), "full", shared, {}, world)
        except OSError as error:
            return [hashes, str(error)]
    return [hashes, ""]


@pytest.mark.slow
def test_ranks_write_whole_tensors_together(tmp_path: Path) -> None:
    (first, no_error), (second, error) = in_ranks(2, write_together, str(tmp_path))
    tensors = load_shares(tmp_path, "state")
    assert torch.equal(tensors["odd"], torch.arange(15.0).view(5, 3))
    assert torch.equal(tensors["none"], torch.ones(1, 2).bfloat16())
    assert tensors["replica"] == 2.0
    assert tensors["large"].shape == (8, 500)
    assert {**first, **second} == {path.name: sha256_file(path) for path in share_files(tmp_path, "state")}
    assert no_error == ""
    assert "File too large" in error
