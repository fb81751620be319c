import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.config.flavours import TINY, TransformerSpec
from simpletuner.flux2.load import (
    autoencoder_id,
    checked_skeleton,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    text_encoder_id,
)
from simpletuner.flux2.source import Source, Weights


def bfl_tensors(tensors: dict[str, torch.Tensor], spec: TransformerSpec = TINY) -> dict[str, torch.Tensor]:
    """diffusers' tensors as BFL keeps them, written for this test from the description of both."""
    left = dict(tensors)
    bfl = {
        "img_in.weight": left.pop("x_embedder.weight"),
        "txt_in.weight": left.pop("context_embedder.weight"),
        "final_layer.linear.weight": left.pop("proj_out.weight"),
    }
    scale, shift = left.pop("norm_out.linear.weight").chunk(2)
    bfl["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for ours, theirs in (("timestep", "time_in"), ("guidance", "guidance_in"))[: 1 + spec.guidance_embeds]:
        embedder = f"time_guidance_embed.{ours}_embedder"
        bfl[f"{theirs}.in_layer.weight"] = left.pop(f"{embedder}.linear_1.weight")
        bfl[f"{theirs}.out_layer.weight"] = left.pop(f"{embedder}.linear_2.weight")
    for part in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        bfl[f"{part}.lin.weight"] = left.pop(f"{part}.linear.weight")
    for index in range(spec.double_blocks):
        ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
        fused = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
        for stream, names in fused.items():
            rows = [left.pop(f"{ours}.attn.{name}.weight") for name in names]
            bfl[f"{theirs}.{stream}_attn.qkv.weight"] = torch.cat(rows)
        for name, other in {
            "attn.to_out.0.weight": "img_attn.proj.weight",
            "attn.to_add_out.weight": "txt_attn.proj.weight",
            "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
            "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
            "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
            "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
            "ff.linear_in.weight": "img_mlp.0.weight",
            "ff.linear_out.weight": "img_mlp.2.weight",
            "ff_context.linear_in.weight": "txt_mlp.0.weight",
            "ff_context.linear_out.weight": "txt_mlp.2.weight",
        }.items():
            bfl[f"{theirs}.{other}"] = left.pop(f"{ours}.{name}")
    for index in range(spec.single_blocks):
        ours, theirs = f"single_transformer_blocks.{index}.attn", f"single_blocks.{index}"
        bfl[f"{theirs}.linear1.weight"] = left.pop(f"{ours}.to_qkv_mlp_proj.weight")
        bfl[f"{theirs}.linear2.weight"] = left.pop(f"{ours}.to_out.weight")
        bfl[f"{theirs}.norm.query_norm.scale"] = left.pop(f"{ours}.norm_q.weight")
        bfl[f"{theirs}.norm.key_norm.scale"] = left.pop(f"{ours}.norm_k.weight")
    assert not left
    # Cut out of one another, they share memory, which a file cannot.
    return {name: tensor.clone() for name, tensor in bfl.items()}


@pytest.fixture
def tensors(tiny_source: Source) -> dict[str, torch.Tensor]:
    return load_file(tiny_source.transformer.files[0])


def single_file(source: Source, folder: Path, tensors: dict[str, torch.Tensor]) -> Source:
    """`source` with its transformer in one file that has no config."""
    file = folder / "flux2.safetensors"
    save_file(tensors, file)
    return dataclasses.replace(source, transformer=Weights((file,), None))


def test_every_tensor_lands_as_it_is_in_the_file(tiny_source, tensors):
    transformer = load_transformer(tiny_source, torch.float32, "cpu")
    state = transformer.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert not any(tensor.is_meta for tensor in (*transformer.parameters(), *transformer.buffers()))
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not transformer.training


def test_every_tensor_is_cast(tiny_source, tensors):
    transformer = load_transformer(tiny_source, torch.bfloat16, "cpu")
    state = transformer.state_dict()
    assert all(torch.equal(state[name], tensors[name].bfloat16()) for name in tensors)


def test_an_fp16_base_is_the_file_rounded_to_fp16(tiny_source, tensors):
    transformer = load_transformer(tiny_source, torch.float16, "cpu")
    assert transformer.dtype == torch.float16
    state = transformer.state_dict()
    assert all(torch.equal(state[name], tensors[name].half()) for name in tensors)


@pytest.mark.parametrize("value", [65_536.0, -(2.0**20)])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_a_weight_beyond_fp16_is_named(value, precision, tiny_source, tensors, tmp_path):
    name = "single_transformer_blocks.1.attn.to_out.weight"
    tensors[name][3, 5] = value
    source = single_file(tiny_source, tmp_path, tensors)
    expected = (
        f"mixed_precision = fp16: the weight {name} has a value of {abs(value):g}: expected at most 65504. "
        "Give --mixed_precision=bf16."
    )
    with pytest.raises(ConfigError) as caught:
        load_transformer(source, torch.float16, "cpu", precision)
    assert str(caught.value) == expected
    load_transformer(source, torch.bfloat16, "cpu", precision)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_bfls_single_file_is_the_same_transformer(prefix, tiny_source, tensors, tmp_path):
    renamed = {prefix + name: tensor for name, tensor in bfl_tensors(tensors).items()}
    source = single_file(tiny_source, tmp_path, renamed)
    assert source.spec == TINY
    state = load_transformer(source, torch.float32, "cpu").state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_a_single_file_may_have_diffusers_names(tiny_source, tensors, tmp_path):
    source = single_file(tiny_source, tmp_path, tensors)
    assert source.spec == TINY
    load_transformer(source, torch.float32, "cpu")


def test_tensors_that_do_not_fit_are_all_named(tiny_source, tensors, tmp_path):
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    tensors["img_mod.weight"] = torch.zeros(1)
    tensors["transformer_blocks.0.attn.to_k.weight"] = torch.zeros(192, 191)
    tensors["transformer_blocks.0.attn.to_v.weight"] = torch.zeros(192, 192, dtype=torch.int8)
    source = single_file(tiny_source, tmp_path, tensors)
    with pytest.raises(AccessError) as caught:
        load_transformer(source, torch.float32, "cpu")
    text = str(caught.value)
    assert "flux2.safetensors: missing (1): transformer_blocks.1.attn.to_q.weight" in text
    assert "unknown (1): img_mod.weight" in text
    assert "to_k.weight [192, 191], not [192, 192]" in text
    assert "to_v.weight as I8, not in floating point" in text


@pytest.mark.parametrize(
    ("tensors", "config"), [({"x": torch.zeros(1)}, None), ({"x": torch.zeros(1)}, {"patch_size": 2})]
)
def test_another_file_is_no_flux2_transformer(tensors, config, tiny_source, tmp_path):
    source = single_file(tiny_source, tmp_path, tensors)
    source = dataclasses.replace(source, transformer=dataclasses.replace(source.transformer, config=config))
    with pytest.raises(AccessError, match="expected a FLUX"):
        load_transformer(source, torch.float32, "cpu")


def test_batch_norm_statistics_are_never_cast(tiny_source):
    vae = load_autoencoder(tiny_source, torch.bfloat16, "cpu")._vae
    stored = load_file(tiny_source.vae.files[0])
    assert torch.equal(vae.bn.running_mean, stored["bn.running_mean"])
    assert torch.equal(vae.bn.running_var, stored["bn.running_var"])
    assert vae.encoder.conv_in.weight.dtype == torch.bfloat16


def test_the_text_encoder_has_only_the_layers_that_are_used(tiny_source):
    model = load_text_encoder(tiny_source, torch.float32, "cpu", fix_regex=False)._model
    assert len(model.layers) == 30
    assert isinstance(model.norm, torch.nn.Identity)
    assert model.config._attn_implementation == "sdpa"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    # 1 / theta^(2i / head_dim), and in fp32 whatever the weights are.
    expected = 1e9 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.rotary_emb.inv_freq, expected)
    half = load_text_encoder(tiny_source, torch.bfloat16, "cpu", fix_regex=False)._model
    assert torch.equal(half.rotary_emb.inv_freq, model.rotary_emb.inv_freq)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_text_encoders_of_other_releases(prefix, tiny_source, tmp_path):
    stored = load_file(tiny_source.text_encoder.files[0])
    named = {name.replace("language_model.model.", prefix): tensor for name, tensor in stored.items()}
    file = tmp_path / "model.safetensors"
    save_file(named, file)
    config = tiny_source.text_encoder.config
    if prefix == "model.":  # a text model without eyes
        config = config["text_config"]
    source = dataclasses.replace(tiny_source, text_encoder=Weights((file,), config))
    expected = load_text_encoder(tiny_source, torch.float32, "cpu", fix_regex=False).encode(["a cat"])[0]
    found = load_text_encoder(source, torch.float32, "cpu", fix_regex=False).encode(["a cat"])[0]
    assert torch.equal(found.rows, expected.rows)


