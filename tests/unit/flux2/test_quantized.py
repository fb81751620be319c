"""Models quantized as they land: what is and what is not, from every file, within memory, kept, and adapted."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiers import others_slow
from tests.unit.flux2.test_load import bfl_tensors

from simpletuner.base.errors import ConfigError, DiskError
from simpletuner.config.flavours import TINY, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.precisions import PRECISIONS
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import resident_text_bytes
from simpletuner.flux2.load import (
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    text_encoder_id,
)
from simpletuner.flux2.lora import PRESETS, attach
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.spec import text_from_config
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import QuantizedLinear, quantized_tensors

HERE = [name for name, known in PRECISIONS.items() if not known.needs_accelerator]
ONE_OF_EACH_LIBRARY = others_slow(HERE, "int4-quanto", "fp8wo-torchao", "nf4-bnb")
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
TEXT_LAYERS = (1, 2, 4)
BF16 = torch.bfloat16
MEASURED = {
    "int8": (0.02, 0.998),
    "fp8": (0.05, 0.99),
    "int4": (0.12, 0.95),
    "nf4": (0.15, 0.92),
    "int2": (0.5, 0.55),
}
"""Of the velocity, the largest |found - bf16| / |bf16|; of an adapter's gradients, the smallest cosine. What
benchmarks/precision.py measures (docs/precision.md) is up to 60 % of these errors, and of these distances from 1."""


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8)) for name in one
    )


def test_no_change_is_what_it_was(tiny_source):
    plain = load_transformer(tiny_source, BF16, "cpu")
    off = load_transformer(tiny_source, BF16, "cpu", "no_change", quantize_on="cpu", cache_dir=Path("nowhere"))
    assert same(off.state_dict(), plain.state_dict())
    assert not any(isinstance(module, QuantizedLinear) for module in off.modules())
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ONE_OF_EACH_LIBRARY)
def test_the_linears_of_blocks_and_nothing_else(name, tiny_source):
    plain = load_transformer(tiny_source, BF16, "cpu")
    found = load_transformer(tiny_source, BF16, "cpu", name)
    linears = {name: module for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in found.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized == {name for name in linears if name.startswith(BLOCKS)}
    state = found.state_dict()
    for owner, linear in linears.items():
        if owner in quantized:
            own = {key.removeprefix(f"{owner}."): value for key, value in state.items() if key.startswith(f"{owner}.")}
            assert same(own, quantized_tensors(linear.weight.detach(), name))
    rest = {key: value for key, value in plain.state_dict().items() if key.removesuffix(".weight") not in quantized}
    assert same({key: state[key] for key in rest}, rest)
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*found.parameters(), *found.buffers()))


@pytest.fixture(scope="module")
def passed_in_bf16(tiny_source):
    return passed(load_transformer(tiny_source, BF16, "cpu"))


@pytest.mark.parametrize("name", ONE_OF_EACH_LIBRARY)
def test_velocity_and_gradients_are_near_those_of_bf16(name, tiny_source, passed_in_bf16):
    velocity, gradients = passed_in_bf16
    found, others = passed(load_transformer(tiny_source, BF16, "cpu", name))
    error, cosine = MEASURED[name.split("-", maxsplit=1)[0].removesuffix("wo")]
    assert (found - velocity).norm() <= error * velocity.norm()
    assert torch.cosine_similarity(others, gradients, dim=0) >= cosine


def passed(transformer: Flux2Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity, and the gradients of an adapter that has learned something, at 384x384."""
    adapter = attach(transformer, LoraOptions(), seed=0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.b.normal_(std=0.02, generator=draws)
    latents, context = torch.randn(1, 128, 24, 24, generator=draws), torch.randn(1, 64, 192, generator=draws)
    target = torch.randn(latents.shape, generator=draws)
    condition = Condition.at(TextContext.dense(context), 1.0)
    velocity = Denoiser(transformer.train())(latents, torch.tensor([0.6]), condition).float()
    (velocity - target).square().mean().backward()
    return velocity.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto", "fp8wo-torchao", "nf4-bnb"])
def test_under_fp16_the_same_numbers_compute_in_fp16(name, tiny_source):
    base, plain = (load_transformer(tiny_source, dtype, "cpu", name) for dtype in (torch.float16, torch.bfloat16))
    ours, theirs = ({n: m for n, m in it.named_modules() if isinstance(m, QuantizedLinear)} for it in (base, plain))
    assert ours.keys() == theirs.keys() != set()
    for place, layer in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(layer.tensors, theirs[place].tensors, strict=True))
        x = torch.randn(3, layer.in_features, dtype=torch.float16, requires_grad=True)
        out = layer(x)
        assert out.dtype == torch.float16
        out.sum().backward()
        assert x.grad.dtype == torch.float16
    assert base.proj_out.weight.dtype == torch.float16


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_attaches_where_it_does_on_plain_linears(preset, tiny_source):
    """And changes no bit of the output before it has learned something."""
    plain = attach(load_transformer(tiny_source, BF16, "cpu"), LoraOptions(flux_lora_target=preset), seed=3)
    transformer = load_transformer(tiny_source, BF16, "cpu", "int8-quanto")
    draws = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 128, 4, 4, generator=draws), torch.randn(1, 8, 192, generator=draws)
    condition, denoise = Condition.at(TextContext.dense(context), 1.0), Denoiser(transformer)
    with torch.no_grad():
        before = denoise(latents, torch.tensor([0.6]), condition)
        adapter = attach(transformer, LoraOptions(flux_lora_target=preset), seed=3)
        assert torch.equal(denoise(latents, torch.tensor([0.6]), condition), before)
    assert adapter.audit() == plain.audit()
    assert same(adapter.state(), plain.state())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfls_fused_tensors_and_shards_give_the_same(prefix, tiny_source, tmp_path):
    """A block's tensors may lie in several files."""
    tensors = load_file(tiny_source.transformer.files[0])
    expected = load_transformer(tiny_source, BF16, "cpu", "int4-quanto").state_dict()
    renamed = {prefix + name: tensor for name, tensor in bfl_tensors(tensors).items()}
    save_file(renamed, tmp_path / "flux2.safetensors")
    single = dataclasses.replace(tiny_source, transformer=Weights((tmp_path / "flux2.safetensors",), None))
    assert same(load_transformer(single, BF16, "cpu", "int4-quanto").state_dict(), expected)
    shards = dataclasses.replace(sharded(tensors, tmp_path, 3), config=tiny_source.transformer.config)
    spread = dataclasses.replace(tiny_source, transformer=shards)
    assert same(load_transformer(spread, BF16, "cpu", "int4-quanto").state_dict(), expected)


