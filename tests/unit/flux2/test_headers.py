import pytest
import torch
from safetensors.torch import save_file

from simpletuner.base.errors import AccessError
from simpletuner.flux2.headers import read_header


def test_entries_point_at_the_bytes(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3, dtype=torch.float32), "y": torch.ones(2, 2, dtype=torch.bfloat16)}, file)
    entries = read_header(file)
    assert entries["x"].shape == (3,)
    assert entries["y"].dtype == "BF16"
    data = file.read_bytes()[entries["x"].start : entries["x"].stop]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_part_of_a_file_is_refused(tmp_path, kept):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(AccessError, match=r"a\.safetensors is .* bytes long"):
        read_header(file)


def test_another_kind_of_file_is_refused(tmp_path):
    file = tmp_path / "page.safetensors"
    file.write_bytes(b"\x09\0\0\0\0\0\0\0<!DOCTYPE html>")
    with pytest.raises(AccessError, match="not a safetensors file"):
        read_header(file)
