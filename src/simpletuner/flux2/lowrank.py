"""Sums of adapters' deltas, and differences of weights, as LoRA factors of a chosen rank.

The best approximation of a matrix at a rank is its singular value decomposition (SVD), cut to the largest values
(Eckart and Young, 1936). The energy that it keeps is the sum of these values' squares, over that of all. A sum of LoRAs
is decomposed from its factors: with b = Qb·Rb and aᵀ = Qa·Ra, the SVD of the small Rb·Raᵀ gives that of b·a, and ΔW
itself is never made. Everything is computed in fp64, so that factors of very different sizes lose nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank

_NO_RANK = 1e-24
"""Share of the energy below which what is left of a product of factors is rounding: 1e-12 in a singular value."""
_NO_RANK_OF_DENSE = 1e-13
"""The same of a decomposition by a matrix's square: fp64's rounding counts in the square itself."""
_NO_FACTOR_RANK = 2e-6
"""Singular values of a Kronecker factor below this part of the largest are rounding: a factor that the file has as a
product was multiplied out in fp32."""
_MORE = 32
"""Singular values that are followed beside those that are wanted: the last ones converge slowly."""
_ITERATIONS = 4
_SLICE = 4096
"""Rows of a large matrix that are in fp64 at a time."""


@dataclass(frozen=True)
class RankRule:
    """How far a layer's rank is cut; without either, not at all."""

    rank: int | None = None
    """At most this many."""
    energy: float | None = None
    """The fewest that keep this part of the energy, from 0 to 1."""

    def chosen(self, squares: Tensor, negligible: float, rest: float = 0.0) -> int:
        """How many of the singular values are kept, at least 1.

        Args:
            squares: theirs, the largest first.
            negligible: the part of the energy that is rounding, and dropped though all is to be kept.
            rest: the sum of the squares that are not among `squares`, all smaller ones.
        """
        count = len(squares)
        if self.energy is not None:
            dropped = squares.flip(0).cumsum(0).flip(0) + rest  # with each value: its square and all smaller ones
            allowed = (1 - self.energy + negligible) * dropped[0]
            count = int((dropped > allowed).sum())
        return max(1, count if self.rank is None else min(count, self.rank))


@dataclass(frozen=True)
class Reduced:
    """A delta that was cut to a rank."""

    factors: LowRank
    kept: float
    """The part of the energy that `factors` have; 1 for a delta that is 0."""


def low_rank(factors: Factors) -> LowRank:
    """`factors` as those of a LoRA, to fp32's rounding. A Kronecker or Hadamard product that has no low rank becomes a
    LoRA of the Linear's full rank.
    """
    if isinstance(factors, LowRank):
        return factors
    found = _of_kronecker(factors) if isinstance(factors, Kronecker) else _of_hadamard(factors)
    rows, columns = factors.shape
    if found is not None and found.rank < min(rows, columns):
        return found
    delta = factors.delta()
    if columns <= rows:
        return LowRank(torch.eye(columns), delta)
    return LowRank(delta, torch.eye(rows))


def _of_kronecker(factors: Kronecker) -> LowRank | None:
    """The singular vectors of a Kronecker product are the Kronecker products of its factors'. None if the rank is not
    low.
    """
    (left1, right1), (left2, right2) = _split(factors.w1), _split(factors.w2)
    if left1.shape[1] * left2.shape[1] >= min(factors.shape):
        return None
    whole = LowRank(_kron(right1, right2).float(), _kron(left1, left2).float(), factors.scale)
    return whole if factors.ranges is None else whole.taken(factors.ranges)


def _split(factor: Tensor) -> tuple[Tensor, Tensor]:
    """`factor` as a product of its numerical rank, in fp64."""
    left, values, right = torch.linalg.svd(factor.double(), full_matrices=False)
    count = max(1, int((values > _NO_FACTOR_RANK * values[0]).sum()))
    root = values[:count].sqrt()
    return left[:, :count] * root, root[:, None] * right[:count]


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """torch.kron, which raises (torch 2.13) where one factor is column-major and the other row-major."""
    return (first[:, None, :, None] * second[None, :, None, :]).flatten(2).flatten(0, 1)


def _of_hadamard(factors: Hadamard) -> LowRank | None:
    """(b·a)∘(d·c) has the columns b_i∘d_j and the rows a_i∘c_j, rank² of each; None as in `_of_kronecker`."""
    if factors.rank**2 >= min(factors.shape):
        return None
    a = factors.w1_a.float()[:, None] * factors.w2_a.float()
    b = factors.w1_b.float()[:, :, None] * factors.w2_b.float()[:, None]
    return LowRank(a.flatten(0, 1), b.flatten(1), factors.scale)


