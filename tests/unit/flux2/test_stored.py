"""Weights as files hold them: each format's values are those computed by hand, bit for bit, whoever reads them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.gguf_files import write_gguf
from tests.quantized_files import FORMATS, HELD, layer, write_quantized
from tests.unit.flux2.test_load import bfl_tensors
from tests.unit.flux2.test_sharded_load import SHARDING, WIDE, as_rank, assert_own_rows, peak_while, the_same
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.config.flavours import TINY
from simpletuner.flux2.load import checked_skeleton, load_text_encoder, load_transformer, stream_text_encoder
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.stored import open_stored, stored_weights
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import QuantizedLinear
from simpletuner.memory.shard import local_bytes


@pytest.fixture(scope="module")
def tensors(tiny_folder: Path) -> dict[str, Tensor]:
    return load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")


def with_file(source: Source, file: Path) -> Source:
    return dataclasses.replace(source, transformer=Weights((file,), None))


def weights_of(transformer: Flux2Transformer) -> dict[str, Tensor]:
    """Every weight as plain numbers."""
    found = dict(transformer.named_parameters())
    for name, module in transformer.named_modules():
        if isinstance(module, QuantizedLinear):
            for own in module.names:
                del found[f"{name}.{own}"]
            found[f"{name}.weight"] = module.weight
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_computed_by_hand(kind: str, tmp_path: Path) -> None:
    """Two tiles of rows and a part of one, and of scales; any rows are those rows of the whole."""
    made = layer(kind, 288, 320 if kind == "mxfp8" else 336)
    file = tmp_path / "model.safetensors"
    text = {"weight": "layer.weight"}
    named = {text.get(last, f"layer.{last}"): tensor for last, tensor in made.tensors.items()}
    save_file(
        named, file, {"_quantization_metadata": json.dumps({"layers": {"layer": made.marker} if made.marker else {}})}
    )
    stored = stored_weights((file,))
    assert list(stored) == ["layer.weight"]
    assert stored["layer.weight"].shape == made.values.shape
    assert stored["layer.weight"].precision == HELD.get(kind)
    with open_stored(stored) as weights:
        assert the_same(weights.values("layer.weight"), made.values)
        assert the_same(weights.values("layer.weight", torch.bfloat16), made.values.bfloat16())
        for rows in (slice(0, 1), slice(31, 130), slice(127, 288), slice(5, 5)):
            assert the_same(weights.values("layer.weight", rows=rows), made.values[rows])
        index = torch.tensor([[3, 200], [3, 0]])
        assert the_same(weights.gathered("layer.weight", index, torch.float32), made.values[index])


@pytest.mark.parametrize(
    ("kind", "prefix", "style"),
    [
        ("fp8", "diffusion_model.", "old"),
        ("fp8-unscaled", "", "markers"),
        ("int8-rows", "", "metadata"),
        ("nvfp4", "model.diffusion_model.", "markers"),
        *(
            pytest.param(kind, "model.diffusion_model.", "markers", marks=pytest.mark.slow)
            for kind in FORMATS
            if kind not in ("fp8-unscaled", "nvfp4")
        ),
    ],
)
def test_a_quantized_base_has_the_files_values(
    kind: str, prefix: str, style: str, tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """BFL's fused and swapped tensors too; what a precision of ours holds stays as it is, the rest is decoded."""
    file = tmp_path / "flux2.safetensors"
    values = write_quantized(file, bfl_tensors(tensors), kind, prefix=prefix, style=style)
    save_file(values, tmp_path / "plain.safetensors")
    source, plain = (with_file(tiny_source, tmp_path / name) for name in ("flux2.safetensors", "plain.safetensors"))
    assert source.spec == TINY
    checked_skeleton(source)
    expected = dict(load_transformer(plain, torch.bfloat16, "cpu").named_parameters())
    found = load_transformer(source, torch.bfloat16, "cpu")
    held = {name: each for name, each in found.named_modules() if isinstance(each, QuantizedLinear)}
    assert {each.layout.precision for each in held.values()} == ({HELD[kind]} if kind in HELD else set())
    assert not held or len(held) == 2 * 12 + 2 * TINY.single_blocks
    weights = weights_of(found)
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not the_same(weights[name], expected[name])] == []
    assert not any(weight.requires_grad for weight in found.parameters())
    if kind in HELD:
        trained = load_transformer(source, torch.bfloat16, "cpu", is_plain=True)
        assert all(the_same(own, expected[name]) for name, own in trained.named_parameters())


