"""Scheduled sampling: train on inputs that the model itself has made.

Between σ_s, a little noisier than the sigma to train at, and that sigma the current model is integrated as in sampling.
What it makes there carries the model's own errors; its target is still the velocity of the path, noise − clean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from simpletuner.flow.condition import Condition, Denoise
from simpletuner.flow.loss import Penalty, Prior, averaged, squared
from simpletuner.flow.path import noised, velocity
from simpletuner.flow.sampler import Velocity, dpm, euler, heun, unipc

LONGEST_STEP = 0.02
"""No step of a rollout is longer: it is the mean step of a sampler with 50 steps, whose errors are to be met."""


@dataclass(frozen=True)
class Solver:
    """A sampler, and what it needs."""

    integrate: Callable[
        [Velocity, Float[Tensor, "b c h w"], Float[Tensor, "points b"]],
        Float[Tensor, "b c h w"],
    ]
    calls_a_step: int
    least_steps: int
    """Fewer, and it would be another sampler: a multistep method's first step is Euler's."""

    def steps(self, longest: float) -> int:
        """Steps of every rollout of a run whose longest one spans `longest` of the path."""
        # Rounded first: 60/1000 must be three steps of 20/1000, and not four because a quotient came out as 3.0…04.
        return max(self.least_steps, math.ceil(round(longest / LONGEST_STEP, 9)))


SOLVERS = {
    "euler": Solver(euler, calls_a_step=1, least_steps=1),
    "heun": Solver(heun, calls_a_step=2, least_steps=1),
    "unipc": Solver(unipc, calls_a_step=1, least_steps=2),
    "dpm": Solver(dpm, calls_a_step=1, least_steps=2),
}


@dataclass(frozen=True)
class Reflex:
    """The weights of ReflexFlow's terms (arXiv 2512.04904). As they stand here they change nothing."""

    alpha: float = 0.0
    """Of the frequency compensation: how much more an element counts where rolling out changed the prediction."""
    beta1: float = 0.0
    """Of the anti-drift term."""
    beta2: float = 1.0
    """Of the compensated error."""


@dataclass(frozen=True)
class RolloutStarts:
    """Where the samples of a batch are rolled out from."""

    sigma: Float[Tensor, " b"]
    """Of each sample; its own sigma where it is not rolled out."""
    rolled: Int64[Tensor, " k"]
    """Places in the batch of the samples that are rolled out, rising."""

    @classmethod
    def at(cls, source: Float[Tensor, " b"], sigma: Float[Tensor, " b"]) -> "RolloutStarts":
        """Rolled out from `source` to `sigma`: the samples whose source is higher.

        Call it on the CPU: the number of such samples is a host value, and a device would be waited for.
        """
        (rolled,) = torch.nonzero(source > sigma, as_tuple=True)
        return cls(source, rolled)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RolloutStarts":
        """The same starts with `change` applied to each tensor."""
        return RolloutStarts(change(self.sigma), change(self.rolled))


@torch.no_grad()
def rolled_out(
    denoise: Denoise,
    clean: Float[Tensor, "b c h w"],
    condition: Condition,
    *,
    sigma: Float[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    starts: RolloutStarts,
    solver: Solver,
    steps: int,
) -> Float[Tensor, "b c h w"]:
    """Integrate the model from the noised latents at `starts` to `sigma`, in `steps` even steps a sample.

    A sample that starts at its sigma is the plainly noised one, bit for bit, and takes no part in the model calls;
    there are none at all if every sample is such. No gradient is kept.
    """
    x = noised(clean, noise, sigma)
    moving = starts.rolled
    if not len(moving):
        return x
    clean, noise, sigma, source = (each[moving] for each in (clean, noise, sigma, starts.sigma))
    condition = condition.select(moving)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=sigma.device)
    sigmas = torch.lerp(source.double(), sigma.double(), rearrange(share, "points -> points 1"))
    x[moving] = solver.integrate(lambda state, at: denoise(state, at, condition), noised(clean, noise, source), sigmas)
    return x


def rollout_loss(
    denoise: Denoise,
    x: Float[Tensor, "b c h w"],
    clean: Float[Tensor, "b c h w"],
    condition: Condition,
    *,
    sigma: Float[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    is_rolled: Bool[Tensor, " b"],
    unrolled: Float[Tensor, "b c h w"] | None = None,
    reflex: Reflex = Reflex(),
    penalty: Penalty = squared,
    weight: Float[Tensor, "b h w"] | None = None,
    prior: Prior | None = None,
) -> Float[Tensor, " b"]:
    """`flow_loss` at x instead of the plainly noised latents, with ReflexFlow's terms where `is_rolled`.

    Args:
        unrolled: the prediction at the plainly noised latents, without gradient. Needed where alpha is not 0.
    """
    prediction = denoise(x, sigma, condition).float()
    penalties = penalty(prediction - velocity(clean, noise), sigma)
    losses = averaged(penalties, weight)
    if reflex.alpha:
        if unrolled is None:
            raise ValueError("frequency compensation needs the prediction at the plainly noised latents")
        factor = compensation(unrolled.float(), prediction.detach(), reflex.alpha, weight)
        # Chosen between after the mean: a mean's last bit depends on how its elements lie in memory.
        losses = torch.where(is_rolled, averaged(factor * penalties, weight), losses)
    if reflex.beta2 != 1:
        losses = torch.where(is_rolled, reflex.beta2, 1) * losses
    if reflex.beta1:
        losses = losses + torch.where(is_rolled, reflex.beta1 * drift(prediction, x - clean, weight), 0)
    return losses if prior is None else losses + prior.loss(prediction, sigma, penalty)


def compensation(
    unrolled: Float[Tensor, "b c h w"],
    rolled: Float[Tensor, "b c h w"],
    alpha: float,
    weight: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """How much each element's error counts: 1 + α·|e|/mean|e|, where e = unrolled − rolled, the exposure bias.

    The mean is taken over a sample, by `weight` if given. Why a mean and why |e|:
    docs/decisions/0006-reflexflow-weight.md.
    """
    bias = (unrolled - rolled).abs()
    typical = rearrange(averaged(bias, weight), "b -> b 1 1 1")
    # Where rolling out changed nothing at all there is nothing to compensate.
    return 1 + alpha * bias / torch.where(typical > 0, typical, 1)


def drift(
    prediction: Float[Tensor, "b c h w"],
    away: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Squared distance of the unit vectors of `prediction` and of `away`, the way from the data to x: 0 to 4. Both are
    multiplied by `weight` if given, so that places without weight have no part in it.

    On the path the two are one direction, x − clean = σ·(noise − clean).
    """
    if weight is not None:
        prediction, away = (rearrange(weight, "b h w -> b 1 h w") * each for each in (prediction, away))
    one, other = (F.normalize(rearrange(each, "b c h w -> b (c h w)"), dim=1) for each in (prediction, away))
    return reduce((one - other).square(), "b n -> b", "sum")
