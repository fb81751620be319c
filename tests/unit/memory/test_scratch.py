"""Tensors that are put aside come back as they were, from memory and from the file."""

import errno
import os
from pathlib import Path

import pytest
import torch

from simpletuner.base.errors import DiskError
from simpletuner.memory.scratch import Scratch

SHAPES = [(2, 3), (4,), (1, 2, 2), (5,)]
BYTES = [12, 8, 8, 10]


def tensors(seed: int = 0) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws).bfloat16() for shape in SHAPES]


@pytest.mark.parametrize(("memory_bytes", "file_bytes"), [(38, 0), (37, 10), (20, 18), (11, 30), (0, 38)])
def test_what_comes_back_is_what_was_put(tmp_path: Path, memory_bytes: int, file_bytes: int) -> None:
    with Scratch(SHAPES, dtype=torch.bfloat16, memory_bytes=memory_bytes, folder=tmp_path / "new") as scratch:
        assert scratch.file_bytes == file_bytes
        for seed in (1, 2):
            for place, tensor in enumerate(tensors(seed)):
                scratch.put(place, tensor)
        for place, tensor in enumerate(tensors(2)):
            assert torch.equal(scratch.get(place), tensor)
            assert scratch.get(place).shape == tensor.shape
    assert not list(tmp_path.rglob("*.*")), "the file has no name"


def test_a_view_is_put_as_what_it_shows(tmp_path: Path) -> None:
    view = torch.arange(12.0).reshape(4, 3).T
    with Scratch([(3, 4)], dtype=torch.float32, memory_bytes=0, folder=tmp_path) as scratch:
        scratch.put(0, view)
        assert torch.equal(scratch.get(0), view)


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2).bfloat16(), torch.zeros(2, 3)])
def test_another_shape_or_type_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    scratch = Scratch(SHAPES, dtype=torch.bfloat16, memory_bytes=100, folder=tmp_path)
    with scratch, pytest.raises(ValueError, match=r"for torch.bfloat16 \[2, 3\]"):
        scratch.put(0, tensor)


def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match="No space left"):
        Scratch(SHAPES, dtype=torch.bfloat16, memory_bytes=0, folder=tmp_path)
    Scratch(SHAPES, dtype=torch.bfloat16, memory_bytes=100, folder=tmp_path)