def test_scales_of_one_change_nothing(tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """A base whose weights fp8 holds exactly is the same base in fp8, and computes the same bits."""
    exact = {name: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(exact, tmp_path / "plain.safetensors")
    write_quantized(tmp_path / "fp8.safetensors", tensors, "fp8-unscaled")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 192, generator=generator).bfloat16()
    plain, held = (
        load_transformer(with_file(tiny_source, tmp_path / name), torch.bfloat16, "cpu")
        for name in ("plain.safetensors", "fp8.safetensors")
    )
    for name, weight in weights_of(held).items():
        assert the_same(weight, plain.get_parameter(name))
    name = "transformer_blocks.0.attn.to_q"
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, other = plain.get_submodule(name)(a), held.get_submodule(name)(b)
    assert isinstance(held.get_submodule(name), QuantizedLinear)
    assert the_same(out, other)
    out.sum().backward()
    other.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert the_same(a.grad, b.grad)


@pytest.mark.parametrize("precision", [pytest.param("int8-quanto", marks=pytest.mark.slow), "fp8wo-torchao"])
def test_another_precision_quantizes_the_values_and_its_own_is_kept(
    precision: str, tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    values = write_quantized(tmp_path / "fp8.safetensors", bfl_tensors(tensors), "fp8")
    save_file(values, tmp_path / "plain.safetensors")
    own, decoded, kept = (
        load_transformer(with_file(tiny_source, tmp_path / f"{name}.safetensors"), torch.bfloat16, "cpu", asked)
        for name, asked in (("fp8", precision), ("plain", precision), ("fp8", "no_change"))
    )
    expected = decoded if precision == "int8-quanto" else kept
    other = kept if precision == "int8-quanto" else decoded
    state = expected.state_dict()
    assert state.keys() == own.state_dict().keys()
    assert all(the_same(tensor, state[name]) for name, tensor in own.state_dict().items())
    scale = "transformer_blocks.0.attn.to_q.scale"
    assert not the_same(other.state_dict()[scale], state[scale])


@pytest.mark.parametrize(
    "kind", ["int8-rows", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "nvfp4"))]
)
def test_each_rank_holds_its_rows(kind: str, tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "flux2.safetensors"
    write_quantized(file, bfl_tensors(tensors), kind)
    source = with_file(tiny_source, file)
    for precision in ("no_change", *(["int8-quanto"] if kind == "fp8" else [])):
        whole = load_transformer(source, torch.bfloat16, "cpu", precision)
        for rank in (0, 2):
            with as_rank(rank, 3):
                assert_own_rows(load_transformer(source, torch.bfloat16, "cpu", precision, sharding=SHARDING), whole)


def test_of_an_all_in_one_checkpoint_each_component_is_its_own(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    others = {
        "vae.encoder.conv_in.weight": torch.ones(1),
        "text_encoders.mistral3_24b.transformer.model.layers.0.input_layernorm.weight": torch.ones(2),
        "text_encoders.mistral3_24b.tekken_model": torch.ones(3, dtype=torch.uint8),
    }
    bfl = bfl_tensors(tensors)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in bfl.items()} | others, file)
    assert stored_weights((file,)).keys() == bfl.keys()
    assert list(stored_weights((file,), "vae")) == ["encoder.conv_in.weight"]
    text = stored_weights((file,), "text_encoder")
    assert set(text) == {"model.layers.0.input_layernorm.weight", "tekken_model"}
    assert text["tekken_model"].name == "text_encoders.mistral3_24b.tekken_model"


