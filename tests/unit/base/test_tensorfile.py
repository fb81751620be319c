import json
from pathlib import Path

import torch
from safetensors.torch import load, save

from simpletuner.base.tensorfile import Entry, with_sorted_metadata, write_tensors


def test_the_same_content_has_the_same_bytes() -> None:
    tensors = {"b": torch.arange(5.0), "ä": torch.arange(3, dtype=torch.int8)}
    metadata = {letter: f'{letter} "quoted" é\n' for letter in "qwertyuiop"}
    files = {with_sorted_metadata(save(tensors, dict(metadata))) for _ in range(5)}
    (file,) = files
    loaded = load(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert int.from_bytes(file[:8], "little") % 8 == 0


def test_a_file_without_metadata_stays_the_same_file() -> None:
    file = save({"a": torch.ones(2, 2)})
    assert with_sorted_metadata(file) == file


def test_tensors_are_written_wide_ones_first_and_each_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    entries = {
        "bytes": Entry("U8", (3,), 3, lambda: b"abc"),
        "wide": Entry("F32", (2,), 8, lambda: b"12345678"),
        "half": Entry("BF16", (), 2, lambda: b"xy"),
        "none": Entry("F32", (0, 2), 0, lambda: b""),
    }
    write_tensors(tmp_path / "file", entries, {"z": "1", "a": "2"})
    data = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert list(header.pop("__metadata__").items()) == [("a", "2"), ("z", "1")]
    assert start % 8 == 0
    assert data[start:] == b"12345678xyabc"
    assert {name: entry["data_offsets"] for name, entry in header.items()} == {
        "wide": [0, 8], "half": [8, 10], "bytes": [10, 13], "none": [13, 13],
    }  # fmt: skip
