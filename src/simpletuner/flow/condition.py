"""A denoiser's conditions other than the noise level: `data` creates them, `flow` passes them, `flux2` reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class TextContext:
    """Text contexts of equal length whose equal rows can share storage: row i of sample b is `rows[index[b, i]]`.

    Padding rows that are equal are stored, cached and copied to the accelerator once, and expanded there. Only the
    text encoder's codec knows which rows are padding.
    """

    rows: Float[Tensor, "n d"]
    index: Int64[Tensor, "b l"]

    @classmethod
    def dense(cls, context: Float[Tensor, "b l d"]) -> "TextContext":
        """Contexts that store every row of `context`."""
        index = torch.arange(context.shape[0] * context.shape[1], device=context.device)
        return cls(rearrange(context, "b l d -> (b l) d"), index.view(context.shape[:2]))

    @classmethod
    def stacked(cls, contexts: Sequence["TextContext"]) -> "TextContext":
        """Concatenate the samples of `contexts`.

        Raises:
            ValueError: the lengths differ.
        """
        lengths = {context.index.shape[1] for context in contexts}
        if len(lengths) != 1:
            raise ValueError(f"contexts of different lengths: {sorted(lengths)}")
        row_count = 0
        indices = []
        for context in contexts:
            indices.append(context.index + row_count)
            row_count += len(context.rows)
        return cls(torch.cat([context.rows for context in contexts]), torch.cat(indices))

    def expanded(self, dtype: torch.dtype | None = None) -> Float[Tensor, "b l d"]:
        """The full contexts in `dtype`; by default in that of the rows."""
        return (self.rows if dtype is None else self.rows.to(dtype))[self.index]

    def select(self, samples: Int64[Tensor, " k"]) -> "TextContext":
        """The contexts of the given samples."""
        return TextContext(self.rows, self.index[samples])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TextContext":
        """The same contexts with `change` applied to each tensor, such as a copy to a device."""
        return TextContext(change(self.rows), change(self.index))

    def to(self, device: torch.device) -> "TextContext":
        return self.mapped(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class References:
    """The reference images of each sample, as tokens of clean latents, independent of the noise level.

    Samples with fewer tokens than the longest are padded at the end.
    """

    tokens: Float[Tensor, "b r c"]
    ids: Int64[Tensor, "b r 4"]
    """Position (t, h, w, l) of each token; arbitrary for padding."""
    is_token: Bool[Tensor, "b r"] | None = None
    """False for padding; None if no sample is padded."""

    @classmethod
    def stacked(cls, parts: Sequence["References | None"], counts: Sequence[int]) -> "References | None":
        """Concatenate the samples of `parts`, padded to the longest; None if no sample has references.

        Args:
            counts: number of samples of each part, needed for parts that are None.
        """
        present = [references for references in parts if references is not None]
        length = max((references.tokens.shape[1] for references in present), default=0)
        if length == 0:
            return None
        first = present[0]
        filled = [
            cls(first.tokens.new_zeros(count, 0, first.tokens.shape[2]), first.ids.new_zeros(count, 0, 4))
            if references is None
            else references
            for references, count in zip(parts, counts, strict=True)
        ]
        is_padded = any(entry.is_token is not None or entry.tokens.shape[1] < length for entry in filled)
        padded = [entry.padded(length) for entry in filled]
        return cls(
            torch.cat([entry.tokens for entry in padded]),
            torch.cat([entry.ids for entry in padded]),
            torch.cat([entry.token_mask for entry in padded]) if is_padded else None,
        )

    @property
    def token_mask(self) -> Bool[Tensor, "b r"]:
        """`is_token`, or a mask that is True everywhere if no sample is padded."""
        if self.is_token is not None:
            return self.is_token
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    def padded(self, length: int) -> "References":
        """The same references padded to `length` tokens per sample; `self` if they have this length already."""
        added = length - self.tokens.shape[1]
        if added == 0:
            return self
        tokens, ids = (F.pad(each, (0, 0, 0, added)) for each in (self.tokens, self.ids))
        return References(tokens, ids, F.pad(self.token_mask, (0, added)))

    def select(self, samples: Int64[Tensor, " k"]) -> "References":
        """The references of the given samples."""
        return References(
            self.tokens[samples], self.ids[samples], None if self.is_token is None else self.is_token[samples]
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "References":
        """The same references with `change` applied to each tensor."""
        return References(
            change(self.tokens), change(self.ids), None if self.is_token is None else change(self.is_token)
        )


@dataclass(frozen=True)
class Condition:
    """The conditions of the samples in a batch."""

    context: TextContext
    guidance: Float[Tensor, " b"]
    """Guidance of each sample, as a user gives it (1.0, 4.0). Models without a guidance embedder ignore it."""
    references: References | None = None
    """None if no sample has references."""

    @classmethod
    def at(cls, context: TextContext, guidance: float, references: References | None = None) -> "Condition":
        """`context` and `references` with the same guidance for each sample, on the context's device."""
        return cls(context, torch.full((len(context.index),), guidance, device=context.index.device), references)

    @classmethod
    def stacked(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Concatenate the samples of `conditions`.

        Raises:
            ValueError: the lengths of the contexts differ.
        """
        context = TextContext.stacked([condition.context for condition in conditions])
        guidance = [condition.guidance for condition in conditions]
        references = References.stacked([condition.references for condition in conditions], [*map(len, guidance)])
        return cls(context, torch.cat(guidance), references)

    def select(self, samples: Int64[Tensor, " k"]) -> "Condition":
        """The conditions of the given samples."""
        references = None if self.references is None else self.references.select(samples)
        return Condition(self.context.select(samples), self.guidance[samples], references)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """The same condition with `change` applied to each tensor."""
        references = None if self.references is None else self.references.mapped(change)
        return Condition(self.context.mapped(change), change(self.guidance), references)


Denoise = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"], Condition], Float[Tensor, "b c h w"]]
"""(noised latents, sigma, condition) → velocity."""