def test_damaged_numbers_are_named(tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Those that stay as they are have no NaN in fp8, and no infinite scale."""
    name = "single_transformer_blocks.1.attn.to_out"
    write_quantized(tmp_path / "fp8.safetensors", tensors, "fp8", style="metadata")
    stored = load_file(tmp_path / "fp8.safetensors")
    stored[f"{name}.weight"].view(torch.uint8)[-1, 7] = 0xFF
    save_file(stored, tmp_path / "number.safetensors")
    stored[f"{name}.weight_scale"].fill_(torch.inf)
    save_file(stored, tmp_path / "scale.safetensors")
    for file, found in (("number", f"1 of [\\d,]+ numbers of {name}.weight"), ("scale", "numbers of the scales of")):
        source = with_file(tiny_source, tmp_path / f"{file}.safetensors")
        with pytest.raises(AccessError, match=rf"{found}.* NaN or infinite"):
            load_transformer(source, torch.bfloat16, "cpu")
        with as_rank(1, 2), pytest.raises(AccessError, match=rf"{found}.* NaN or infinite"):
            load_transformer(source, torch.bfloat16, "cpu", sharding=SHARDING)
    with pytest.raises(AccessError, match=rf"{name}.weight are NaN or infinite"):
        load_transformer(source, torch.bfloat16, "cpu", is_plain=True)


def test_fingerprints_tell_formats_of_the_same_bytes_apart(
    tiny_source: Source, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    stored, prints = [], {tiny_source.fingerprint("transformer")}
    for kind in ("int8-rows", "int8-convrot"):
        file = tmp_path / f"{kind}.safetensors"
        write_quantized(file, tensors, kind, style="metadata")
        stored.append(load_file(file))
        prints.add(with_file(tiny_source, file).fingerprint("transformer"))
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    assert len(prints) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_quantized_text_encoder_encodes_as_its_values(kind: str, tiny_source: Source, tmp_path: Path) -> None:
    stored = load_file(tiny_source.text_encoder.files[0])
    renamed = {name.replace("language_model.model.", "model."): tensor for name, tensor in stored.items()}
    written: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    described: dict[str, object] = {}
    for index, (name, tensor) in enumerate(renamed.items()):
        written[name] = values[name] = tensor
        if name.startswith("model.layers.") and tensor.ndim == 2 and not tensor.shape[1] % 16:
            made = layer(kind, *tensor.shape, seed=index)
            owner = name.removesuffix(".weight")
            written |= {f"{owner}.{last}": own for last, own in made.tensors.items()}
            values[name], described[owner] = made.values, made.marker
    assert described
    save_file(written, tmp_path / "own.safetensors", {"_quantization_metadata": json.dumps({"layers": described})})
    save_file(values, tmp_path / "plain.safetensors")
    rows = []
    for name in ("own", "plain"):
        config = tiny_source.text_encoder.config
        source = dataclasses.replace(tiny_source, text_encoder=Weights((tmp_path / f"{name}.safetensors",), config))
        encoder = load_text_encoder(source, torch.bfloat16, "cpu", fix_regex=False)
        is_held = any(isinstance(each, QuantizedLinear) for each in encoder._model.modules())
        assert is_held == (name == "own" and kind == "fp8")
        rows.append(encoder.encode(["a cat"])[0].rows)
        if name == "own":
            streamed = stream_text_encoder(source, torch.bfloat16, "cpu", folder=tmp_path, fix_regex=False)
            rows.append(streamed.encode(["a cat"])[0].rows)
    assert all(torch.equal(rows[0], each) for each in rows)


@pytest.mark.parametrize("kind", ["fp8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mxfp8", "Q4_K"))])
def test_loading_takes_no_more_than_a_block_beside_the_model(
    kind: str, tiny_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux2Transformer(WIDE).state_dict().items()}
    blocks = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "blocks." in name}
    written = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if kind == "Q4_K":
        file = tmp_path / "wide.gguf"
        write_gguf(file, written, dict.fromkeys(blocks, kind))
    else:
        file = tmp_path / "wide.safetensors"
        made = {shape: layer(kind, *shape) for shape in set(blocks.values())}
        described = {}
        for name, shape in blocks.items():
            owner = name.removesuffix(".weight")
            written |= {f"{owner}.{last}": tensor.clone() for last, tensor in made[shape].tensors.items()}
            described[owner] = made[shape].marker
        save_file(written, file, {"_quantization_metadata": json.dumps({"layers": described})})
        del made
    del written
    source = with_file(tiny_source, file)
    transformer = load_transformer(source, torch.bfloat16, "cpu")
    whole = local_bytes(transformer.parameters())
    block = max(local_bytes(each.parameters()) for each in transformer.blocks)
    del transformer
    peak = peak_while(lambda: load_transformer(source, torch.bfloat16, "cpu"), monkeypatch)
    assert 0.7 * whole < peak < whole + block, (peak, whole, block)
