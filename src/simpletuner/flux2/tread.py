"""TREAD (arXiv 2501.04765): in training, a range of blocks (a route) processes only a part of the image tokens.

The other image tokens bypass the route and rejoin unchanged after it, so prediction and loss cover all tokens. Text
tokens are always processed. The tokens to keep are drawn outside the model, for each sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.flow.choice import TokenChoice
from simpletuner.flux2.rotary import Rotary
from simpletuner.flux2.routes import Route


def draw_choice(
    seed: int,
    step: int,
    slot: int,
    route: int,
    tokens: int,
    keep: int,
    force_keep: Bool[Tensor, " tokens"] | None = None,
) -> Int64[Tensor, " keep"]:
    """Draw the `keep` token indices, of `tokens`, that a route keeps for one sample; ascending, on the CPU.

    `step`, `slot` (of the sample) and `route` key the draw. Every subset is equally likely, but tokens marked in
    `force_keep` are kept first.
    """
    generator = torch.Generator().manual_seed(draw_seed(seed, "tread", step, slot, route))
    order = torch.randperm(tokens, generator=generator)
    if force_keep is not None:
        order = order - tokens * force_keep
    return order.argsort()[:keep].sort().values


def draw_choices(
    routes: Sequence[Route],
    seed: int,
    step: int,
    slots: Sequence[int],
    tokens: int,
    force_keep: Bool[Tensor, "b tokens"] | None = None,
) -> tuple[TokenChoice, ...]:
    """Draw the tokens that each route keeps, for the samples in `slots` of `step` with `tokens` image tokens each.

    All samples keep the same number of tokens, and all tokens marked in `force_keep`. If a sample has more marks than
    the route keeps, the number rises to the largest count of marks. Routes that keep all tokens are omitted.
    """
    forced = 0 if force_keep is None else int(force_keep.sum(dim=1).max())
    choices = []
    for index, route in enumerate(routes):
        keep = max(route.keeps(tokens), forced)
        if keep < tokens:
            indices = [
                draw_choice(seed, step, slot, index, tokens, keep, None if force_keep is None else force_keep[row])
                for row, slot in enumerate(slots)
            ]
            choices.append(TokenChoice(route.start, route.end, torch.stack(indices)))
    return tuple(choices)


class _GatherTokens(torch.autograd.Function):
    """Gather whose backward writes the gradient instead of adding it, because no index occurs twice.

    Autograd's own backward adds atomically on a GPU, which is slow in bf16 and not deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.tokens = x.shape[1]
        return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (indices,) = ctx.saved_tensors
        batch, _, width = gradient.shape
        whole = gradient.new_zeros(batch, ctx.tokens, width)
        return whole.scatter_(1, indices[..., None].expand(-1, -1, width), gradient), None


def gather_tokens(x: Float[Tensor, "b n width"], indices: Int64[Tensor, "b kept"]) -> Float[Tensor, "b kept width"]:
    """The tokens of `x` at `indices`, which must be distinct within a sample."""
    tokens: Tensor = _GatherTokens.apply(x, indices)  # type: ignore[no-untyped-call]
    return tokens


class Routing:
    """Applies `choices` in one forward pass: call `enter` before each block and `leave` after it.

    `angles` are the rotary tables of the text tokens and of the image tokens in the current sequence.
    """

    def __init__(self, choices: Sequence[TokenChoice], angles: Rotary, text_length: int) -> None:
        self.angles = angles
        self._all_angles = angles
        self._text_length = text_length
        self._starts = {choice.start: choice for choice in choices}
        self._ends = {choice.end: choice for choice in choices}
        self._all_image: Tensor | None = None

    def enter(self, block: int, x: Float[Tensor, "b n hidden"], text: int = 0) -> Float[Tensor, "b m hidden"]:
        """`x` (`text` text tokens, then image tokens) without the tokens that bypass a route starting at `block`."""
        choice = self._starts.get(block)
        if choice is None:
            return x
        self._all_image = x[:, text:]
        self.angles = self._kept_angles(choice)
        return joined_sequence(x[:, :text], gather_tokens(self._all_image, choice.kept_tokens))

    def leave(self, block: int, x: Float[Tensor, "b m hidden"], text: int = 0) -> Float[Tensor, "b n hidden"]:
        """`x` with the tokens that bypassed a route ending at `block` back at their positions."""
        choice = self._ends.get(block)
        if choice is None:
            return x
        assert self._all_image is not None  # the route started
        indices = choice.kept_tokens[..., None].expand(-1, -1, x.shape[-1])
        image = self._all_image.scatter(1, indices, x[:, text:])
        self._all_image, self.angles = None, self._all_angles
        return joined_sequence(x[:, :text], image)

    def _kept_angles(self, choice: TokenChoice) -> Rotary:
        """The rotary tables of all text tokens and of the image tokens that each sample keeps."""
        cos, sin = (
            torch.cat(
                [
                    table[:, : self._text_length].expand(len(choice.kept_tokens), -1, -1),
                    gather_tokens(
                        table[:, self._text_length :].expand(len(choice.kept_tokens), -1, -1), choice.kept_tokens
                    ),
                ],
                dim=1,
            )
            for table in (table if table.ndim == 3 else table[None] for table in self._all_angles)
        )
        return cos, sin


def joined_sequence(
    text: Float[Tensor, "b l hidden"], image: Float[Tensor, "b n hidden"]
) -> Float[Tensor, "b m hidden"]:
    """Text and image tokens in one sequence; without text, `image` itself."""
    return torch.cat([text, image], dim=1) if text.shape[1] else image