def sharded(tensors: Mapping[str, torch.Tensor], folder: Path, count: int) -> Weights:
    """`tensors` in turn over `count` files, so that every block is in all of them."""
    files = tuple(folder / f"part-{number}.safetensors" for number in range(count))
    names = list(tensors)
    for number, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[number::count]}, file)
    return Weights(files, None)


def test_a_shape_that_does_not_divide_is_refused_before_a_weight_is_read(tiny_source, tmp_path):
    spec = dataclasses.replace(TINY, heads=5, head_dim=16, axes=(4, 4, 4, 4))
    with torch.device("meta"):
        empty = {name: torch.empty(t.shape, device="cpu") for name, t in Flux2Transformer(spec).state_dict().items()}
    source = dataclasses.replace(tiny_source, transformer=sharded(empty, tmp_path, 1))
    with pytest.raises(ConfigError, match=r"int4-quanto cannot hold transformer_blocks.0.attn.to_q and \d+ more"):
        load_transformer(source, BF16, "cpu", "int4-quanto")


# --- kept on disk -----------------------------------------------------------------------------------------------------


def kept(source: Source, folder: Path, told: list[str], precision: str = "int4-quanto", dtype: torch.dtype = BF16):
    return load_transformer(source, dtype, "cpu", precision, cache_dir=folder, report=told.append)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ONE_OF_EACH_LIBRARY)