def stacked(parts: Sequence[tuple[Factors, float]]) -> LowRank:
    """The sum of deltas, each times its strength: their factors side by side, at the sum of their ranks.

    One alone keeps its numbers and its dtype.

    Raises:
        ValueError: their shapes differ.
    """
    if len({factors.shape for factors, _ in parts}) != 1:
        raise ValueError(f"deltas of one Linear have the shapes {[factors.shape for factors, _ in parts]}")
    each = [
        replace(factors, scale=factors.scale * strength)
        for factors, strength in ((low_rank(factors), strength) for factors, strength in parts)
    ]
    if len(each) == 1:
        return each[0]
    a = torch.cat([factors.a.float() for factors in each])
    b = torch.cat([factors.b.float() * factors.scale for factors in each], dim=1)
    return LowRank(a, b)


def reduced(delta: LowRank, rule: RankRule) -> Reduced:
    """`delta` at the rank of `rule`, best in the sum of squared errors. What needs no cut keeps its numbers."""
    if rule.energy is None and (rule.rank is None or rule.rank >= delta.rank):
        return Reduced(delta, 1.0)
    left, left_core = torch.linalg.qr(delta.b.double() * delta.scale)
    right, right_core = torch.linalg.qr(delta.a.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    squares = values.square()
    rank = rule.chosen(squares, _NO_RANK)
    if rank >= delta.rank:
        return Reduced(delta, 1.0)
    root = values[:rank].sqrt()
    b, a = left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ right.T
    return Reduced(LowRank(a.float(), b.float()), _share(squares, rank))


def decomposed(difference: Tensor, rule: RankRule) -> Reduced:
    """A dense `difference` [rows, columns], in fp32, at the rank of `rule`; computed on its device, without a copy of
    it in fp64. The factors are on the CPU.
    """
    rows, columns = difference.shape
    tall = difference if rows >= columns else difference.T
    if rule.rank is not None and 4 * (rule.rank + _MORE) <= tall.shape[1]:
        vectors, squares, rest = _leading(tall, rule.rank + _MORE)
    else:
        vectors, squares, rest = _all(tall)
    rank = rule.chosen(squares, _NO_RANK_OF_DENSE, rest)
    # Both factors get half of each singular value, so that neither leaves fp16's range; one that is 0 has no half.
    root = squares[:rank].clamp_min(float(squares[0]) * _NO_RANK_OF_DENSE).pow(0.25)
    root = torch.where(root == 0, 1, root)
    b = torch.cat([piece.double() @ (vectors[:, :rank] / root) for piece in tall.split(_SLICE)]).float().cpu()
    a = (root[:, None] * vectors[:, :rank].T).float().cpu()
    factors = LowRank(a, b) if rows >= columns else LowRank(b.T.contiguous(), a.T.contiguous())
    return Reduced(factors, _share(squares, rank, rest))


def _all(tall: Tensor) -> tuple[Tensor, Tensor, float]:
    """Right singular vectors of D in columns, the squares of the singular values, and the sum of the squares left out,
    0: eigenvectors and eigenvalues of DᵀD. D·V·Vᵀ is D whatever its singular values are, so at full rank nothing is
    lost.
    """
    square = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for piece in tall.split(_SLICE):
        square.addmm_(piece.double().T, piece.double())
    found, vectors = torch.linalg.eigh(square)
    return vectors.flip(1), found.clamp_min(0).flip(0), 0.0


def _leading(tall: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """The same for the `count` largest singular values, of which the last ones are not exact, by subspace iteration
    from random directions (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). All eigenvectors would take
    hours for a large model on a CPU.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(tall.shape[1], count, generator=generator).to(tall.device)
    for _ in range(_ITERATIONS):
        directions = torch.linalg.qr(tall.T @ torch.linalg.qr(tall @ directions)[0])[0]
    onto = directions.double()
    image = torch.cat([piece.double() @ onto for piece in tall.split(_SLICE)])
    found, vectors = torch.linalg.eigh(image.T @ image)
    squares = found.clamp_min(0).flip(0)
    total = sum(float(piece.double().square().sum()) for piece in tall.split(_SLICE))
    return onto @ vectors.flip(1), squares, max(0.0, total - float(squares.sum()))


def _share(squares: Tensor, rank: int, rest: float = 0.0) -> float:
    total = float(squares.sum()) + rest
    return float(squares[:rank].sum()) / total if total else 1.0
