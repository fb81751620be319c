"""Files of one flavour under the name of another: told apart by shapes, before anything is loaded or downloaded."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.flux2.test_load import bfl_tensors

from simpletuner.base.errors import AccessError, CheckpointError
from simpletuner.config.flavours import FLAVOURS, Flavour, TransformerSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.export import attach_saved, read_lora
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.transformer import Flux2Transformer

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def located(**given: object) -> Source:
    return locate(ModelOptions(**given), report=pytest.fail, environ={"HF_ENDPOINT": "http://127.0.0.1:9"})  # type: ignore[arg-type]


def write_configs(folder: Path, flavour: Flavour) -> None:
    """Turn the configs of a folder into those of a published flavour; its weights stay what they are."""
    text = flavour.text.encoder
    config = {
        "model_type": flavour.text.kind,
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "intermediate_size": text.inner,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.key_heads,
        "head_dim": text.head_dim,
    }
    nested = {"model_type": "mistral3", "text_config": config}
    for name, value in {
        "transformer": transformer_to_diffusers(flavour.transformer),
        "text_encoder": nested if flavour.text.kind == "mistral3" else config,
    }.items():
        path = folder / name / "config.json"
        path.unlink()
        path.write_text(json.dumps(value))


def write_headers(file: Path, spec: TransformerSpec, prefix: str = "") -> None:
    """A file of all tensors of a transformer, none of which takes room on the disk."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Flux2Transformer(spec).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[prefix + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(data)) + data)
        stream.truncate(8 + len(data) + end)


@pytest.mark.parametrize(
    ("asked", "there", "remedy"),
    [
        ("klein-9b", "klein-4b", "klein-4b"),
        ("dev", "klein-9b", "klein-9b"),
        ("klein-4b", "dev", "dev"),
        ("tiny", "klein-4b", "klein-4b"),
        ("klein-4b-distilled", "klein-9b", "klein-9b-distilled"),
    ],
)
def test_a_folder_of_another_flavour_is_refused_with_the_flavour_to_give(
    repository: Path, asked: str, there: str, remedy: str
) -> None:
    write_configs(repository, FLAVOURS[there])
    with pytest.raises(AccessError) as caught:
        located(model_flavour=asked, pretrained_model_name_or_path=str(repository))
    (problem,) = caught.value.problems
    assert problem.found == f"{repository}: its text encoder and transformer have the shapes of {remedy}"
    assert problem.expected == f"those of {asked}, as set by model_flavour"
    assert problem.remedy == f"Give --model_flavour {remedy}."


def test_kleins_text_encoder_of_another_size_is_refused(repository: Path, tmp_path: Path) -> None:
    write_configs(repository, FLAVOURS["klein-9b"])
    file = tmp_path / "klein.safetensors"
    write_headers(file, FLAVOURS["klein-4b"].transformer)
    with pytest.raises(AccessError, match=r"its text encoder has the shapes of klein-9b: .* --model_flavour klein-9b"):
        located(
            model_flavour="klein-4b",
            pretrained_model_name_or_path=str(repository),
            pretrained_transformer_model_name_or_path=str(file),
        )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_of_another_flavour_is_refused_whatever_its_name(
    tiny_klein_folder: Path, tmp_path: Path, prefix: str
) -> None:
    file = tmp_path / "flux-2-klein-base-9b.safetensors"
    write_headers(file, FLAVOURS["klein-4b"].transformer, prefix)
    asked = {"pretrained_model_name_or_path": str(tiny_klein_folder)}
    with pytest.raises(AccessError, match=r"9b\.safetensors: its transformer has the shapes of klein-4b") as caught:
        located(model_flavour="klein-9b", pretrained_transformer_model_name_or_path=str(file), **asked)
    assert caught.value.problems[0].remedy == "Give --model_flavour klein-4b."


def test_shapes_of_no_published_flavour_fit_any(tiny_folder: Path) -> None:
    assert located(pretrained_model_name_or_path=str(tiny_folder)).flavour.name == "dev"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("names", ["BFL's", "diffusers'"])
