"""Factors of ΔW that an adapter file holds for one Linear, with the values of the file.

ΔW of each kind:

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
    """Factors of one layer of a LoRA; `scale` is alpha / rank, or 1 if alpha is folded into `b`."""

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

    def selected_rows(self, ranges: Sequence[RowRange]) -> "LowRank":
        """The factors of the rows `ranges` of ΔW, in this order."""
        return replace(self, b=torch.cat([self.b[start:stop] for start, stop in ranges]))


@dataclass(frozen=True)
class Kronecker:
    """Factors of one layer of a LoKr; decomposed factors are multiplied.

    Row i1 · len(w2) + i2 of kron(w1, w2) comes from row i1 of `w1` and row i2 of `w2`.
    """

    w1: Float[Tensor, "rows1 columns1"]
    w2: Float[Tensor, "rows2 columns2"]
    scale: float = 1.0
    ranges: tuple[RowRange, ...] | None = None
    """The rows of kron(w1, w2) that form ΔW, in this order; None for all. They select one part of a fused matrix: w1
    itself can be cut to the part only if the part starts and ends at multiples of len(w2).
    """
    rank: int | None = None
    """Rank at which the file decomposes w2, or w1 if w2 is full; None if both are full."""

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

    def selected_rows(self, ranges: Sequence[RowRange]) -> "Kronecker":
        """The factors of the rows `ranges` of ΔW, in this order. Rows of w1 that none of them uses are dropped."""
        if self.ranges is not None:
            raise ValueError("rows can be selected only once, from the whole matrix")
        block_rows = self.w2.shape[0]
        pieces, new_ranges, offset = [], [], 0
        for start, stop in ranges:
            first, end = start // block_rows, -(-stop // block_rows)
            pieces.append(self.w1[first:end])
            new_ranges.append((offset + start - first * block_rows, offset + stop - first * block_rows))
            offset += (end - first) * block_rows
        is_cut = all(start % block_rows == 0 == stop % block_rows for start, stop in ranges)
        return replace(self, w1=torch.cat(pieces), ranges=None if is_cut else tuple(new_ranges))


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

    def selected_rows(self, ranges: Sequence[RowRange]) -> "Hadamard":
        """The factors of the rows `ranges` of ΔW, in this order."""
        return replace(
            self,
            w1_b=torch.cat([self.w1_b[start:stop] for start, stop in ranges]),
            w2_b=torch.cat([self.w2_b[start:stop] for start, stop in ranges]),
        )


Factors = LowRank | Kronecker | Hadamard
