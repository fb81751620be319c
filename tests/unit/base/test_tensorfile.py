import torch
from safetensors.torch import load, save

from simpletuner.base.tensorfile import with_sorted_metadata


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
