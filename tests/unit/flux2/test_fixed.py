"""Fixed adapters against the model whose weights have the deltas added."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lora_dialects import DrawAdapter, draw_loha, draw_lokr, write_dialect
from tests.unit.flux2.test_export import SPEC, model, trained, velocity
from torch import Tensor, nn

from simpletuner.base.errors import CheckpointError
from simpletuner.flux2 import fixed
from simpletuner.flux2.dialects import AdapterFile
from simpletuner.flux2.export import LoadedLora, save_lora
from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank
from simpletuner.flux2.fixed import FixedLinear, attach_fixed, delta_product, read_for_sampling
from simpletuner.flux2.lora import detach, linears
from simpletuner.memory.precision import QuantizedLinear

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order_of_tests() -> None:
    GENERATOR.manual_seed(7)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR) * 0.3


def low_rank(rows: int, columns: int) -> Factors:
    return LowRank(drawn(3, columns), drawn(rows, 3), 0.5)


def kronecker(rows: int, columns: int) -> Factors:
    return Kronecker(drawn(4, 2), drawn(rows // 4, columns // 2), 0.5)


def wide_kronecker(rows: int, columns: int) -> Factors:
    return Kronecker(drawn(rows // 2, columns // 4), drawn(2, 4), 0.5)


def part_of_kronecker(rows: int, columns: int) -> Factors:
    """Of a matrix three times as high, cut within copies of w2."""
    whole = Kronecker(drawn(rows // 2, columns // 4), drawn(6, 4))
    return whole.selected_rows([(rows + rows // 2, 2 * rows), (rows, rows + rows // 2)])


def hadamard(rows: int, columns: int) -> Factors:
    return Hadamard(drawn(2, columns), drawn(rows, 2), drawn(2, columns), drawn(rows, 2), 2.0)


def hadamard_of_high_rank(rows: int, columns: int) -> Factors:
    return Hadamard(drawn(9, columns), drawn(rows, 9), drawn(9, columns), drawn(rows, 9), 0.25)


KINDS = [low_rank, kronecker, wide_kronecker, part_of_kronecker, hadamard, hadamard_of_high_rank]


def written_out(factors: Factors) -> Tensor:
    """ΔW from its definition, in fp64 and without the methods of `factors`."""
    if isinstance(factors, LowRank):
        return torch.einsum("or,ri->oi", factors.b.double(), factors.a.double()) * factors.scale
    if isinstance(factors, Kronecker):
        blocks = torch.einsum("ab,cd->acbd", factors.w1.double(), factors.w2.double())
        whole = blocks.reshape(len(factors.w1) * len(factors.w2), -1) * factors.scale
        return whole if factors.ranges is None else torch.cat([whole[slice(*own)] for own in factors.ranges])
    one = torch.einsum("or,ri->oi", factors.w1_b.double(), factors.w1_a.double())
    other = torch.einsum("or,ri->oi", factors.w2_b.double(), factors.w2_a.double())
    return one * other * factors.scale


def adapter_of(make: Callable[[int, int], Factors] | Iterator[Callable[[int, int], Factors]]) -> AdapterFile:
    """Factors for every Linear, of one kind or of each in turn."""
    modules = {}
    for name, linear in linears(model()).items():
        own = make if callable(make) else next(make)
        modules[name] = own(linear.out_features, linear.in_features)
    return AdapterFile(Path("other.safetensors"), "comfyui", modules)


def merged(*adapters: tuple[AdapterFile, float]) -> Tensor:
    """The velocity of the model whose weights have the deltas added."""
    transformer = model()
    for adapter, strength in adapters:
        for name, factors in adapter.modules.items():
            weight = transformer.get_submodule(name).weight
            weight.data = (weight.double() + strength * written_out(factors)).float()
    return velocity(transformer)


@pytest.mark.parametrize("make", KINDS)
def test_an_adapter_at_nothing_changes_no_bit(make: Callable[[int, int], Factors]) -> None:
    wanted = velocity(model())
    transformer = model()
    layers = attach_fixed(transformer, adapter_of(make))
    for layer in layers.values():
        layer.scale = 0.0
    assert torch.equal(velocity(transformer), wanted)
    for layer in layers.values():
        layer.scale, layer.is_enabled = 1.0, False
    assert torch.equal(velocity(transformer), wanted)
    for layer in layers.values():
        layer.is_enabled = True
    assert not torch.allclose(velocity(transformer), wanted, atol=1e-2)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("rows_at_once", [1, 2**24])
def test_a_product_is_that_of_the_delta_written_out(
    make: Callable[[int, int], Factors], rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed, "_SLICE", rows_at_once)
    for rows, columns in ((48, 32), (32, 96)):
        factors = make(rows, columns)
        assert factors.shape == (rows, columns)
        torch.testing.assert_close(factors.delta().double(), written_out(factors), rtol=1e-5, atol=1e-6)
        for shape in ((columns,), (5, columns), (2, 5, columns)):
            x = drawn(*shape)
            wanted = (x.double() @ written_out(factors).T).float()
            found = delta_product(factors, x) * factors.scale
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", KINDS)
def test_an_adapter_acts_as_if_it_were_in_the_weights(make: Callable[[int, int], Factors]) -> None:
    adapter = adapter_of(make)
    transformer = model()
    layers = attach_fixed(transformer, adapter)
    assert len(layers) == len(linears(model()))
    found = velocity(transformer)
    scale = merged((adapter, 1.0))
    torch.testing.assert_close(found, scale, rtol=1e-5, atol=1e-5 * scale.abs().max().item())


def test_several_of_any_kind_add_up_with_a_lora_between_and_come_off_again() -> None:
    turns = iter(KINDS * 20)
    one, other = adapter_of(turns), adapter_of(turns)
    transformer = model()
    before = linears(transformer)
    below = attach_fixed(transformer, one)
    lora = trained(transformer)
    above = attach_fixed(transformer, other)
    assert linears(transformer).keys() == before.keys()
    for layer in below.values():
        layer.scale *= 0.5
    for layer in above.values():
        layer.scale *= -0.25
    with lora.disabled():
        found, wanted = velocity(transformer), merged((one, 0.5), (other, -0.25))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert not torch.allclose(velocity(transformer), found, atol=1e-3)

    with pytest.raises(ValueError, match="another adapter on top"):
        detach(transformer, lora.layers)
    for layers in (above, lora.layers, below):
        detach(transformer, layers)
    after = linears(transformer)
    assert all(after[name] is linear for name, linear in before.items())
    assert torch.equal(velocity(transformer), velocity(model()))


@pytest.mark.parametrize("make", KINDS)
def test_an_adapter_on_a_quantized_linear_adds_its_delta(make: Callable[[int, int], Factors]) -> None:
    base = QuantizedLinear((96, 64), "int8-torchao", torch.float32)
    base.data.copy_(drawn(96, 64) * 300)
    base.scale.copy_(drawn(96, 1) / 100)
    layer = FixedLinear(base, make(96, 64))
    x = drawn(5, 64)
    delta = (x.double() @ written_out(layer.factors).T).float()
    torch.testing.assert_close(layer(x), base(x) + delta, rtol=1e-5, atol=1e-5)
    layer.is_enabled = False
    assert torch.equal(layer(x), base(x))


def test_numbers_of_a_file_are_kept_in_its_type_and_computed_in_the_models() -> None:
    factors = Kronecker(drawn(4, 2).half(), drawn(12, 32).half(), 0.5)
    layer = FixedLinear(nn.Linear(64, 48, bias=False), factors)
    assert isinstance(layer.factors, Kronecker)
    assert layer.factors.w2.dtype == torch.float16
    x = drawn(5, 64)
    wanted = layer.base(x) + (x.double() @ written_out(factors).T).float()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    layer.base.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_layer_of_another_model_is_refused() -> None:
    name = "transformer_blocks.0.attn.to_q"
    wrong = {"has another shape": low_rank(8, 32), "is not there": low_rank(32, 32)}
    for names, factors in zip((name, "transformer_blocks.9.attn.to_q"), wrong.values(), strict=True):
        transformer = model()
        adapter = AdapterFile(Path("x.safetensors"), "comfyui", {name: kronecker(32, 32), names: factors})
        with pytest.raises(CheckpointError, match=rf"x\.safetensors does not fit this model: 1 of .*{names}"):
            attach_fixed(transformer, adapter)
        assert not any(isinstance(each, FixedLinear) for each in transformer.modules())


def test_a_lora_is_read_as_it_always_was(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", trained(model()), metadata={})
    assert isinstance(read_for_sampling(tmp_path / "a.safetensors"), LoadedLora)


def test_what_is_no_adapter_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 40, b"GGUF" + b"\0" * 40):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_for_sampling(path)
    with pytest.raises(CheckpointError):
        read_for_sampling(tmp_path / "missing.safetensors")


FUSED, SPLIT = "2b OneTrainer for ComfyUI", "8 OneTrainer legacy"


@pytest.mark.parametrize("row", [FUSED, SPLIT, "4 musubi-tuner", "11 LyCORIS", "2 ai-toolkit, diffusion-pipe"])
@pytest.mark.parametrize("draw", [draw_lokr, draw_loha])
def test_a_file_acts_as_its_formula(tmp_path: Path, row: str, draw: DrawAdapter) -> None:
    """Fused matrices are cut into q, k and v, and the halves of the last modulation exchanged."""
    path = tmp_path / "other.safetensors"
    deltas = write_dialect(path, SPEC, row, draw=draw)
    adapter = read_for_sampling(path)
    assert isinstance(adapter, AdapterFile)
    transformer, reference = model(), model()
    attach_fixed(transformer, adapter)
    assert deltas.keys() == linears(reference).keys() == adapter.modules.keys()
    for name, delta in deltas.items():
        weight = reference.get_submodule(name).weight
        weight.data = (weight.double() + delta).float()
    wanted = velocity(reference)
    torch.testing.assert_close(velocity(transformer), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_a_file_of_several_kinds_is_drawn_with_all(tmp_path: Path) -> None:
    deltas = write_dialect(tmp_path / "lokr.safetensors", SPEC, SPLIT, draw=draw_lokr)
    deltas_of_lora = write_dialect(tmp_path / "lora.safetensors", SPEC, SPLIT)
    lokr, lora = (load_file(tmp_path / f"{name}.safetensors") for name in ("lokr", "lora"))
    is_lora = lambda key: "transformer_blocks.0." in key  # noqa: E731
    both = {key: value for key, value in lokr.items() if not is_lora(key)}
    save_file(both | {key: value for key, value in lora.items() if is_lora(key)}, tmp_path / "both.safetensors")
    adapter = read_for_sampling(tmp_path / "both.safetensors")
    assert isinstance(adapter, AdapterFile)
    for name, factors in adapter.modules.items():
        wanted = (deltas_of_lora if "transformer_blocks.0." in name else deltas)[name].float()
        assert isinstance(factors, LowRank if "transformer_blocks.0." in name else Kronecker)
        torch.testing.assert_close(factors.delta(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("suffix", "says"), [("dora_scale", "DoRA"), ("diff", r"\.diff"), ("oft_blocks", "OFT")])
def test_a_kind_that_is_not_read_is_refused_beside_a_lokr(tmp_path: Path, suffix: str, says: str) -> None:
    also = {f"transformer.norm_out.linear.{suffix}": torch.ones(64, 1)}
    write_dialect(tmp_path / "a.safetensors", SPEC, SPLIT, draw=draw_lokr, also=also)
    with pytest.raises(CheckpointError, match=rf"{says}.*expected LoRA, LoKr or LoHa\. ComfyUI.* can apply it"):
        read_for_sampling(tmp_path / "a.safetensors")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_damaged_number_is_found_before_anything_is_drawn(tmp_path: Path, number: float) -> None:
    write_dialect(tmp_path / "a.safetensors", SPEC, SPLIT, draw=draw_lokr)
    tensors = load_file(tmp_path / "a.safetensors")
    next(value for key, value in tensors.items() if "lokr_w1" in key)[0, 0] = number
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 of"):
        read_for_sampling(tmp_path / "a.safetensors")


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_dialect(path, SPEC, SPLIT, draw=draw_loha)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        read_for_sampling(path)
