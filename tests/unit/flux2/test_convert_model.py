"""Transformers between diffusers' folders and BFL's single files: bit for bit, and read by others as they lie."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.base import machine, tensorfile
from simpletuner.base.errors import AccessError, CheckpointError, ConfigError, DiskError, UserError
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.convert_model import MODEL_FORMATS, convert_model, holds_model, save_single
from simpletuner.flux2.modelfile import WEIGHTS_NAME, save_transformer
from simpletuner.flux2.transformer import empty_transformer

Tensors = dict[str, torch.Tensor]
DEV = TransformerSpec(
    heads=3, head_dim=16, double_blocks=2, single_blocks=3, context_dim=40, guidance_embeds=True, axes=(4, 4, 4, 4)
)
KLEIN = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=2, context_dim=40, guidance_embeds=False, axes=(4, 4, 4, 4)
)
"""Small ones with every kind of tensor."""


def random_weights(spec: TransformerSpec, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    shapes = {name: tensor.shape for name, tensor in empty_transformer(spec).state_dict().items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def by_hand(weights: Tensors) -> Tensors:
    """In BFL's layout, by the table of files.md and diffusers' own converter, written out a second time."""
    new = {}
    top = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    for name, own in top.items():
        if f"{name}.weight" in weights:
            new[f"{own}.weight"] = weights[f"{name}.weight"]
    scale, shift = weights["norm_out.linear.weight"].chunk(2)
    new["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for kind, prefix in (("double", "transformer_blocks"), ("single", "single_transformer_blocks")):
        count = len({name.split(".")[1] for name in weights if name.startswith(f"{prefix}.")})
        for index in range(count):
            block = {
                name.removeprefix(f"{prefix}.{index}."): tensor
                for name, tensor in weights.items()
                if name.startswith(f"{prefix}.{index}.")
            }
            own = f"{kind}_blocks.{index}"
            if kind == "single":
                new[f"{own}.linear1.weight"] = block["attn.to_qkv_mlp_proj.weight"]
                new[f"{own}.linear2.weight"] = block["attn.to_out.weight"]
                new[f"{own}.norm.query_norm.scale"] = block["attn.norm_q.weight"]
                new[f"{own}.norm.key_norm.scale"] = block["attn.norm_k.weight"]
                continue
            for stream, names, norms, out, feed in (
                ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
                ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out",
                 "ff_context"),
            ):  # fmt: skip
                new[f"{own}.{stream}_attn.qkv.weight"] = torch.cat([block[f"attn.{name}.weight"] for name in names])
                new[f"{own}.{stream}_attn.norm.query_norm.scale"] = block[f"attn.{norms[0]}.weight"]
                new[f"{own}.{stream}_attn.norm.key_norm.scale"] = block[f"attn.{norms[1]}.weight"]
                new[f"{own}.{stream}_attn.proj.weight"] = block[f"attn.{out}.weight"]
                new[f"{own}.{stream}_mlp.0.weight"] = block[f"{feed}.linear_in.weight"]
                new[f"{own}.{stream}_mlp.2.weight"] = block[f"{feed}.linear_out.weight"]
    return new


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


@pytest.fixture(params=[DEV, KLEIN], ids=["dev", "klein"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved transformer with random weights."""
    return saved(tmp_path / "pipeline" / "transformer", request.param)


def saved(where: Path, spec: TransformerSpec = DEV, dtype: torch.dtype = torch.bfloat16) -> Path:
    save_transformer(where, spec, random_weights(spec, dtype), metadata={"licence": "free", "step": "3"}, dtype=dtype)
    return where


