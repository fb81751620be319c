"""Products of bf16 numbers in fp32, on every CPU: a subprocess runs with AVX-512 switched off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.memory import cpu_products

REPLACED = """
import torch
from simpletuner.memory import cpu_products

assert torch.backends.cpu.get_cpu_capability() == "AVX2"
generator = torch.Generator().manual_seed(0)
BF16, F = torch.bfloat16, torch.nn.functional


def numbers(*shape):
    return torch.randn(shape, generator=generator).bfloat16()


def linear(x, w, b):
    return F.linear(x, w, b)


def plain(x, w):
    return F.linear(x, w)


def scaled(x, y, z):
    return torch.addmm(x, y, z, beta=0.5, alpha=2)


def scaled_batch(x, y, z):
    return torch.baddbmm(x, y, z, beta=0.5, alpha=2)


def convolved(x, w, b):
    return F.conv2d(x, w, b, stride=2, padding=1)


def grouped(x, w):
    return F.conv2d(x, w, padding=1, groups=2)


CASES = {
    linear: ((3, 5, 48), (24, 48), (24,)),
    plain: ((3, 5, 48), (24, 48)),
    torch.mm: ((7, 40), (40, 9)),
    torch.bmm: ((2, 7, 40), (2, 40, 9)),
    torch.matmul: ((2, 3, 7, 40), (2, 3, 40, 9)),
    scaled: ((9,), (7, 40), (40, 9)),
    scaled_batch: ((2, 7, 9), (2, 7, 40), (2, 40, 9)),
    convolved: ((2, 6, 9, 11), (8, 6, 3, 3), (8,)),
    grouped: ((2, 6, 9, 11), (8, 3, 3, 3)),
}


def with_gradients(product, inputs):
    # The result, and the gradients of its sum.
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = product(*leaves)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


inputs = {product: [numbers(*shape) for shape in shapes] for product, shapes in CASES.items()}
whole = {product: [each.float() for each in given] for product, given in inputs.items()}
before = {product: with_gradients(product, given) for product, given in inputs.items()}
fp32 = {product: with_gradients(product, given) for product, given in whole.items()}
with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's convolutions sum in another order
    exact = {product: with_gradients(product, given) for product, given in whole.items()}

library = cpu_products.multiply_bf16_in_fp32()
assert library is not None and cpu_products.multiply_bf16_in_fp32() is library

for product, given in inputs.items():
    found = with_gradients(product, given)
    assert found[0].dtype is BF16
    assert found[0].equal(exact[product][0].bfloat16()), product
    assert all(map(torch.equal, with_gradients(product, whole[product]), fp32[product])), product
    for mine, torchs, whole_sums in zip(found, before[product], exact[product], strict=True):
        assert mine.dtype is torchs.dtype is BF16
        # Each sum is rounded once, by up to 2^-8 of it; that of a convolution's weight once for each of two samples.
        scale = whole_sums.abs().max()
        assert (mine.float() - whole_sums).abs().max() <= scale * 2**-7, product
        assert (mine.float() - torchs.float()).abs().max() <= scale * 2**-6, product

x, w = inputs[torch.mm]
into = torch.empty(7, 9, dtype=BF16)
assert torch.mm(x, w, out=into) is into
assert (into.float() - fp32[torch.mm][0]).abs().max() <= fp32[torch.mm][0].abs().max() * 2**-8
doubles = torch.randn(4, 4, generator=generator, dtype=torch.float64)
assert doubles.mm(torch.eye(4, dtype=torch.float64)).equal(doubles)
assert torch.mm(x.new_empty(0, 40), w).shape == (0, 9)
assert torch.mm(x.new_empty(7, 0), w.new_empty(0, 9)).equal(x.new_zeros(7, 9))
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs a CPU with AVX2")
def test_products_are_those_of_fp32_rounded_once_and_fp32_keeps_its_bits(tmp_path: Path) -> None:
    """Torch's own kernels agree to bf16's rounding."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:TF32 acceleration", "-c", REPLACED],
        cwd=tmp_path,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of operators that would be replaced; none is."""
    names: list[str] = []
    monkeypatch.setattr(torch.library.Library, "impl", lambda _self, name, *_, **__: names.append(name))
    cpu_products.multiply_bf16_in_fp32()  # this process's own stays as it is
    monkeypatch.setattr(cpu_products, "multiply_bf16_in_fp32", cpu_products.multiply_bf16_in_fp32.__wrapped__)
    return names


@pytest.mark.parametrize(
    ("machine", "capability", "expected"),
    [
        ("x86_64", "AVX2", False),
        ("AMD64", "DEFAULT", False),
        ("x86_64", "AVX512", True),
        ("AMD64", "AVX512", True),
        ("aarch64", "DEFAULT", True),
    ],
)
def test_only_a_cpu_that_is_slow_has_its_products_replaced(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], machine: str, capability: str, expected: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert cpu_products.multiplies_bf16() == expected
    assert (cpu_products.multiply_bf16_in_fp32() is None) == expected
    assert asked == ([] if expected else ["mm", "addmm", "bmm", "baddbmm", "_slow_conv2d_forward"])
