"""Quantized Linears: the libraries' own numbers, in tensors of known size, under autograd."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.base.errors import ConfigError
from simpletuner.config.precisions import PRECISIONS
from simpletuner.memory import precision as subject
from simpletuner.memory.precision import (
    QuantizedLinear,
    check_precision,
    quantizable_linears,
    quantized,
    quantized_tensors,
    replace_by_empty,
    stored_bytes,
)

NAMES = list(PRECISIONS)
ROWS = [name for name, known in PRECISIONS.items() if known.group is None]
HERE = [name for name, known in PRECISIONS.items() if not known.needs_accelerator]
SHAPES = [(96, 192), (160, 96), (16, 128), (64, 64)]
ERROR = {"int8": 0.01, "fp8": 0.05, "int4": 0.12, "nf4": 0.12, "int2": 0.5}
"""Largest |found - plain| / |plain| of a product with normal weights; measured are about half of these."""


def linear(shape: tuple[int, int] = (96, 192), dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    made = nn.Linear(shape[1], shape[0], bias=False)
    nn.init.normal_(made.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return made.to(dtype)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        made = quantized(linear(shape, dtype), name)
        assert stored_bytes(shape, name, dtype.itemsize) == sum(tensor.nbytes for tensor in made.parameters())
        assert not any(tensor.requires_grad for tensor in made.parameters())
        assert not list(made.buffers())
        module = nn.Sequential(linear(shape, dtype))
        with torch.device("meta"):
            replace_by_empty(module, quantizable_linears(module, ("",), name), name, dtype)
        room = module[0].state_dict()
        assert {k: (t.shape, t.dtype) for k, t in room.items()} == {
            k: (t.shape, t.dtype) for k, t in made.state_dict().items()
        }


def test_plain_weights_have_their_plain_size() -> None:
    assert stored_bytes((6144, 6144), "no_change", 2) == 6144 * 6144 * 2


@pytest.mark.parametrize(("name", "bits"), [("int8-quanto", 8.01), ("int4-quanto", 4.25), ("nf4-bnb", 4.13)])
def test_bits_of_a_weight_of_dev(name: str, bits: float) -> None:
    shape = (55296, 6144)
    assert stored_bytes(shape, name, 2) * 8 / (shape[0] * shape[1]) == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_are_the_librarys_own(name: str, dtype: torch.dtype) -> None:
    plain = linear(dtype=dtype)
    found, expected = quantized(plain, name).weight, by_the_library(plain.weight.detach(), name)
    if name == "int8-bnb":  # it multiplies by 1/127 last
        assert (found - expected).abs().max() <= 2**-8 * expected.abs().max()
    else:
        assert torch.equal(found, expected)


def by_the_library(weight: Tensor, name: str) -> Tensor:
    """What the library's own objects give back for `weight`."""
    kind, _, library = name.partition("-")
    if library == "quanto":
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

        known = qtypes["qfloat8" if kind == "fp8" else f"q{kind}"]
        if known.bits == 8:
            scale = AbsmaxOptimizer()(weight, known, 0)
            return quantize_weight(weight, known, 0, scale, optimized=False).dequantize()
        scale, shift = MaxOptimizer()(weight, known, 0, 64)
        made = quantize_weight(weight, known, 0, scale, shift, 64, optimized=False)
        # As its packing says; to unpack by itself it would compile an extension, for a minute.
        parts = [made._data._data >> place & (2**known.bits - 1) for place in range(0, 8, known.bits)]
        numbers = torch.cat(parts)[: made._data.shape[0]]
        return (made._scale * numbers - made._shift).reshape(weight.shape)
    if library == "torchao":
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )

        if kind != "int4":
            made = Int8Tensor if kind == "int8" else Float8Tensor
            return made.from_hp(weight, granularity=PerRow()).dequantize()
        block, span = (1, 64), (torch.uint8, 0, 15)
        types = {"scale_dtype": weight.dtype, "zero_point_dtype": torch.int8}
        scale, zero = choose_qparams_affine(weight, MappingType.ASYMMETRIC, block, *span, **types)
        numbers = quantize_affine(weight, block, scale, zero, *span)
        return dequantize_affine(numbers, block, scale, zero, *span, output_dtype=weight.dtype)
    from bitsandbytes import functional

    if kind == "int8":
        numbers, highest, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(numbers, highest).to(weight.dtype)
    numbers, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(numbers, state)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_in_slices_is_the_same_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear((320, 192)).weight
    whole = quantized_tensors(weight, name)
    monkeypatch.setattr(subject, "SLICE", 64 * 192)
    sliced = quantized_tensors(weight, name)
    assert all(
        torch.equal(sliced[key].view(torch.uint8), whole[key].view(torch.uint8)) for key in whole if whole[key].ndim
    )
    # The mean of the scales is summed in one piece both times.
    assert all(torch.equal(sliced[key], whole[key]) for key in whole if not whole[key].ndim)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_is_near_the_plain_one(name: str, dtype: torch.dtype) -> None:
    """Those that are refused on a CPU too: their numbers are the same there, only slow."""
    plain, x = linear(dtype=dtype), drawn(2, 5, 192, dtype=dtype)
    found, expected = quantized(plain, name)(x), plain(x)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    bound = ERROR[name.split("-", maxsplit=1)[0].removesuffix("wo")]
    assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_those_of_a_plain_linear_of_these_weights(name: str, dtype: torch.dtype) -> None:
    made, x = quantized(linear(), name), drawn(2, 5, 192, dtype=dtype).requires_grad_()
    weight = made.layout.unpacked(made.tensors, dtype)
    expected = F.linear(x, weight)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        found = run(x)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("name", HERE)
