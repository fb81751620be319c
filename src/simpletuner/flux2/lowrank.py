"""Approximate sums of adapter deltas and differences of weights by LoRA factors of a chosen rank.

The best approximation of a matrix at a given rank is its singular value decomposition (SVD), truncated to the largest
values (Eckart and Young, 1936). The share of energy that it keeps is the sum of the squares of these values over that
of all. A sum of LoRAs is decomposed from its factors: with b = Qb·Rb and aᵀ = Qa·Ra, the SVD of the small Rb·Raᵀ yields
that of b·a, so ΔW is never formed. Results are computed in fp64, so factors of very different sizes lose no precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank

_NEGLIGIBLE_ENERGY = 1e-24
"""Share of the energy of a product of factors that is treated as rounding: 1e-12 in a singular value."""
_NEGLIGIBLE_ENERGY_DENSE = 1e-13
"""The same for `_full_spectrum` and `_leading_spectrum`, which decompose DᵀD: there, fp64 rounds the squares."""
_NEGLIGIBLE_FACTOR_VALUE = 2e-6
"""Singular values of a Kronecker factor below this fraction of the largest are treated as rounding: factors that the
file stores as a product were multiplied in fp32."""
_OVERSAMPLING = 32
"""Extra singular values in the subspace iteration, because the last ones converge slowly."""
_ITERATIONS = 4
_SLICE = 4096
"""Rows of a large matrix that are converted to fp64 at a time."""


@dataclass(frozen=True)
class RankRule:
    """Rule for a layer's rank; if both limits are None, the rank is not reduced."""

    rank: int | None = None
    """The maximum rank."""
    energy: float | None = None
    """Use the smallest rank that keeps this share of the energy, 0 to 1."""

    def chosen(self, squares: Tensor, negligible: float, omitted: float = 0.0) -> int:
        """The number of singular values to keep, at least 1.

        Args:
            squares: of the singular values, the largest first.
            negligible: share of the energy that is rounding, dropped even if all energy is to be kept.
            omitted: sum of the smaller squares that `squares` does not include.
        """
        count = len(squares)
        if self.energy is not None:
            # For each value, the sum of its square and of all smaller ones.
            tail_energy = squares.flip(0).cumsum(0).flip(0) + omitted
            allowed = (1 - self.energy + negligible) * tail_energy[0]
            count = int((tail_energy > allowed).sum())
        return max(1, count if self.rank is None else min(count, self.rank))


@dataclass(frozen=True)
class ReducedDelta:
    """A delta reduced to a rank."""

    factors: LowRank
    kept_energy: float
    """Share of the energy that `factors` keep; 1 for a delta of zeros."""


def low_rank(factors: Factors) -> LowRank:
    """Convert `factors` to those of a LoRA, up to fp32 rounding.

    A Kronecker or Hadamard product without a low rank becomes a LoRA of the Linear's full rank.
    """
    if isinstance(factors, LowRank):
        return factors
    converted = _of_kronecker(factors) if isinstance(factors, Kronecker) else _of_hadamard(factors)
    rows, columns = factors.shape
    if converted is not None and converted.rank < min(rows, columns):
        return converted
    delta = factors.delta()
    if columns <= rows:
        return LowRank(torch.eye(columns), delta)
    return LowRank(delta, torch.eye(rows))


def _of_kronecker(factors: Kronecker) -> LowRank | None:
    """LoRA factors of a Kronecker product; None if its rank is not low.

    Its singular vectors are the Kronecker products of its factors' singular vectors.
    """
    (left1, right1), (left2, right2) = _split(factors.w1), _split(factors.w2)
    if left1.shape[1] * left2.shape[1] >= min(factors.shape):
        return None
    whole = LowRank(_kron(right1, right2).float(), _kron(left1, left2).float(), factors.scale)
    return whole if factors.ranges is None else whole.selected_rows(factors.ranges)


