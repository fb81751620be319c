"""Ranks are cut as the singular values of the dense delta say, and what need not be cut keeps its bits."""

import pytest
import torch
from torch import Tensor

from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank
from simpletuner.flux2.lowrank import RankRule, decomposed, low_rank, reduced, stacked

EVERYTHING = RankRule(energy=1.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(rank: int = 4, rows: int = 24, columns: int = 18, *, scale: float = 1.0, seed: int = 0) -> LowRank:
    return LowRank(random(rank, columns, seed=seed), random(rows, rank, seed=seed), scale)


def exact(factors: Factors) -> Tensor:
    """ΔW in fp64, by the formula."""
    if isinstance(factors, LowRank):
        return factors.b.double() @ factors.a.double() * factors.scale
    if isinstance(factors, Hadamard):
        first = factors.w1_b.double() @ factors.w1_a.double()
        return first * (factors.w2_b.double() @ factors.w2_a.double()) * factors.scale
    whole = torch.kron(factors.w1.double(), factors.w2.double()) * factors.scale
    return whole if factors.ranges is None else torch.cat([whole[start:stop] for start, stop in factors.ranges])


def assert_near(found: LowRank, expected: Tensor, to: float = 1e-6) -> None:
    assert (exact(found) - expected).norm() <= to * expected.norm()


KINDS: dict[str, Factors] = {
    "LoKr with a w2 of low rank": Kronecker(random(6, 3), random(4, 2) @ random(2, 6), 0.5),
    "LoKr of full rank": Kronecker(random(6, 3), random(4, 6), 2.0),
    "a third of a LoKr": Kronecker(random(9, 3), random(8, 1) @ random(1, 6), 0.5, ranges=((24, 48),)),
    "LoKr in two pieces": Kronecker(random(9, 3), random(8, 1) @ random(1, 6), 1.0, ranges=((60, 72), (3, 15))),
    "LoHa": Hadamard(random(3, 18), random(24, 3), random(3, 18, seed=1), random(24, 3, seed=1), 0.7),
    "LoHa of full rank": Hadamard(random(5, 18), random(24, 5), random(5, 18, seed=1), random(24, 5, seed=1)),
    "wide LoHa of full rank": Hadamard(random(4, 30), random(12, 4), random(4, 30, seed=1), random(12, 4, seed=1)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_a_lora(name: str) -> None:
    found = low_rank(KINDS[name])
    assert found.shape == KINDS[name].shape
    assert found.rank <= min(found.shape)
    assert_near(found, exact(KINDS[name]))


@pytest.mark.parametrize(("name", "rank"), [("LoKr with a w2 of low rank", 6), ("a third of a LoKr", 3), ("LoHa", 9)])
def test_a_product_of_low_rank_becomes_no_larger_lora(name: str, rank: int) -> None:
    assert low_rank(KINDS[name]).rank == rank


def test_one_delta_at_strength_1_keeps_its_bits() -> None:
    delta = LowRank(random(4, 18).bfloat16(), random(24, 4).bfloat16(), 0.5)
    for rule in (RankRule(), RankRule(rank=4), RankRule(rank=40), EVERYTHING):
        found = reduced(stacked([(delta, 1.0)]), rule)
        assert found.kept_energy == 1.0
        assert found.factors.a is delta.a
        assert found.factors.b is delta.b
        assert found.factors.scale == 0.5


def test_a_sum_has_each_delta_at_its_strength() -> None:
    parts: list[tuple[Factors, float]] = [(lora(4, scale=0.5), 0.8), (lora(7, seed=1), -1.5), (KINDS["LoHa"], 2.0)]
    expected = sum((exact(factors) * strength for factors, strength in parts), torch.zeros(24, 18).double())
    total = stacked(parts)
    assert total.rank == 4 + 7 + 9
    assert_near(total, expected)
    everything = reduced(total, EVERYTHING)
    assert everything.factors.rank == 18  # all that 18 columns have
    assert_near(everything.factors, expected)


def test_deltas_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        stacked([(lora(), 1.0), (lora(rows=23), 1.0)])


def test_the_same_delta_twice_has_the_rank_of_one() -> None:
    found = reduced(stacked([(lora(), 0.25), (lora(), 0.5)]), EVERYTHING)
    assert found.factors.rank == 4
    assert_near(found.factors, exact(lora()) * 0.75)


def test_a_cut_is_that_of_the_dense_svd() -> None:
    total = stacked([(lora(6, seed=3), 1.0), (lora(8, scale=3.0, seed=4), 0.5)])
    u, values, vh = torch.linalg.svd(exact(total), full_matrices=False)
    for rank in (1, 5, 13):
        expected = (u[:, :rank] * values[:rank]) @ vh[:rank]
        for found in (reduced(total, RankRule(rank=rank)), decomposed(exact(total).float(), RankRule(rank=rank))):
            assert found.factors.rank == rank
            assert_near(found.factors, expected)
            assert found.kept_energy == pytest.approx(
                float(values[:rank].square().sum() / values.square().sum()), abs=1e-7
            )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_the_smallest_rank_keeps_the_energy(energy: float) -> None:
    total = stacked([(lora(6, seed=3), 1.0), (lora(8, scale=3.0, seed=4), 0.5)])
    squares = torch.linalg.svdvals(exact(total)).square()
    expected = next(rank for rank in range(1, 19) if squares[:rank].sum() >= energy * squares.sum())
    for found in (reduced(total, RankRule(energy=energy)), decomposed(exact(total).float(), RankRule(energy=energy))):
        assert found.factors.rank == expected
        assert found.kept_energy >= energy
    both = reduced(total, RankRule(rank=2, energy=energy))
    assert both.factors.rank == min(2, expected)


@pytest.mark.parametrize(("rows", "columns"), [(24, 18), (18, 24), (5000, 6)])
def test_a_difference_at_full_rank_comes_back(rows: int, columns: int) -> None:
    difference = random(rows, columns)
    difference[:, 0] = difference[:, 1]  # a singular value of 0
    found = decomposed(difference, RankRule(rank=1000))
    assert found.factors.rank == min(rows, columns)
    assert found.factors.a.is_contiguous()
    assert found.factors.b.is_contiguous()
    assert_near(found.factors, difference.double())
    assert decomposed(difference, EVERYTHING).factors.rank == min(rows, columns) - (columns < rows)


@pytest.mark.parametrize(("rows", "columns"), [(300, 160), (160, 300)])
@pytest.mark.parametrize("decay", [0.7, 0.97])
def test_a_few_of_many_singular_values_are_those_of_the_dense_svd(rows: int, columns: int, decay: float) -> None:
    u, v = (torch.linalg.qr(random(size, 160).double())[0] for size in (rows, columns))
    values = decay ** torch.arange(160)
    difference = ((u * values) @ v.T).float()
    squares = values.double().square()
    found = decomposed(difference, RankRule(rank=8))
    assert found.factors.rank == 8
    assert found.kept_energy == pytest.approx(float(squares[:8].sum() / squares.sum()), rel=1e-6)
    error = (exact(found.factors) - difference.double()).square().sum()
    assert error <= (1 + 1e-4) * squares[8:].sum()
    energy = decomposed(difference, RankRule(rank=8, energy=0.3 if decay > 0.9 else 0.9))
    assert energy.factors.rank == (6 if decay > 0.9 else 4)


def test_nothing_has_rank_1() -> None:
    zero = LowRank(random(4, 18), torch.zeros(24, 4))
    for found in (reduced(zero, RankRule(energy=0.99)), decomposed(torch.zeros(24, 18), RankRule(energy=0.99))):
        assert found.factors.rank == 1
        assert found.kept_energy == 1.0
        assert not exact(found.factors).count_nonzero()


def test_halves_of_a_singular_value_stay_in_range() -> None:
    found = reduced(stacked([(lora(scale=1e4), 1.0), (lora(seed=1), 1.0)]), RankRule(rank=3)).factors
    assert float(found.a.norm()) == pytest.approx(float(found.b.norm()), rel=1e-5)