def test_what_was_kept_is_the_same_and_is_all_that_is_read(name, tiny_source, tmp_path):
    told: list[str] = []
    folder = tmp_path / "kept"
    first = kept(tiny_source, folder, told, name)
    assert len(files(folder)) == 2
    # As a release kept it that knew the heads of tensors only: these name it, and of the source they alone are left.
    (manifest,) = folder.glob("*.json")
    written = json.loads(manifest.read_text())
    del written["content"]
    manifest.write_text(json.dumps(written))
    tensors = load_file(tiny_source.transformer.files[0])
    for tensor in tensors.values():
        tensor.reshape(-1)[4096 // tensor.itemsize :] = 0
    emptied = dataclasses.replace(sharded(tensors, tmp_path, 1), config=tiny_source.transformer.config)
    second = kept(dataclasses.replace(tiny_source, transformer=emptied), folder, told, name)
    assert same(second.state_dict(), first.state_dict())
    # To products with fp32 weights it matters on a CPU where these begin.
    plain = [module for module in second.modules() if not isinstance(module, QuantizedLinear)]
    assert all(own.data_ptr() % 64 == 0 for module in plain for own in module.parameters(recurse=False))
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert not second.training
    assert told == []


def test_another_source_precision_or_type_is_another_one(tiny_source, tmp_path):
    told: list[str] = []
    other = {name: tensor + 1 for name, tensor in load_file(tiny_source.transformer.files[0]).items()}
    (tmp_path / "other").mkdir()
    changed = dataclasses.replace(tiny_source, transformer=sharded(other, tmp_path / "other", 1))
    folder = tmp_path / "kept"
    kept(tiny_source, folder, told)
    kept(tiny_source, folder, told, "int8-quanto")
    kept(tiny_source, folder, told, dtype=torch.float32)
    kept(changed, folder, told)
    assert len(files(folder)) == 8
    assert told == []


def test_one_of_weights_that_changed_after_their_heads_is_made_again(tiny_source, tmp_path):
    told: list[str] = []
    tensors = load_file(tiny_source.transformer.files[0])
    kept(tiny_source, tmp_path / "kept", told)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name].view(-1)[20_000:24_000] += 1
    changed = dataclasses.replace(sharded(tensors, tmp_path, 1), config=tiny_source.transformer.config)
    changed = dataclasses.replace(tiny_source, transformer=changed)
    kept(changed, tmp_path / "kept", told)
    (notice,) = told
    assert "the transformer's weights are not those that int4-quanto-" in notice
    (manifest,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(manifest.read_text())["content"] == changed.fingerprint("transformer", all_bytes=True)


@pytest.mark.parametrize("damage", ["bytes", "short", "missing", "manifest", "foreign"])
def test_a_damaged_one_is_made_again_with_a_notice(damage, tiny_source, tmp_path):
    told: list[str] = []
    expected = {name: tensor.clone() for name, tensor in kept(tiny_source, tmp_path, told).state_dict().items()}
    manifest, weights = sorted(tmp_path.iterdir())
    before = weights.read_bytes()
    about = json.loads(manifest.read_text())
    weights.unlink()  # the model above has it mapped
    if damage == "bytes":
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif damage == "short":
        weights.write_bytes(before[:-1])
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "foreign":
        about["about"]["source"] = "0" * 64
        manifest.write_text(json.dumps(about))
    assert same(kept(tiny_source, tmp_path, told).state_dict(), expected)
    (notice,) = told
    assert notice.startswith(f"The quantized base in {tmp_path} cannot be used; the model is quantized again: ")
    assert weights.read_bytes() == before
    kept(tiny_source, tmp_path, told)
    assert len(told) == 1


def test_a_full_disk_is_named_and_leaves_nothing(tiny_source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DiskError, match="No space left"):
            kept(tiny_source, tmp_path, told)
    assert files(tmp_path) == []
    kept(tiny_source, tmp_path, told)
    assert len(files(tmp_path)) == 2


def test_an_interruption_leaves_nothing_that_is_used(tiny_source, tmp_path, monkeypatch):
    """Between the tensors and their manifest, too."""
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(tiny_source, tmp_path, told)
    assert len(files(tmp_path)) == 1
    kept(tiny_source, tmp_path, told)
    assert len(files(tmp_path)) == 2
    assert told == []


# --- the text encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH_LIBRARY)
def test_a_quantized_text_encoder_has_the_same_bits_resident_and_streamed(name, embedded_source, tmp_path):
    batches = [["", "a cat"], ["a red square on a white background"]]
    source = dataclasses.replace(embedded_source, text_layers=TEXT_LAYERS, text_length=160)
    plain = load_text_encoder(source, torch.float32, "cpu", fix_regex=False)
    resident = load_text_encoder(source, torch.float32, "cpu", fix_regex=False, precision=name)
    streamed = stream_text_encoder(source, torch.float32, "cpu", fix_regex=False, precision=name, folder=tmp_path)
    held = {n for n, module in resident._model.named_modules() if isinstance(module, QuantizedLinear)}
    assert held == {n for n, module in plain._model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(n.startswith("layers.") for n in held)
    expected = [context for batch in plain.encode_batches(batches) for context in batch]
    found = [context for batch in resident.encode_batches(batches) for context in batch]
    others = [context for batch in streamed.encode_batches(batches) for context in batch]
    for reference, one, two in zip(expected, found, others, strict=True):
        assert torch.equal(one.rows, two.rows)
        assert torch.equal(one.index, two.index)
        assert not torch.equal(one.rows, reference.rows)
        error, _ = MEASURED[name.split("-", maxsplit=1)[0].removesuffix("wo")]
        assert (one.rows - reference.rows).norm() <= error * reference.rows.norm()


def test_contexts_of_another_precision_are_others(tiny_source):
    names = ["no_change", *PRECISIONS]
    ids = [text_encoder_id(tiny_source, BF16, fix_regex=False, precision=name) for name in names]
    assert len({*ids}) == len(names)
    assert ids[0] == text_encoder_id(tiny_source, BF16, fix_regex=False)


@pytest.mark.parametrize("name", ONE_OF_EACH_LIBRARY)
def test_bytes_of_a_quantized_text_encoder(name, tiny_source):
    source = dataclasses.replace(tiny_source, text_layers=TEXT_LAYERS)
    model = load_text_encoder(source, BF16, "cpu", fix_regex=False, precision=name)._model
    held = sum(tensor.nbytes for tensor in model.parameters())
    text = text_from_config(tiny_source.text_encoder.config)
    weights, beside = resident_text_bytes(text, TEXT_LAYERS, tokens=0, precision=name, dtype=BF16)
    assert (weights, beside) == (held, 64 * 128 * 2), "and one plain weight of the widest"


# --- within memory ----------------------------------------------------------------------------------------------------

LARGE = TransformerSpec(
    heads=8, head_dim=128, double_blocks=2, single_blocks=14, context_dim=1024, guidance_embeds=True
)

BOUNDED = """
import dataclasses, hashlib, json, resource, sys
from pathlib import Path
import torch
from safetensors import safe_open
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.source import Source, Weights
from simpletuner.config.flavours import FLAVOURS
from simpletuner.flux2.spec import text_from_config
from simpletuner.memory.precision import quantized

mode, allowed, precision, files = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
none = Weights((), None)
weights = Weights(tuple(map(Path, files)), None)
source = Source("large", FLAVOURS["tiny"], None, weights, none, none, Path(), (10, 20, 30), 512, None)
quantized(torch.nn.Linear(128, 128, bias=False), precision)  # so that every library has what it takes

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

resource.setrlimit(resource.RLIMIT_DATA, (status("VmData:") + allowed,) * 2)
if mode == "copied":
    copies = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            copies |= {name: tensors.get_tensor(name).clone() for name in tensors.keys()}
transformer = load_transformer(source, torch.bfloat16, "cpu", precision)
digest = hashlib.sha256()
for name, tensor in sorted(transformer.state_dict().items()):
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Weights:
    """A transformer of dev's build, of fewer and narrower blocks, in bf16 shards; all blocks have the same numbers."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux2Transformer(LARGE).state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    drawn: dict[tuple[str, torch.Size], torch.Tensor] = {}
    tensors = {}
    for name, shape in shapes.items():
        key = (name.rpartition(".attn")[2] if name.startswith(BLOCKS) else name, shape)
        if key not in drawn:
            drawn[key] = (torch.randn(shape, generator=draws) * 0.02).bfloat16()
        tensors[name] = drawn[key].clone()
    return sharded(tensors, tmp_path_factory.mktemp("large"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4-quanto", "int8-torchao"])
def test_a_model_larger_than_the_memory_lands_quantized(name, large, tiny_source):
    """The limit holds for all that a process writes to: it is the quantized model and one block as it is in the file.

    The allocator gives larger pieces back as soon as they are let go, so that what it keeps is not measured.
    """
    source = dataclasses.replace(tiny_source, transformer=large)
    state = load_transformer(source, BF16, "cpu", name).state_dict()
    model = sum(tensor.nbytes for tensor in state.values())
    with torch.device("meta"):
        block = Flux2Transformer(LARGE).transformer_blocks[0]
    allowed = model + 2 * sum(parameter.numel() for parameter in block.parameters())
    on_disk = sum(file.stat().st_size for file in large.files)
    assert on_disk > 1.2 * allowed

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BOUNDED, mode, str(allowed), name, *map(str, large.files)]
        settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=settings)

    landed = run("landed")
    assert landed.returncode == 0, landed.stderr
    assert landed.stdout.strip() == digest(state)
    copied = run("copied")
    assert copied.returncode != 0
    assert "memory" in copied.stderr.lower()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
