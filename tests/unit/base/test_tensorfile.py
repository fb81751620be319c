import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from simpletuner.base.errors import AccessError
from simpletuner.base.parts import locked_part, remove_abandoned_parts
from simpletuner.base.tensorfile import (
    HEADER_LIMIT,
    TensorData,
    read_header,
    read_headers,
    read_metadata,
    write_tensors,
)


def test_entries_point_at_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3, dtype=torch.float32), "y": torch.ones(2, 2, dtype=torch.bfloat16)}, file)
    entries = read_header(file)
    assert entries["x"].shape == (3,)
    assert entries["y"].dtype == "BF16"
    data = file.read_bytes()[entries["x"].start : entries["x"].stop]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_part_of_a_file_is_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(AccessError, match=r"a\.safetensors is .* bytes long"):
        read_header(file)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "page.safetensors"
    file.write_bytes(b"\x09\0\0\0\0\0\0\0<!DOCTYPE html>")
    with pytest.raises(AccessError, match="not a safetensors file"):
        read_header(file)


def test_a_header_length_that_begins_with_a_pickles_magic_bytes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved = (save({"x": torch.zeros(1)}, {"note": "x" * count}) for count in range(700))
    file.write_bytes(next(content for content in saved if content.startswith(b"\x80\x02")))
    assert read_header(file)["x"].shape == (1,)


def test_tensors_are_written_wide_ones_first_and_each_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    tensors = {
        "bytes": TensorData("U8", (3,), 3, lambda: b"abc"),
        "wide": TensorData("F32", (2,), 8, lambda: b"12345678"),
        "half": TensorData("BF16", (), 2, lambda: b"xy"),
        "none": TensorData("F32", (0, 2), 0, lambda: b""),
    }
    write_tensors(tmp_path / "file", tensors, {"z": "1", "a": "2"})
    data = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert list(header.pop("__metadata__").items()) == [("a", "2"), ("z", "1")]
    assert start % 8 == 0
    assert data[start:] == b"12345678xyabc"
    assert {name: entry["data_offsets"] for name, entry in header.items()} == {
        "wide": [0, 8], "half": [8, 10], "bytes": [10, 13], "none": [13, 13],
    }  # fmt: skip


def test_a_file_that_is_replaced_stays_what_it_was_for_who_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": TensorData("U8", (2,), 2, lambda: b"ab")}, {})
    with path.open("rb") as file:
        before = path.read_bytes()
        write_tensors(path, {"a": TensorData("U8", (2,), 2, lambda: b"cd")}, {})
        assert file.read() == before
    assert path.read_bytes().endswith(b"cd")


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        [], 7, None, {"x": 7}, {"x": []}, {"x": {}},
        *({"x": TENSOR | {"dtype": dtype}} for dtype in (3, None, ["F32"], "F64", "F16")),
        *({"x": TENSOR | {"shape": shape}} for shape in (1, None, [-1], [1.0], ["1"], [True], [10**30], [2], {})),
        *({"x": TENSOR | {"data_offsets": at}} for at in (4, None, [], [0], [0, 4, 4], [4, 0], [-4, 0], [0, 10**30])),
        b'{"x": ' + json.dumps(TENSOR).encode() + b', "x": ' + json.dumps(TENSOR).encode() + b"}",
        b"[" * 100_000, b"\xff\xff", b"{} {}",
    ],
)  # fmt: skip
def test_a_header_that_is_wrong_is_refused_with_the_files_name(tmp_path: Path, header: object) -> None:
    with pytest.raises(AccessError, match=r"a\.safetensors is .*expected a complete"):
        read_header(with_header(tmp_path / "a.safetensors", header, bytes(4)))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write((2 * HEADER_LIMIT).to_bytes(8, "little"))
        stream.truncate(3 * HEADER_LIMIT)
    with pytest.raises(AccessError, match="has no safetensors header"):
        read_header(file)


def test_text_fields_of_a_header_are_read_and_others_left_out(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "odd": 7}, "x": TENSOR}
    assert read_metadata(with_header(tmp_path / "a", header, bytes(4))) == {"format": "pt"}
    assert read_metadata(with_header(tmp_path / "b", {"__metadata__": 3, "x": TENSOR}, bytes(4))) == {}


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = tuple(with_header(tmp_path / name, {"x": TENSOR}, bytes(4)) for name in ("a", "b"))
    with pytest.raises(AccessError, match="b and a both have the tensor x"):
        read_headers(files)


def test_a_locked_part_stays_locked_while_it_is_filled(tmp_path: Path) -> None:
    with locked_part(tmp_path / "a.safetensors") as part:
        write_tensors(part, {"x": TensorData("U8", (3,), 3, lambda: memoryview(b"abc"))}, {})
        remove_abandoned_parts(tmp_path, ".*.part")
        assert part.stat().st_size > 3
    assert not part.exists()


def test_a_file_that_is_in_use_keeps_its_content(tmp_path: Path) -> None:
    path, other_name = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    path.write_bytes(b"in use")
    other_name.hardlink_to(path)
    write_tensors(path, {}, {})
    assert other_name.read_bytes() == b"in use"
