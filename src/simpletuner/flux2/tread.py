"""TREAD (arXiv 2501.04765): while training, a stretch of blocks processes only some of a picture's tokens.

The others go around the stretch and come back unchanged behind it, so the model's answer, and the loss, has all
tokens. Text tokens always stay. Which image tokens stay is drawn outside of the model, for each sample.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.flow.choice import Choice
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
    """The `keep` of `tokens` places that the `route`-th route keeps of the sample in `slot` of `step`, rising.

    Every set of places is as likely as any other, but that those in `force_keep` come first. On the CPU.
    """
    generator = torch.Generator().manual_seed(draw_seed(seed, "tread", step, slot, route))
    rank = torch.randperm(tokens, generator=generator)
    if force_keep is not None:
        rank = rank - tokens * force_keep
    return rank.argsort()[:keep].sort().values


def draw_choices(
    routes: Sequence[Route],
    seed: int,
    step: int,
    slots: Sequence[int],
    tokens: int,
    force_keep: Bool[Tensor, "b tokens"] | None = None,
) -> tuple[Choice, ...]:
    """What each route keeps of the samples in `slots` of `step`, which have `tokens` image tokens each.

    Each sample keeps equally many, those marked in `force_keep` among them: where more are marked than the route
    keeps, as many as the sample with the most marks needs. A route that keeps all is left out.
    """
    forced = 0 if force_keep is None else int(force_keep.sum(dim=1).max())
    choices = []
    for index, route in enumerate(routes):
        keep = max(route.keeps(tokens), forced)
        if keep < tokens:
            kept = [
                draw_choice(seed, step, slot, index, tokens, keep, None if force_keep is None else force_keep[row])
                for row, slot in enumerate(slots)
            ]
            choices.append(Choice(route.start, route.end, torch.stack(kept)))
    return tuple(choices)


class _Taken(torch.autograd.Function):
    """Gather whose gradient is written to its places and not added: no place is taken twice. Autograd's own adds, which
    on a GPU is atomic, slow in bf16 and not deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = x.shape[1]
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (places,) = ctx.saved_tensors
        batch, _, width = gradient.shape
        whole = gradient.new_zeros(batch, ctx.tokens, width)
        return whole.scatter_(1, places[..., None].expand(-1, -1, width), gradient), None


def taken(x: Float[Tensor, "b n width"], places: Int64[Tensor, "b kept"]) -> Float[Tensor, "b kept width"]:
    """The tokens of `x` at `places`; those of a sample must differ from each other."""
    tokens: Tensor = _Taken.apply(x, places)  # type: ignore[no-untyped-call]
    return tokens


class Routing:
    """One forward pass's way through `choices`: call `enter` before each block and `leave` after it.

    `angles` are those of the text and of the image tokens that are on the way at the moment.
    """

    def __init__(self, choices: Sequence[Choice], angles: Rotary, text_length: int) -> None:
        self.angles = angles
        self._all_angles = angles
        self._text_length = text_length
        self._starts = {choice.start: choice for choice in choices}
        self._ends = {choice.end: choice for choice in choices}
        self._all_image: Tensor | None = None

    def enter(self, block: int, x: Float[Tensor, "b n hidden"], text: int = 0) -> Float[Tensor, "b m hidden"]:
        """`x`, without the image tokens that go around `block` if a route starts there. Its first `text` are text."""
        choice = self._starts.get(block)
        if choice is None:
            return x
        self._all_image = x[:, text:]
        self.angles = self._kept_angles(choice)
        return behind(x[:, :text], taken(self._all_image, choice.kept))

    def leave(self, block: int, x: Float[Tensor, "b m hidden"], text: int = 0) -> Float[Tensor, "b n hidden"]:
        """`x`, with the image tokens that went around back in their places if a route ends at `block`."""
        choice = self._ends.get(block)
        if choice is None:
            return x
        assert self._all_image is not None  # the route started
        places = choice.kept[..., None].expand(-1, -1, x.shape[-1])
        image = self._all_image.scatter(1, places, x[:, text:])
        self._all_image, self.angles = None, self._all_angles
        return behind(x[:, :text], image)

    def _kept_angles(self, choice: Choice) -> Rotary:
        """The angles of all text and of each sample's own image tokens."""
        cos, sin = (
            torch.cat(
                [
                    table[:, : self._text_length].expand(len(choice.kept), -1, -1),
                    taken(table[:, self._text_length :].expand(len(choice.kept), -1, -1), choice.kept),
                ],
                dim=1,
            )
            for table in (table if table.ndim == 3 else table[None] for table in self._all_angles)
        )
        return cos, sin


def behind(text: Float[Tensor, "b l hidden"], image: Float[Tensor, "b n hidden"]) -> Float[Tensor, "b m hidden"]:
    """Text and image in one sequence; the image itself where there is no text."""
    return torch.cat([text, image], dim=1) if text.shape[1] else image
