"""A saved transformer explains itself, comes back as it was, and gets a pipeline around it where there is one."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simpletuner.base.errors import CheckpointError
from simpletuner.config.flavours import TINY
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.modelfile import WEIGHTS_NAME, read_transformer, save_pipeline, save_transformer
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.spec import transformer_to_diffusers

TENSORS = {"b.weight": torch.tensor([[1 / 3, -0.0]]), "a.weight": torch.tensor([2.0])}


def save(folder: Path, dtype: torch.dtype = torch.float32, **metadata: str) -> None:
    save_transformer(folder, TINY, TENSORS, metadata=metadata, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_as_it_was_and_the_same_content_is_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, dtype, run="1f2e", licence="free")
    found = read_transformer(tmp_path / "one")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    assert found["b.weight"].signbit().tolist() == [[False, True]]
    assert (tmp_path / "one" / WEIGHTS_NAME).read_bytes() == (tmp_path / "two" / WEIGHTS_NAME).read_bytes()
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == transformer_to_diffusers(TINY)


def test_the_header_takes_no_other_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_dir"):
        save(tmp_path / "transformer", output_dir="/home/someone")


def test_half_a_file_cannot_be_read(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes((tmp_path / WEIGHTS_NAME).read_bytes()[:-1])
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_transformer(folder)


@pytest.fixture
def base(tmp_path: Path, tiny_folder: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "base")


def source_of(**options: str) -> Source:
    return locate(ModelOptions(**options), report=print)  # type: ignore[arg-type]


def around(tmp_path: Path, source: Source) -> tuple[Path, str | None]:
    """The model's folder and why it is none."""
    weights = load_transformer(source, torch.bfloat16, "cpu").state_dict()
    save_transformer(tmp_path / "saved", source.spec, weights, metadata={}, dtype=torch.bfloat16)
    return tmp_path / "model", save_pipeline(tmp_path / "model", tmp_path / "saved", source)


def test_a_whole_pipeline_is_made_of_a_folder(tmp_path: Path, base: Path) -> None:
    folder, reason = around(tmp_path, source_of(pretrained_model_name_or_path=str(base)))
    assert reason is None
    again = source_of(pretrained_model_name_or_path=str(folder))
    first = source_of(pretrained_model_name_or_path=str(base))
    for component in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert again.fingerprint(component) == first.fingerprint(component)  # type: ignore[arg-type]
    encoder = "text_encoder/model.safetensors"
    assert os.path.samefile(folder / encoder, base / encoder)
    assert not os.path.samefile(folder / "text_encoder/config.json", base / "text_encoder/config.json")
    assert os.path.samefile(folder / "transformer" / WEIGHTS_NAME, tmp_path / "saved" / WEIGHTS_NAME)
    (folder / "old").touch()
    assert around(tmp_path, again)[1] is None  # even of itself, and in its own place
    assert not (folder / "old").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    assert source_of(pretrained_model_name_or_path=str(folder)).fingerprint("vae") == first.fingerprint("vae")


def test_components_come_from_where_the_run_had_them(tmp_path: Path, base: Path, tiny_folder: Path) -> None:
    vae = shutil.copytree(base / "vae", tmp_path / "other-vae")
    (vae / "README").write_text("another")
    single = base / "transformer" / WEIGHTS_NAME
    source = source_of(
        pretrained_model_name_or_path=str(tiny_folder),
        pretrained_vae_model_name_or_path=str(vae),
        pretrained_transformer_model_name_or_path=str(single),
    )
    folder, reason = around(tmp_path, source)
    assert reason is None
    assert (folder / "vae" / "README").read_text() == "another"
    assert json.loads((folder / "transformer" / "config.json").read_text()) == transformer_to_diffusers(TINY)


def test_from_another_disk_large_files_are_linked_by_name(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    folder, _ = around(tmp_path, source_of(pretrained_model_name_or_path=str(base)))
    encoder = "text_encoder/model.safetensors"
    assert (folder / encoder).readlink() == base / encoder
    assert not (folder / "transformer" / WEIGHTS_NAME).is_symlink()  # a checkpoint may go
    assert source_of(pretrained_model_name_or_path=str(folder)).fingerprint("text_encoder")


def test_where_the_rest_is_not_here_the_transformer_stands_alone(tmp_path: Path, base: Path) -> None:
    source = source_of(pretrained_model_name_or_path=str(base))
    folder, reason = around(tmp_path, replace(source, pipeline=None))
    assert reason == "only the files of base that training needs were downloaded"
    assert [path.name for path in folder.iterdir()] == ["transformer"]
    index = base / "text_encoder" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    assert "last layers" in str(around(tmp_path, source)[1])
    index.unlink()
    config = base / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("Mistral3ForConditionalGeneration", "MistralModel"))
    assert "a different architecture" in str(around(tmp_path, source)[1])
    (base / "model_index.json").unlink()
    assert "not a complete pipeline" in str(around(tmp_path, source)[1])
