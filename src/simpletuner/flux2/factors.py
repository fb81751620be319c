"""What an adapter file holds for one Linear: factors of ΔW, in the file's own numbers.

The delta of each kind, with out = rows and in = columns of the Linear:

- `LowRank`: ΔW = scale · b · a (LoRA, Hu et al., arXiv 2106.09685);
- `Kronecker`: ΔW = scale · kron(w1, w2) (LoKr, LyCORIS, arXiv 2309.14859);
- `Hadamard`: ΔW = scale · (w1_b · w1_a) ∘ (w2_b · w2_a) (LoHa, FedPara, arXiv 2108.06098).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

RowRange = tuple[int, int]
"""Rows of a Linear, as (start, stop)."""


@dataclass(frozen=True)
class LowRank:
    """Factors of one layer of a LoRA; `scale` is alpha / rank, 1 where alpha is folded into `b`."""

    a: Float[Tensor, "rank columns"]
    b: Float[Tensor, "rows rank"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the Linear."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Float[Tensor, "rows columns"]:
        """ΔW in fp32."""
        return self.b.float() @ self.a.float() * self.scale

    def taken(self, ranges: Sequence[RowRange]) -> "LowRank":
        """The factors of these rows of ΔW, in this order."""
        return replace(self, b=torch.cat([self.b[start:stop] for start, stop in ranges]))


@dataclass(frozen=True)
class Kronecker:
    """Factors of one layer of a LoKr, decomposed ones multiplied out. Row i1 · len(w2) + i2 of kron(w1, w2) is that of
    row i1 of `w1` and row i2 of `w2`.
    """

    w1: Float[Tensor, "rows1 columns1"]
    w2: Float[Tensor, "rows2 columns2"]
    scale: float = 1.0
    ranges: tuple[RowRange, ...] | None = None
    """The rows of kron(w1, w2) that are ΔW's, in this order; None for all. Of a fused matrix one part is wanted, to
    which w1 can be cut only where the part begins and ends with whole copies of w2.
    """
    rank: int | None = None
    """That the file decomposes w2 at, or w1 where w2 is full; None where both are full."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the Linear."""
        whole = self.w1.shape[0] * self.w2.shape[0]
        rows = whole if self.ranges is None else sum(stop - start for start, stop in self.ranges)
        return rows, self.w1.shape[1] * self.w2.shape[1]

    def delta(self) -> Float[Tensor, "rows columns"]:
        """ΔW in fp32."""
        whole = torch.kron(self.w1.float(), self.w2.float()) * self.scale
        return whole if self.ranges is None else torch.cat([whole[start:stop] for start, stop in self.ranges])

    def taken(self, ranges: Sequence[RowRange]) -> "Kronecker":
        """The factors of these rows of ΔW, in this order. Rows of w1 that none of them needs are left out."""
        if self.ranges is not None:
            raise ValueError("rows are taken once, of the whole matrix")
        copy = self.w2.shape[0]
        pieces, kept, offset = [], [], 0
        for start, stop in ranges:
            first, end = start // copy, -(-stop // copy)
            pieces.append(self.w1[first:end])
            kept.append((offset + start - first * copy, offset + stop - first * copy))
            offset += (end - first) * copy
        is_cut = all(start % copy == 0 == stop % copy for start, stop in ranges)
        return replace(self, w1=torch.cat(pieces), ranges=None if is_cut else tuple(kept))


@dataclass(frozen=True)
class Hadamard:
    """Factors of one layer of a LoHa. Files call `w1_b` hada_w1_a, [rows, rank], and `w1_a` hada_w1_b."""

    w1_a: Float[Tensor, "rank columns"]
    w1_b: Float[Tensor, "rows rank"]
    w2_a: Float[Tensor, "rank columns"]
    w2_b: Float[Tensor, "rows rank"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the Linear."""
        return self.w1_b.shape[0], self.w1_a.shape[1]

    @property
    def rank(self) -> int:
        return self.w1_a.shape[0]

    def delta(self) -> Float[Tensor, "rows columns"]:
        """ΔW in fp32."""
        return (self.w1_b.float() @ self.w1_a.float()) * (self.w2_b.float() @ self.w2_a.float()) * self.scale

    def taken(self, ranges: Sequence[RowRange]) -> "Hadamard":
        """The factors of these rows of ΔW, in this order."""
        return replace(
            self,
            w1_b=torch.cat([self.w1_b[start:stop] for start, stop in ranges]),
            w2_b=torch.cat([self.w2_b[start:stop] for start, stop in ranges]),
        )


Factors = LowRank | Kronecker | Hadamard
