"""What a denoiser is conditioned on besides the noise level. `data` fills it, `flux2` reads it, `flow` passes it on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class TextContext:
    """Text contexts of equal length, each distinct row held once: row i of sample b is `rows[index[b, i]]`.

    Padding rows that are alike are so held, cached and copied to the accelerator once, and expanded there. Which rows
    are padding, and on which side, is known to the text encoder's codec alone.
    """

    rows: Float[Tensor, "n d"]
    index: Int64[Tensor, "b l"]

    @classmethod
    def dense(cls, context: Float[Tensor, "b l d"]) -> "TextContext":
        """Contexts whose rows all differ."""
        index = torch.arange(context.shape[0] * context.shape[1], device=context.device)
        return cls(rearrange(context, "b l d -> (b l) d"), index.view(context.shape[:2]))

    @classmethod
    def stacked(cls, contexts: Sequence["TextContext"]) -> "TextContext":
        """The samples of `contexts`, one after the other.

        Raises:
            ValueError: their lengths differ.
        """
        lengths = {context.index.shape[1] for context in contexts}
        if len(lengths) != 1:
            raise ValueError(f"contexts of different lengths: {sorted(lengths)}")
        before = 0
        indices = []
        for context in contexts:
            indices.append(context.index + before)
            before += len(context.rows)
        return cls(torch.cat([context.rows for context in contexts]), torch.cat(indices))

    def expanded(self, dtype: torch.dtype | None = None) -> Float[Tensor, "b l d"]:
        """The contexts themselves, in `dtype`, by default that of the rows."""
        return (self.rows if dtype is None else self.rows.to(dtype))[self.index]

    def select(self, samples: Int64[Tensor, " k"]) -> "TextContext":
        """The contexts of some samples."""
        return TextContext(self.rows, self.index[samples])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TextContext":
        """The same contexts with `change` applied to each tensor, such as a copy to a device."""
        return TextContext(change(self.rows), change(self.index))

    def to(self, device: torch.device) -> "TextContext":
        return self.mapped(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class References:
    """The reference images of each sample, as tokens: clean latents, which the noise level does not touch.

    Samples with fewer tokens than others are padded at the end.
    """

    tokens: Float[Tensor, "b r c"]
    ids: Int64[Tensor, "b r 4"]
    """Position (t, h, w, l) of each token; those of padding mean nothing."""
    is_token: Bool[Tensor, "b r"] | None = None
    """False where a sample is padded; None where none is."""

    @classmethod
    def stacked(cls, each: Sequence["References | None"], counts: Sequence[int]) -> "References | None":
        """The samples of `each`, one after the other, padded to the longest; None where no sample has any.

        Args:
            counts: samples of each, since a None has no references for any of them.
        """
        given = [references for references in each if references is not None]
        length = max((references.tokens.shape[1] for references in given), default=0)
        if length == 0:
            return None
        first = given[0]
        whole = [
            cls(first.tokens.new_zeros(count, 0, first.tokens.shape[2]), first.ids.new_zeros(count, 0, 4))
            if references is None
            else references
            for references, count in zip(each, counts, strict=True)
        ]
        is_padded = any(one.is_token is not None or one.tokens.shape[1] < length for one in whole)
        padded = [one.padded(length) for one in whole]
        return cls(
            torch.cat([one.tokens for one in padded]),
            torch.cat([one.ids for one in padded]),
            torch.cat([one.places for one in padded]) if is_padded else None,
        )

    @property
    def places(self) -> Bool[Tensor, "b r"]:
        """`is_token`, also where no sample is padded."""
        if self.is_token is not None:
            return self.is_token
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    def padded(self, length: int) -> "References":
        """The same references with `length` places a sample; themselves where they have these."""
        more = length - self.tokens.shape[1]
        if more == 0:
            return self
        tokens, ids = (F.pad(each, (0, 0, 0, more)) for each in (self.tokens, self.ids))
        return References(tokens, ids, F.pad(self.places, (0, more)))

    def select(self, samples: Int64[Tensor, " k"]) -> "References":
        """The references of some samples."""
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
    """The condition of each sample of a batch."""

    context: TextContext
    guidance: Float[Tensor, " b"]
    """Scale for the guidance embedder, as a user writes it (1.0, 4.0); models without the embedder ignore it."""
    references: References | None = None
    """None where no sample has any."""

    @classmethod
    def at(cls, context: TextContext, guidance: float, references: References | None = None) -> "Condition":
        """`context` and `references` with the same guidance for each sample, on the context's device."""
        return cls(context, torch.full((len(context.index),), guidance, device=context.index.device), references)

    @classmethod
    def stacked(cls, conditions: Sequence["Condition"]) -> "Condition":
        """The samples of `conditions`, one after the other.

        Raises:
            ValueError: the lengths of their contexts differ.
        """
        context = TextContext.stacked([condition.context for condition in conditions])
        guidance = [condition.guidance for condition in conditions]
        references = References.stacked([condition.references for condition in conditions], [*map(len, guidance)])
        return cls(context, torch.cat(guidance), references)

    def select(self, samples: Int64[Tensor, " k"]) -> "Condition":
        """The condition of some samples."""
        references = None if self.references is None else self.references.select(samples)
        return Condition(self.context.select(samples), self.guidance[samples], references)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """The same condition with `change` applied to each tensor."""
        references = None if self.references is None else self.references.mapped(change)
        return Condition(self.context.mapped(change), change(self.guidance), references)


Denoise = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"], Condition], Float[Tensor, "b c h w"]]
"""(noised latents, sigma, condition) → velocity."""