def test_there_and_back_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pipeline = folder.parent
    (pipeline / "model_index.json").write_text("{}")
    single, again, last = tmp_path / "single.safetensors", tmp_path / "again", tmp_path / "last.safetensors"
    done = convert_model(pipeline, single, "comfyui")
    assert (done.path, done.tensors, done.left_out) == (single, len(load_file(single)), 0)
    assert same(load_file(single), by_hand(load_file(folder / WEIGHTS_NAME)))
    convert_model(single, again, "diffusers")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    convert_model(again, last, "bfl")
    assert last.read_bytes() == single.read_bytes()
    with safe_open(single, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "simpletuner.licence": "free", "simpletuner.step": "3"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert holds_model(pipeline)
    assert holds_model(folder)
    assert holds_model(single)


def test_comfyui_finds_what_it_tells_flux2_by(tmp_path: Path) -> None:
    """Its detection reads these keys and shapes (files.md, containers)."""
    for spec in (DEV, KLEIN):
        single = tmp_path / f"{spec.heads}.safetensors"
        convert_model(saved(tmp_path / f"transformer-{spec.heads}", spec), single, "comfyui")
        found = {name: tuple(tensor.shape) for name, tensor in load_file(single).items()}
        assert found["double_stream_modulation_img.lin.weight"] == (6 * spec.hidden, spec.hidden)
        assert ("guidance_in.in_layer.weight" in found) == spec.guidance_embeds
        assert found["double_blocks.0.img_attn.norm.key_norm.scale"] == (spec.head_dim,)
        assert not [name for name in found if "transformer_blocks" in name or name.endswith("bias")]


@pytest.mark.slow
def test_diffusers_loads_both_as_they_lie(folder: Path, tmp_path: Path) -> None:
    from diffusers import Flux2Transformer2DModel

    single, again = tmp_path / "single.safetensors", tmp_path / "again"
    convert_model(folder, single, "bfl")
    convert_model(single, again, "diffusers")
    weights = load_file(folder / WEIGHTS_NAME)
    theirs = Flux2Transformer2DModel.from_single_file(single, config=str(folder), torch_dtype=torch.bfloat16)
    assert same(dict(theirs.state_dict()), weights)
    theirs = Flux2Transformer2DModel.from_pretrained(again, torch_dtype=torch.bfloat16)
    assert same(dict(theirs.state_dict()), weights)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_prefixes_and_other_components_are_left_behind(tmp_path: Path, prefix: str) -> None:
    weights = random_weights(DEV, torch.float16)
    file = {prefix + name.replace(".scale", ".weight"): tensor for name, tensor in by_hand(weights).items()}
    others = {"vae.encoder.conv_in.weight": torch.ones(2), "text_encoders.qwen3_4b.x": torch.ones(2)}
    file |= others if prefix == "model.diffusion_model." else {}
    save_file(file, tmp_path / "theirs.safetensors")
    done = convert_model(tmp_path / "theirs.safetensors", tmp_path / "folder", "diffusers")
    assert done.left_out == (2 if prefix == "model.diffusion_model." else 0)
    assert same(load_file(tmp_path / "folder" / WEIGHTS_NAME), weights)
    convert_model(tmp_path / "theirs.safetensors", tmp_path / "bare.safetensors", "bfl")
    assert same(load_file(tmp_path / "bare.safetensors"), by_hand(weights))


def test_shards_become_one_file_and_bits_stay_even_of_what_is_no_number(tmp_path: Path) -> None:
    weights = random_weights(DEV, torch.float32)
    weights["proj_out.weight"][0, 0] = float("nan")
    folder = saved(tmp_path / "transformer")
    (folder / WEIGHTS_NAME).unlink()
    files: list[Tensors] = [{}, {}]
    for place, name in enumerate(weights):
        files[place % 2][name] = weights[name]
    names = [f"diffusion_pytorch_model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for name, held in zip(names, files, strict=True):
        save_file(held, folder / name)
    index = {name: names[place % 2] for place, name in enumerate(weights)}
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    convert_model(folder, tmp_path / "single.safetensors", "bfl")
    found, expected = load_file(tmp_path / "single.safetensors"), by_hand(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)) for name in found)
    (folder / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {names[1]}"):
        convert_model(folder, tmp_path / "other.safetensors", "bfl")


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_one(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("img_in.weight"), "no tensor 'x_embedder.weight'"),
        (without("double_blocks.1.img_attn.proj.weight"), r"missing \(1\): transformer_blocks.1.attn.to_out.0.weight"),
        (with_one("img_in.bias", torch.ones(4)), r"unknown tensors \(1\): img_in.bias"),
        (with_one("vae.decoder.conv_in.weight", torch.ones(4)), r"unknown tensors \(1\): vae.decoder"),
        (with_one("single_blocks.0.linear1.comfy_quant", torch.ones(4)), "comfy_quant marker"),
        (with_one("txt_in.weight", torch.ones(4, 4)), "wrong shape"),
        (with_one("txt_in.weight", torch.ones(DEV.hidden, 40).to(torch.float8_e4m3fn)), r"quantized \(1\): .* F8_E4M3"),
    ],
)
def test_what_is_no_whole_model_is_named(tmp_path: Path, change: Callable[[Tensors], None], told: str) -> None:
    tensors = by_hand(random_weights(DEV))
    change(tensors)
    save_file(tensors, tmp_path / "file.safetensors")
    for target, to in (("folder", "diffusers"), ("new.safetensors", "bfl")):
        with pytest.raises(AccessError, match=told):
            convert_model(tmp_path / "file.safetensors", tmp_path / target, to)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"version https://git-lfs", b"GGUF"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.safetensors").write_bytes(content)
    for read in (holds_model, lambda file: convert_model(file, tmp_path / "folder", "diffusers")):
        with pytest.raises(AccessError):
            read(tmp_path / "file.safetensors")


