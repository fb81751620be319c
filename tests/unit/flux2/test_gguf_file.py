"""GGUF files: headers that are whole or refused, and blocks that decode to the numbers of their definition."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.gguf_files import HALVES, random_blocks, write_gguf

from simpletuner.base.errors import AccessError
from simpletuner.flux2.gguf_file import block_size, decoded_rows, gguf_weights, read_gguf_header
from simpletuner.flux2.stored import open_stored


def half(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block[at : at + 2], np.float16)[0])


def q8_0(block: bytes) -> list[np.float32]:
    return [half(block, 0) * np.float32(q) for q in np.frombuffer(block[2:], np.int8)]


def q4_0(block: bytes) -> list[np.float32]:
    low = [half(block, 0) * np.float32((byte & 15) - 8) for byte in block[2:]]
    return low + [half(block, 0) * np.float32((byte >> 4) - 8) for byte in block[2:]]


def scale_and_minimum(packed: bytes, index: int) -> tuple[int, int]:
    if index < 4:
        return packed[index] & 63, packed[index + 4] & 63
    low = packed[index + 4]
    return low & 15 | packed[index - 4] >> 6 << 4, low >> 4 | packed[index] >> 6 << 4


def q4_k(block: bytes) -> list[np.float32]:
    values = []
    for index in range(8):
        scale, minimum = scale_and_minimum(block[4:16], index)
        for byte in block[16 + 32 * (index // 2) :][:32]:
            q = byte >> 4 if index % 2 else byte & 15
            values.append(half(block, 0) * np.float32(scale) * np.float32(q) - half(block, 2) * np.float32(minimum))
    return values


def q6_k(block: bytes) -> list[np.float32]:
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    values = []
    for i in range(256):
        h, k, at = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * h + 32 * (k & 1) + at] >> (4 if k >= 2 else 0) & 15
        q = nibble | (high[32 * h + at] >> 2 * k & 3) << 4
        values.append(half(block, 208) * np.float32(scales[i // 16]) * np.float32(q - 32))
    return values


@pytest.mark.parametrize(
    ("name", "formula"), [("Q8_0", q8_0), ("Q4_0", q4_0), ("Q4_K", q4_k), ("Q6_K", q6_k)], ids=lambda it: str(it)[:4]
)
def test_blocks_are_the_numbers_of_their_definition(name: str, formula) -> None:  # type: ignore[no-untyped-def]
    raw = random_blocks(name, (1, 256))
    size = block_size(name)[1]
    expected = [value for at in range(0, raw.size, size) for value in formula(bytes(raw[0, at : at + size]))]
    assert torch.equal(decoded_rows(torch.from_numpy(raw), name)[0], torch.tensor(np.array(expected)))


@pytest.mark.parametrize("name", HALVES)
def test_rows_are_decoded_alone(name: str) -> None:
    raw = torch.from_numpy(random_blocks(name, (6, 512)))
    assert torch.equal(decoded_rows(raw[2:5], name), decoded_rows(raw, name)[2:5])


def test_the_header_says_what_each_tensor_is(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    plain = {"n": torch.arange(6.0), "b": torch.ones(2, 32, dtype=torch.bfloat16), "h": torch.ones(3, 4).half()}
    write_gguf(path, {"q": torch.empty(4, 512), **plain}, {"q": "Q4_K"})
    header = read_gguf_header(path)
    assert header.architecture == "flux"
    found = {name: (entry.dtype, entry.shape, entry.stop - entry.start) for name, entry in header.tensors.items()}
    assert found == {
        "q": ("Q4_K", (4, 512), 4 * 2 * 144),
        "n": ("F32", (6,), 24),
        "b": ("BF16", (2, 32), 128),
        "h": ("F16", (3, 4), 24),
    }
    with open_stored(gguf_weights(path, "transformer")) as weights:
        for name, tensor in plain.items():
            assert torch.equal(weights.values(name), tensor)


def whole(path: Path) -> bytes:
    write_gguf(path, {"q": torch.empty(4, 512), "n": torch.ones(3)}, {"q": "Q8_0"})
    return path.read_bytes()


def test_a_file_without_an_architecture_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"n": torch.ones(3)}, {}, architecture=None)
    assert read_gguf_header(tmp_path / "a.gguf").architecture is None


def test_a_type_that_is_newer_than_the_package_is_no_broken_download(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = bytearray(whole(path))
    name = struct.pack("<Q", 1) + b"q"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind the count of dimensions, and the dimensions
    content[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(content)
    with pytest.raises(AccessError, match=r"holds tensors of the GGUF type 99: .*install a newer gguf package"):
        read_gguf_header(path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = whole(tmp_path / "a.gguf")
    end = max(entry.stop for entry in read_gguf_header(tmp_path / "a.gguf").tensors.values())  # padding follows
    cut = tmp_path / "cut.gguf"
    for size in sorted({0, 3, 4, 7, 8, 16, 20, *range(24, end, 97), end - 1}):
        cut.write_bytes(content[:size])
        with pytest.raises(AccessError, match=r"cut\.gguf is not a complete GGUF file .*download the file again"):
            read_gguf_header(cut)


@pytest.mark.parametrize(
    ("at", "content", "match"),
    [
        (0, b"GGUX", "not a complete GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 2**60), "not a complete GGUF file"),
        (16, struct.pack("<Q", 2**60), "not a complete GGUF file"),
    ],
)
def test_a_damaged_header_is_refused_at_once(tmp_path: Path, at: int, content: bytes, match: str) -> None:
    path = tmp_path / "a.gguf"
    good = whole(path)
    path.write_bytes(good[:at] + content + good[at + len(content) :])
    with pytest.raises(AccessError, match=match):
        read_gguf_header(path)


def test_a_type_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("q", np.zeros((2, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(AccessError, match=r"GGUF type Q8_K.*such as Q8_0"):
        read_gguf_header(path)
