"""What is written is what the format's own library writes and reads; what is damaged is named."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError
from simpletuner.base.tensorfile import read_header
from simpletuner.memory import tensors as tensors_module
from simpletuner.memory.tensors import (
    DTYPE_NAMES,
    load_tensors,
    open_tensors,
    save_tensors,
    save_verified,
)

TENSORS = {"b": torch.tensor([[1 / 3, -0.0]]), "a": torch.tensor([2.0])}


def many() -> dict[str, Tensor]:
    """A tensor of every dtype, and of every kind of shape."""
    tensors = {name: torch.ones(2, 3).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.arange(6.0).reshape(2, 3).T}
    tensors["shared"] = tensors["turned"]
    return tensors


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"simpletuner": '{"length": 512, "ä": "\\n"}'}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str]) -> None:
    tensors = {
        "rows": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
        "pad": torch.ones(4, dtype=torch.bfloat16),
        "length": torch.tensor(512),
        "ä": torch.arange(3, dtype=torch.int8),
    }
    save_tensors(tmp_path / "file", tensors, metadata)
    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors, metadata)


def test_the_order_of_tensors_and_metadata_changes_no_byte(tmp_path: Path) -> None:
    tensors, metadata = many(), {letter: f'{letter} "quoted" é\n' for letter in "qwertyuiop"}
    save_tensors(tmp_path / "one", tensors, metadata)
    save_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tensors_of_every_type_and_shape_come_back(tmp_path: Path) -> None:
    tensors = many()
    save_tensors(tmp_path / "file", tensors, {"format": "pt"})
    with open_tensors(tmp_path / "file") as file:
        assert file.metadata == {"format": "pt"}
        assert "nothing" not in file
        with pytest.raises(KeyError):
            file["nothing"]
        found = dict(file)
    for read in (found, load_file(tmp_path / "file")):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].float(), tensor.float())
    assert {name: entry.shape for name, entry in read_header(tmp_path / "file").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_half_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"file cannot be read \(.+\): expected a complete \.safetensors file"):
        load_tensors(path)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing")


def test_a_disk_that_gives_back_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(path: Path, tensors: Mapping[str, Tensor], *rest: object) -> None:
        save_tensors(path, {name: tensor + 1 for name, tensor in tensors.items()}, *rest)  # type: ignore[arg-type]

    save_verified(tmp_path / "sound", TENSORS, {}, torch.bfloat16)
    monkeypatch.setattr(tensors_module, "save_tensors", spoilt)
    with pytest.raises(DiskError, match=r"spoilt reads back differently .*2 tensors"):
        save_verified(tmp_path / "spoilt", TENSORS, {})
