"""LoKr and LoHa against their formulas, written out by hand, and files that are no such thing."""

import math

import pytest
import torch
from torch import Tensor

from simpletuner.flux2.adapter_kinds import factors_of
from simpletuner.flux2.factors import Hadamard, Kronecker


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape) + shape[0]))


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """Element [i1 · k + i2, j1 · n + j2] is w1[i1, j1] · w2[i2, j2]."""
    rows, columns = w2.shape
    out = torch.empty(w1.shape[0] * rows, w1.shape[1] * columns, dtype=torch.float64)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = w1[row // rows, column // columns] * w2[row % rows, column % columns]
    return out


W1, W2 = drawn(6, 4), drawn(5, 7)
W1_A, W1_B, W2_A, W2_B = drawn(6, 2), drawn(2, 4), drawn(5, 3), drawn(3, 7)


@pytest.mark.parametrize(
    ("tensors", "alpha", "w1", "w2", "scale", "rank"),
    [
        ({"lokr_w1": W1, "lokr_w2": W2}, None, W1, W2, 1.0, None),
        ({"lokr_w1": W1, "lokr_w2": W2}, 9999999999.0, W1, W2, 1.0, None),
        ({"lokr_w1": W1, "lokr_w2": W2}, math.inf, W1, W2, 1.0, None),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, 1.5, W1, W2_A @ W2_B, 0.5, 3),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, None, W1, W2_A @ W2_B, 1.0, 3),
        ({"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2": W2}, 3.0, W1_A @ W1_B, W2, 1.5, 2),
        (
            {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B},
            3.0,
            W1_A @ W1_B,
            W2_A @ W2_B,
            1.0,
            3,
        ),
    ],
)
def test_a_lokr_is_the_kronecker_product_of_its_factors(
    tensors: dict[str, Tensor], alpha: float | None, w1: Tensor, w2: Tensor, scale: float, rank: int | None
) -> None:
    factors = factors_of(tensors, alpha)
    assert isinstance(factors, Kronecker)
    assert (factors.shape, factors.rank) == ((30, 28), rank)
    torch.testing.assert_close(factors.delta().double(), kron(w1.double(), w2.double()) * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ranges", "w1_rows"),
    [
        ([(0, 10)], 2),  # thirds of six rows of w1
        ([(10, 20)], 2),
        ([(15, 30), (0, 15)], 6),  # halves exchanged, as norm_out's are
        ([(0, 12)], 3),  # cut inside a copy of w2
        ([(12, 18)], 2),
        ([(18, 30), (0, 7)], 5),
    ],
)
def test_rows_of_a_lokr_are_those_of_its_product(ranges: list[tuple[int, int]], w1_rows: int) -> None:
    whole = Kronecker(W1, W2, 0.5)
    part = whole.selected_rows(ranges)
    wanted = torch.cat([whole.delta()[start:stop] for start, stop in ranges])
    assert part.w1.shape[0] == w1_rows
    assert part.shape == wanted.shape
    assert torch.equal(part.delta(), wanted)
    aligned = all(edge % 5 == 0 for cut in ranges for edge in cut)
    assert (part.ranges is None) == aligned


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4.0, 2.0), (1.0, 0.5)])
def test_a_loha_is_the_product_by_element_of_two_products(alpha: float | None, scale: float) -> None:
    w1_a, w1_b, w2_a, w2_b = drawn(9, 2), drawn(2, 4), drawn(9, 2) + 1, drawn(2, 4) - 1
    factors = factors_of({"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}, alpha)
    assert isinstance(factors, Hadamard)
    assert (factors.shape, factors.rank) == ((9, 4), 2)
    wanted = (w1_a @ w1_b) * (w2_a @ w2_b) * scale
    torch.testing.assert_close(factors.delta(), wanted, rtol=1e-6, atol=1e-6)
    rows = [(6, 9), (0, 3)]
    assert torch.equal(factors.selected_rows(rows).delta(), torch.cat([factors.delta()[6:9], factors.delta()[:3]]))


def test_a_product_of_small_numbers_is_not_rounded_to_the_type_of_the_file() -> None:
    tensors = {"lokr_w1": W1.bfloat16(), "lokr_w2_a": W2_A.bfloat16(), "lokr_w2_b": W2_B.bfloat16()}
    factors = factors_of(tensors, None)
    assert isinstance(factors, Kronecker)
    assert torch.equal(factors.w2, W2_A.bfloat16().float() @ W2_B.bfloat16().float())
    assert factors.w1.dtype == torch.bfloat16


def test_what_is_neither_is_left_to_others() -> None:
    assert factors_of({"lora_A.weight": W1, "lora_B.weight": W2}, 1.0) is None
    assert factors_of({"oft_blocks": W1}, None) is None


@pytest.mark.parametrize(
    ("tensors", "alpha", "says"),
    [
        ({"lokr_w1": W1}, None, "no lokr_w2, nor both of"),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A}, None, "no lokr_w2, nor both of"),
        ({"lokr_w1": W1, "lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2": W2}, None, "both whole and decomposed"),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W1_B}, None, "lokr_w2_a of rank 3, but lokr_w2_b of rank 2"),
        ({"lokr_w1": W1[0], "lokr_w2": W2}, None, r"lokr_w1 of the shape \[4\]"),
        ({"lokr_w1": W1[:0], "lokr_w2": W2}, None, r"lokr_w1 of the shape \[0, 4\]"),
        ({"lokr_w1": W1.to(torch.int8), "lokr_w2": W2}, None, "torch.int8"),
        ({"lokr_w1": W1, "lokr_w2": W2, "lokr_t2": W2}, None, "convolution"),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, math.inf, "an alpha of inf"),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, math.nan, "an alpha of nan"),
        ({"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, 0.0, "an alpha of 0"),
        ({"lokr_w1": W1, "lokr_w2": W2, "hada_w1_a": W1}, None, "of both a LoKr and a LoHa"),
        ({"hada_w1_a": W1_A, "hada_w1_b": W1_B, "hada_w2_a": W2_A}, None, "no hada_w2_b"),
        (
            {"hada_w1_a": W1_A, "hada_w1_b": W1_B, "hada_w2_a": W2_A, "hada_w2_b": W2_B},
            None,
            "hada_w1 and hada_w2 of different shapes",
        ),
    ],
)
def test_factors_that_fit_nothing_are_refused(tensors: dict[str, Tensor], alpha: float | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        factors_of(tensors, alpha)