def test_autocast_decides_the_type(name: str) -> None:
    made, x = quantized(linear(dtype=torch.float32), name), drawn(3, 192, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.linear(x.bfloat16(), made.layout.unpacked(made.tensors, torch.bfloat16)))
    found.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("name", HERE)
def test_only_packed_tensors_wait_for_the_way_back(name: str) -> None:
    made, x = quantized(linear(), name), drawn(3, 192).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        made(x)
    held = {tensor.data_ptr() for tensor in made.tensors}
    assert {tensor.data_ptr() for tensor in saved} <= held


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_and_groups_of_one_value(name: str) -> None:
    plain = linear()
    with torch.no_grad():
        plain.weight[3] = 0
        plain.weight[5, :64] = 0.01
    weight = quantized(plain, name).weight
    assert weight[3].abs().max() == 0
    assert (weight[5, :64] - 0.01).abs().max() <= 0.001
    assert weight.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_a_single_row(name: str) -> None:
    if name == "fp8-torchao":
        pytest.skip("its kernel takes multiples of 16")
    plain = linear((1, 33))
    made = quantized(plain, name)
    assert (made.weight - plain.weight).norm() <= 0.05 * plain.weight.norm()
    assert stored_bytes((1, 33), name, 2) == sum(tensor.nbytes for tensor in made.parameters())


COMPILED = """
import sys
import torch
from simpletuner.memory.precision import quantized

for name in sys.argv[1:]:
    torch._dynamo.reset()
    made = quantized(torch.nn.Linear(192, 96, bias=False, dtype=torch.bfloat16), name)
    x = torch.randn(3, 192, dtype=torch.bfloat16, requires_grad=True)
    artifact = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(artifact(x), made(x)), name
    (found,) = torch.autograd.grad(artifact(x).square().sum(), x)
    (expected,) = torch.autograd.grad(made(x).square().sum(), x)
    assert torch.equal(found, expected), name
    x = x.detach()  # the first block's input wants no gradient
    assert torch.equal(artifact(x), made(x)), name
"""


@pytest.mark.slow
def test_compiled_passes_are_one_graph() -> None:
    """In a process of its own: the compiler does not see through the checks of shapes that the tests put in."""
    done = subprocess.run([sys.executable, "-c", COMPILED, *HERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_precision_cannot_hold_is_named() -> None:
    module = nn.ModuleDict({"first": linear((64, 80)), "second": linear((64, 112)), "third": linear((24, 64))})
    with pytest.raises(ConfigError) as caught:
        quantizable_linears(module, ("",), "int4-quanto")
    text = str(caught.value)
    assert "int4-quanto cannot hold first and 1 more: 80 inputs are not a multiple of 32" in text
    assert "int8-quanto" in text
    with pytest.raises(ConfigError, match="cannot hold third: 24 outputs and 64 inputs are not multiples of 16"):
        quantizable_linears(module, ("",), "fp8-torchao")
    assert list(quantizable_linears(module, ("first", "third"), "nf4-bnb")) == ["first", "third"]
    with pytest.raises(ValueError, match="80 inputs"):
        stored_bytes((64, 80), "int2-quanto", 2)


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (192, 64), (96, 32)])
def test_groups_get_smaller_where_128_does_not_divide(columns: int, group: int) -> None:
    made = quantized(linear((64, columns)), "int4-quanto")
    assert made.get_parameter("scale").shape == (64, columns // group, 1)


def test_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        quantized(nn.Linear(64, 64), "int8-quanto")


@pytest.mark.parametrize("name", HERE)
def test_what_a_cpu_runs_is_accepted(name: str) -> None:
    check_precision(name, torch.device("cpu"), "base_model_precision")


def test_what_a_cpu_does_not_run_is_refused_with_what_does() -> None:
    check_precision("no_change", torch.device("cpu"), "base_model_precision")
    for name, near in (("int4-torchao", "int4-quanto"), ("fp8-torchao", "fp8wo-torchao")):
        with pytest.raises(ConfigError) as caught:
            check_precision(name, torch.device("cpu"), "text_encoder_1_precision")
        text = str(caught.value)
        assert f"text_encoder_1_precision = {name} on a machine without a GPU" in text
        assert all(able in text for able in HERE)
        assert f"The nearest is {near}." in text


@pytest.mark.parametrize("name", HERE)
def test_it_is_copied_and_moved_as_any_module(name: str) -> None:
    made, x = quantized(linear(), name), drawn(3, 192)
    other = copy.deepcopy(made)
    assert torch.equal(other(x), made(x))
    fresh = nn.Sequential(linear())
    replace_by_empty(fresh, quantizable_linears(fresh, ("",), name), name, torch.bfloat16)
    fresh[0].load_state_dict(made.state_dict())
    assert isinstance(fresh[0], QuantizedLinear)
    assert torch.equal(fresh(x), made(x))