def test_a_file_that_broke_off_is_refused(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / WEIGHTS_NAME, (folder / WEIGHTS_NAME).stat().st_size - 1)
    with pytest.raises(AccessError, match="by its own header"):
        convert_model(folder, tmp_path / "single.safetensors", "bfl")


def test_an_adapter_and_an_empty_folder_are_no_model(tmp_path: Path) -> None:
    save_file({"transformer.x_embedder.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    save_file({"diffusion_model.img_in.lora_A.weight": torch.ones(2, 2)}, tmp_path / "comfy.safetensors")
    assert not holds_model(tmp_path / "lora.safetensors")
    assert not holds_model(tmp_path / "comfy.safetensors")
    assert not holds_model(tmp_path)
    with pytest.raises(AccessError, match="holds no transformer"):
        convert_model(tmp_path, tmp_path / "x.safetensors", "bfl")


@pytest.mark.parametrize(
    ("name", "to", "told"),
    [
        ("x.safetensors", "kohya", "models cannot be converted to kohya: expected one of diffusers, bfl, comfyui"),
        ("x.safetensors", "diffusers", "is named like a file"),
        ("x", "bfl", "does not end in .safetensors"),
        ("here.safetensors", "comfyui", "exists already"),
        ("nowhere/x.safetensors", "comfyui", "no such folder"),
    ],
)
def test_targets_that_do_not_suit_are_refused_before_anything_is_read(
    tmp_path: Path, name: str, to: str, told: str
) -> None:
    (tmp_path / "here.safetensors").touch()
    with pytest.raises(ConfigError, match=told):
        convert_model(tmp_path / "no model", tmp_path / name, to)
    assert MODEL_FORMATS == ("diffusers", "bfl", "comfyui")


def test_a_config_that_a_single_file_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000}))
    with pytest.raises(AccessError, match="rope_theta"):
        convert_model(folder, tmp_path / "single.safetensors", "bfl")
    done = convert_model(folder, tmp_path / "copy", "diffusers")  # a folder holds it
    assert json.loads((done.path / "config.json").read_text())["rope_theta"] == 10000


@pytest.mark.parametrize("to", ["diffusers", "bfl"])
def test_neither_a_full_disk_nor_a_bad_one_nor_an_interrupt_leaves_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    folder = saved(tmp_path / "transformer")
    target = tmp_path / ("new" if to == "diffusers" else "new.safetensors")

    def fails(kind: type[BaseException], told: str) -> None:
        with pytest.raises(kind, match=told):
            convert_model(folder, target, to)
        assert {path.name for path in tmp_path.iterdir()} == {"transformer"}

    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_disk_bytes", lambda _: 1000)
        fails(DiskError, "needs .* has 1000 B free")
    pieces = tensorfile.file_pieces

    def breaking(error: BaseException) -> Any:
        def broken(*arguments: Any) -> Any:
            for count, piece in enumerate(pieces(*arguments)):
                if count == 3:
                    raise error
                yield piece

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "file_pieces", breaking(OSError(errno.ENOSPC, "No space left on device")))
        fails(DiskError, "No space left")
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "file_pieces", breaking(KeyboardInterrupt()))
        fails(KeyboardInterrupt, "^$")
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "sha256_file", lambda _: "0" * 64)
        fails(DiskError, "reads back differently")


def test_a_runs_single_file_replaces_the_old_one_and_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "transformer.safetensors"
    target.write_bytes(b"old")
    save_single(folder, target)
    assert same(load_file(target), by_hand(load_file(folder / WEIGHTS_NAME)))
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match="diffusion_pytorch_model"):
        save_single(folder, target)
