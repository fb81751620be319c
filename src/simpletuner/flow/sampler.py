"""From noise to data: a sampler is a function of (velocity, x, sigmas)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Float[Tensor, "b c h w"], float], Float[Tensor, "b c h w"]]


def euler(
    velocity: Velocity,
    x: Float[Tensor, "b c h w"],
    sigmas: Sequence[float],
    report: Callable[[int], None] = lambda step: None,
) -> Float[Tensor, "b c h w"]:
    """Follow `velocity` along falling `sigmas`, one model call a step. The state is kept in x's type (fp32).

    `report` is told how many steps are done.
    """
    for step, (here, there) in enumerate(pairwise(sigmas), start=1):
        x = x + (there - here) * velocity(x, here).to(x.dtype)
        report(step)
    return x