def _split(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize `factor` into two matrices of its numerical rank, in fp64."""
    left_vectors, values, right_vectors = torch.linalg.svd(factor.double(), full_matrices=False)
    count = max(1, int((values > _NEGLIGIBLE_FACTOR_VALUE * values[0]).sum()))
    root = values[:count].sqrt()
    return left_vectors[:, :count] * root, root[:, None] * right_vectors[:count]


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """The same as torch.kron, which raises (torch 2.13) if one factor is column-major and the other row-major."""
    return (first[:, None, :, None] * second[None, :, None, :]).flatten(2).flatten(0, 1)


def _of_hadamard(factors: Hadamard) -> LowRank | None:
    """LoRA factors of a Hadamard product; None if its rank is not low.

    (b·a)∘(d·c) has columns b_i∘d_j and rows a_i∘c_j, rank² of each.
    """
    if factors.rank**2 >= min(factors.shape):
        return None
    a = factors.w1_a.float()[:, None] * factors.w2_a.float()
    b = factors.w1_b.float()[:, :, None] * factors.w2_b.float()[:, None]
    return LowRank(a.flatten(0, 1), b.flatten(1), factors.scale)


def stacked(parts: Sequence[tuple[Factors, float]]) -> LowRank:
    """The sum of deltas, each times its strength: factors are concatenated, so ranks add up.

    A single delta keeps its values and its dtype.

    Raises:
        ValueError: shapes differ.
    """
    if len({factors.shape for factors, _ in parts}) != 1:
        raise ValueError(f"deltas of one Linear have the shapes {[factors.shape for factors, _ in parts]}")
    scaled = [
        replace(factors, scale=factors.scale * strength)
        for factors, strength in ((low_rank(factors), strength) for factors, strength in parts)
    ]
    if len(scaled) == 1:
        return scaled[0]
    a = torch.cat([factors.a.float() for factors in scaled])
    b = torch.cat([factors.b.float() * factors.scale for factors in scaled], dim=1)
    return LowRank(a, b)


def reduced(delta: LowRank, rule: RankRule) -> ReducedDelta:
    """`delta` reduced to the rank of `rule`, with the least squared error; unchanged if its rank already fits."""
    if rule.energy is None and (rule.rank is None or rule.rank >= delta.rank):
        return ReducedDelta(delta, 1.0)
    left_basis, left_core = torch.linalg.qr(delta.b.double() * delta.scale)
    right_basis, right_core = torch.linalg.qr(delta.a.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    squares = values.square()
    rank = rule.chosen(squares, _NEGLIGIBLE_ENERGY)
    if rank >= delta.rank:
        return ReducedDelta(delta, 1.0)
    root = values[:rank].sqrt()
    b, a = left_basis @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ right_basis.T
    return ReducedDelta(LowRank(a.float(), b.float()), _energy_share(squares, rank))


def decomposed(difference: Tensor, rule: RankRule) -> ReducedDelta:
    """Factorize a dense fp32 `difference` [rows, columns] at the rank of `rule`.

    Computes on the device of `difference`, without a whole fp64 copy. The factors are on the CPU.
    """
    rows, columns = difference.shape
    tall = difference if rows >= columns else difference.T
    if rule.rank is not None and 4 * (rule.rank + _OVERSAMPLING) <= tall.shape[1]:
        vectors, squares, omitted = _leading_spectrum(tall, rule.rank + _OVERSAMPLING)
    else:
        vectors, squares, omitted = _full_spectrum(tall)
    rank = rule.chosen(squares, _NEGLIGIBLE_ENERGY_DENSE, omitted)
    # Both factors get the square root of each singular value, so neither exceeds the range of fp16; 0 is replaced by 1.
    root = squares[:rank].clamp_min(float(squares[0]) * _NEGLIGIBLE_ENERGY_DENSE).pow(0.25)
    root = torch.where(root == 0, 1, root)
    b = torch.cat([piece.double() @ (vectors[:, :rank] / root) for piece in tall.split(_SLICE)]).float().cpu()
    a = (root[:, None] * vectors[:, :rank].T).float().cpu()
    factors = LowRank(a, b) if rows >= columns else LowRank(b.T.contiguous(), a.T.contiguous())
    return ReducedDelta(factors, _energy_share(squares, rank, omitted))


def _full_spectrum(tall: Tensor) -> tuple[Tensor, Tensor, float]:
    """Right singular vectors of D in columns, squared singular values, and the sum of the omitted squares, 0.

    Vectors and squares are the eigenvectors and eigenvalues of DᵀD. D·V·Vᵀ = D for any singular values, so full rank is
    lossless.
    """
    square = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for piece in tall.split(_SLICE):
        square.addmm_(piece.double().T, piece.double())
    eigenvalues, vectors = torch.linalg.eigh(square)
    return vectors.flip(1), eigenvalues.clamp_min(0).flip(0), 0.0


def _leading_spectrum(tall: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """As `_full_spectrum`, but for the `count` largest singular values only, of which the last are not exact.

    Subspace iteration from random directions (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). All
    eigenvectors of a large model would take hours on a CPU.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(tall.shape[1], count, generator=generator).to(tall.device)
    for _ in range(_ITERATIONS):
        directions = torch.linalg.qr(tall.T @ torch.linalg.qr(tall @ directions)[0])[0]
    basis = directions.double()
    projected = torch.cat([piece.double() @ basis for piece in tall.split(_SLICE)])
    eigenvalues, vectors = torch.linalg.eigh(projected.T @ projected)
    squares = eigenvalues.clamp_min(0).flip(0)
    total = sum(float(piece.double().square().sum()) for piece in tall.split(_SLICE))
    return basis @ vectors.flip(1), squares, max(0.0, total - float(squares.sum()))


def _energy_share(squares: Tensor, rank: int, omitted: float = 0.0) -> float:
    total = float(squares.sum()) + omitted
    return float(squares[:rank].sum()) / total if total else 1.0