def test_a_single_file_of_klein_is_the_folders_transformer(
    tiny_klein_folder: Path, tmp_path: Path, prefix: str, names: str
) -> None:
    flavour = FLAVOURS["tiny-klein"]
    tensors = load_file(tiny_klein_folder / TRANSFORMER)
    renamed = bfl_tensors(tensors, flavour.transformer) if names == "BFL's" else tensors
    file = tmp_path / "flux-2-klein-base.safetensors"
    save_file({prefix + name: tensor for name, tensor in renamed.items()}, file)
    source = located(
        model_flavour="tiny-klein",
        pretrained_model_name_or_path=str(tiny_klein_folder),
        pretrained_transformer_model_name_or_path=str(file),
    )
    assert source.spec == flavour.transformer
    assert source.distillation_warning is None
    state = load_transformer(source, torch.bfloat16, "cpu").state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_quantized_single_file_of_klein_is_refused_by_its_header(tiny_klein_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_klein_folder / TRANSFORMER)
    file = tmp_path / "flux-2-klein-base-4b-int8.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    remedy = "Name the file that is not quantized, such as that of black-forest-labs/FLUX.2-klein-base-4B"
    with pytest.raises(AccessError, match=rf"int8 weights without scales .*: expected weights in bf16.*{remedy}"):
        located(
            model_flavour="klein-4b",
            pretrained_model_name_or_path=str(tiny_klein_folder),
            pretrained_transformer_model_name_or_path=str(file),
        )


def test_weights_that_are_distilled_or_not_are_told_from_the_flavours(
    tiny_klein_folder: Path, tiny_klein_distilled_folder: Path, tmp_path: Path
) -> None:
    folders = {"tiny-klein": tiny_klein_folder, "tiny-klein-distilled": tiny_klein_distilled_folder}
    warnings = {
        (asked, there): located(model_flavour=asked, pretrained_model_name_or_path=str(folder)).distillation_warning
        for asked in folders
        for there, folder in folders.items()
    }
    assert warnings["tiny-klein", "tiny-klein"] is warnings["tiny-klein-distilled", "tiny-klein-distilled"] is None
    distilled = warnings["tiny-klein", "tiny-klein-distilled"]
    assert distilled is not None
    assert "gray, smooth blobs" in distilled
    assert "--model_flavour tiny-klein-distilled" in distilled
    base = warnings["tiny-klein-distilled", "tiny-klein"]
    assert base is not None
    assert "only blurs" in base
    assert "--model_flavour tiny-klein." in base

    single = tmp_path / "flux-2-klein-4b.safetensors"  # BFL's name for the distilled file
    single.hardlink_to(tiny_klein_distilled_folder / TRANSFORMER)
    source = located(
        model_flavour="tiny-klein",
        pretrained_model_name_or_path=str(tiny_klein_folder),
        pretrained_transformer_model_name_or_path=str(single),
    )
    assert source.is_distilled
    mine = single.rename(tmp_path / "my-klein-merge.safetensors")
    source = located(
        model_flavour="tiny-klein",
        pretrained_model_name_or_path=str(tiny_klein_folder),
        pretrained_transformer_model_name_or_path=str(mine),
    )
    assert not source.is_distilled, "nothing says so"


NAME = "transformer_blocks.0.ff.linear_out"


def saved_lora(path: Path, flavour: str, **header: str) -> Path:
    """A LoRA of one layer, of rank 1."""
    spec = FLAVOURS[flavour].transformer
    tensors = {"A": torch.ones(1, spec.mlp_hidden), "B": torch.ones(spec.hidden, 1)}
    keys = {f"transformer.{NAME}.lora_{side}.weight": tensor for side, tensor in tensors.items()}
    save_file(keys, path, {f"simpletuner.{field}": value for field, value in header.items()})
    return path


@pytest.mark.parametrize(
    ("there", "here", "header", "named"),
    [
        ("klein-4b", "klein-9b-distilled", {}, "klein-4b"),
        ("dev", "klein-4b", {"base_model": "my-own-model"}, "my-own-model (dev)"),
        (
            "klein-9b",
            "dev",
            {"base_model": "black-forest-labs/FLUX.2-klein-base-9B"},
            "black-forest-labs/FLUX.2-klein-base-9B (klein-9b)",
        ),
    ],
)
def test_a_lora_of_one_flavour_on_another_is_refused_with_both_named(
    tmp_path: Path, there: str, here: str, header: dict[str, str], named: str
) -> None:
    path = saved_lora(tmp_path / "lora.safetensors", there, **header)
    with torch.device("meta"):
        transformer = Flux2Transformer(FLAVOURS[here].transformer)
    with pytest.raises(CheckpointError) as caught:
        attach_saved(transformer, read_lora(path))
    (problem,) = caught.value.problems
    assert problem.found.startswith(f"{path} does not fit this model, {FLAVOURS[here].family}: 1 of 1 layers, such as")
    assert problem.expected == f"the model it was trained on, {named}"
    assert problem.remedy == f"Give --model_flavour {there} to use this file."


def test_a_lora_of_no_known_shape_is_refused_without_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({f"transformer.{NAME}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}, path)
    with torch.device("meta"):
        transformer = Flux2Transformer(FLAVOURS["klein-4b"].transformer)
    with pytest.raises(CheckpointError, match=r"model, klein-4b: .* expected the model it was trained on\. Name it"):
        attach_saved(transformer, read_lora(path))
