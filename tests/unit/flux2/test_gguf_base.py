"""A GGUF file as the base model: its values are the package's, and a LoRA trains over them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.gguf_files import HALVES, write_gguf
from tests.unit.flux2.test_load import bfl_tensors
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.lora import attach
from simpletuner.flux2.names import from_bfl
from simpletuner.flux2.source import Source, Weights, locate
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2,
    head_dim=128,
    double_blocks=1,
    single_blocks=1,
    context_dim=256,
    guidance_embeds=True,
    axes=(32, 32, 32, 32),
)
TYPES = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_mlp.0",
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
)


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return bfl_tensors(dict(Flux2Transformer(SPEC).state_dict()), SPEC)


def quantized(plain: Mapping[str, Tensor], name: str, *, everything: bool = True) -> dict[str, str]:
    """The type `name` for every matrix of the blocks, or for `TYPES` alone."""
    matrices = [it for it in plain if "blocks." in it and it.endswith(".weight") and plain[it].ndim == 2]
    return {it: name for it in matrices if everything or it.removesuffix(".weight") in TYPES}


def based_on(source: Source, file: Path) -> Source:
    return dataclasses.replace(source, transformer=Weights((file,), None))


def as_diffusers(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in values.items():
        renamed = from_bfl(name)
        assert renamed is not None
        found |= dict(zip(renamed.names, renamed.split(tensor), strict=True))
    return found


def test_the_loaded_values_are_the_packages(plain: dict[str, Tensor], tiny_source: Source, tmp_path: Path) -> None:
    matrices = list(quantized(plain, "Q8_0"))
    every = {name: list(HALVES)[index % len(HALVES)] for index, name in enumerate(matrices)}
    assert set(every.values()) == set(HALVES)
    expected = as_diffusers(write_gguf(tmp_path / "a.gguf", plain, every))
    for dtype in (torch.float32, torch.bfloat16):
        found = load_transformer(based_on(tiny_source, tmp_path / "a.gguf"), dtype, "cpu").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[it], expected[it].to(dtype)) for it in expected)


def test_plain_types_give_what_a_safetensors_file_gives(
    plain: dict[str, Tensor], tiny_source: Source, tmp_path: Path
) -> None:
    """Nothing quantized: the file's own bits, with a prefix and without an architecture too."""
    mixed = {name: tensor.to(torch.bfloat16) if tensor.ndim == 2 else tensor for name, tensor in plain.items()}
    write_gguf(tmp_path / "a.gguf", mixed, {}, prefix="model.diffusion_model.", architecture=None)
    found = load_transformer(based_on(tiny_source, tmp_path / "a.gguf"), torch.bfloat16, "cpu").state_dict()
    expected = as_diffusers(mixed)
    assert all(torch.equal(found[it], expected[it].to(torch.bfloat16)) for it in expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_a_lora_trains_over_it_as_over_the_decoded_weights(
    name: str, plain: dict[str, Tensor], tiny_source: Source, tmp_path: Path
) -> None:
    values = write_gguf(tmp_path / "a.gguf", plain, quantized(plain, name, everything=False))
    loaded = load_transformer(based_on(tiny_source, tmp_path / "a.gguf"), torch.float32, "cpu")
    reference = Flux2Transformer(SPEC).eval()
    reference.load_state_dict(as_diffusers(values))
    gradients = []
    for transformer in (loaded, reference):
        adapter = attach(transformer, LoraOptions(lora_rank=2), seed=0)
        for parameter in adapter.parameters():
            parameter.data.add_(0.01)
        generator = torch.Generator().manual_seed(1)
        out = transformer(
            torch.randn(1, 4, 128, generator=generator),
            torch.randn(1, 3, SPEC.context_dim, generator=generator),
            torch.tensor([0.5]),
            torch.tensor([4.0]),
            image_ids(2, 2),
            context_ids(3),
        )
        out.square().mean().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_it_is_quantized_again_as_decoded_weights_are(
    plain: dict[str, Tensor], tiny_source: Source, tmp_path: Path
) -> None:
    values = write_gguf(tmp_path / "a.gguf", plain, quantized(plain, "Q4_0"))
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, tmp_path / "a.safetensors")
    one, other = (
        load_transformer(based_on(tiny_source, tmp_path / file), torch.bfloat16, "cpu", "int8-torchao").state_dict()
        for file in ("a.gguf", "a.safetensors")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[it], other[it]) for it in one)


def test_another_model_is_refused_by_its_header(plain: dict[str, Tensor], tiny_source: Source, tmp_path: Path) -> None:
    write_gguf(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": torch.ones(2, 2)}, {}, architecture="llama")
    with pytest.raises(AccessError, match=r"GGUF file of the architecture llama.*Text encoders"):
        load_transformer(based_on(tiny_source, tmp_path / "llama.gguf"), torch.float32, "cpu")
    some = {name: tensor for name, tensor in plain.items() if "single_blocks" not in name}
    write_gguf(tmp_path / "part.gguf", some, {})
    with pytest.raises(AccessError, match=r"has no tensor .single_transformer_blocks"):
        load_transformer(based_on(tiny_source, tmp_path / "part.gguf"), torch.float32, "cpu")


def test_it_is_named_as_any_single_file_is(tiny_folder: Path, tmp_path: Path) -> None:
    tensors = bfl_tensors(load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    blocks = {name: "Q8_0" for name in tensors if "blocks." in name and tensors[name].ndim == 2}
    write_gguf(tmp_path / "tiny-Q8_0.gguf", tensors, blocks)
    base = str(tmp_path / "tiny-Q8_0.gguf")
    own = {"model_flavour": "tiny", "cache_dir": str(tmp_path / "cache")}
    source = locate(ModelOptions(**own, pretrained_model_name_or_path=base), report=print)
    assert (source.name, source.transformer.files) == ("tiny-Q8_0.gguf", (Path(base),))
    assert source.spec == locate(ModelOptions(**own), report=print).spec
    for component in ("vae", "text_encoder"):
        wrong = {f"pretrained_{component}_model_name_or_path": base}
        with pytest.raises(AccessError, match=r"tiny-Q8_0\.gguf holds a transformer of FLUX.2: expected its"):
            locate(ModelOptions(**own, **wrong), report=print)
    (tmp_path / "empty.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    with pytest.raises(AccessError, match=r"empty\.gguf holds none of the components of FLUX.2"):
        locate(ModelOptions(**own, pretrained_model_name_or_path=str(tmp_path / "empty.gguf")), report=print)