def test_layers_that_the_text_encoder_does_not_have(tiny_source):
    with pytest.raises(ConfigError, match=r"intermediary_layers = 10,20,33: expected at most 32"):
        load_text_encoder(
            dataclasses.replace(tiny_source, text_layers=(10, 20, 33)), torch.float32, "cpu", fix_regex=False
        )


def test_a_tokenizer_without_template(tiny_source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_source.tokenizer / name).read_bytes())
    source = dataclasses.replace(tiny_source, tokenizer=tmp_path)
    with pytest.raises(AccessError, match="has no chat template"):
        load_text_encoder(source, torch.float32, "cpu", fix_regex=False)


def test_ids_name_every_setting_that_matters(tiny_source, tmp_path):
    contexts = [
        text_encoder_id(tiny_source, torch.float32, fix_regex=False),
        text_encoder_id(tiny_source, torch.bfloat16, fix_regex=False),
        text_encoder_id(dataclasses.replace(tiny_source, text_layers=(10, 20)), torch.float32, fix_regex=False),
        text_encoder_id(dataclasses.replace(tiny_source, text_length=256), torch.float32, fix_regex=False),
        text_encoder_id(tiny_source, torch.float32, fix_regex=True),
    ]
    config = json.loads((tiny_source.tokenizer / "tokenizer_config.json").read_text())
    for path in tiny_source.tokenizer.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<unk>"}))
    contexts.append(
        text_encoder_id(dataclasses.replace(tiny_source, tokenizer=tmp_path), torch.float32, fix_regex=False)
    )
    for change in ({"system_message": "another"}, {"padding_side": "right"}):
        flavour = dataclasses.replace(tiny_source.flavour, text=dataclasses.replace(tiny_source.flavour.text, **change))
        contexts.append(
            text_encoder_id(dataclasses.replace(tiny_source, flavour=flavour), torch.float32, fix_regex=False)
        )
    latents = [
        autoencoder_id(tiny_source, dtype, tiling=tiling, slicing=slicing)
        for dtype in (torch.float32, torch.bfloat16)
        for tiling in (False, True)
        for slicing in (False, True)
    ]
    assert len({*contexts, *latents}) == len(contexts) + len(latents)
    assert text_encoder_id(tiny_source, torch.float32, fix_regex=False) == contexts[0]


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_file(tiny_source, tmp_path, value, precision):
    name = "transformer_blocks.1.attn.to_q.weight"
    file = tmp_path / "damaged.safetensors"
    tensors = load_file(tiny_source.transformer.files[0])
    tensors[name][3, 5] = value
    save_file(tensors, file)
    damaged = dataclasses.replace(tiny_source, transformer=Weights((file,), tiny_source.transformer.config))
    with pytest.raises(AccessError, match=rf"damaged\.safetensors: 1 of 36,864 numbers of {name} are NaN or inf"):
        load_transformer(damaged, torch.bfloat16, "cpu", precision)
    with pytest.raises(AccessError, match="NaN or inf"):
        load_transformer(damaged, torch.float16, "cpu", precision)


def test_missing_tensors_are_known_before_a_weight_is_read(tiny_source, tmp_path):
    file = tmp_path / "part.safetensors"
    tensors = load_file(tiny_source.transformer.files[0])
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, file)
    part = dataclasses.replace(tiny_source, transformer=Weights((file,), tiny_source.transformer.config))
    with pytest.raises(AccessError, match=r"part\.safetensors: missing \(1\): transformer_blocks\.1\.attn\.to_q"):
        checked_skeleton(part)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": {"rope_type": "of tomorrow"}},
        {"hidden_act": "of tomorrow"},
        {"num_key_value_heads": 3},
        {"sliding_window": "x"},
    ],
)
def test_values_of_a_text_encoders_config_that_no_model_is_built_from_are_an_error(tiny_source, wrong):
    config = tiny_source.text_encoder.config
    config = config | {"text_config": config["text_config"] | wrong}
    source = dataclasses.replace(tiny_source, text_encoder=Weights(tiny_source.text_encoder.files, config))
    with pytest.raises(AccessError):
        load_text_encoder(source, torch.float32, "cpu", fix_regex=False)
