"""Scheduled sampling: train on inputs that the model itself generated.

The current model is integrated, as in sampling, from σ_s, slightly noisier than the training sigma, to that sigma. The
result contains the model's own errors. The target remains the velocity of the path, noise − clean.
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
"""The longest step of a rollout: the mean step of a 50-step sampler, whose errors training should see."""


@dataclass(frozen=True)
class Solver:
    """A sampler and its requirements."""

    integrate: Callable[
        [Velocity, Float[Tensor, "b c h w"], Float[Tensor, "points b"]],
        Float[Tensor, "b c h w"],
    ]
    calls_per_step: int
    min_steps: int
    """Minimum number of steps. A multistep method starts with an Euler step, so one step would be Euler's method."""

    def steps(self, longest: float) -> int:
        """Number of steps of each rollout, in a run whose longest rollout covers a share `longest` of the path."""
        # Round first, so that 60/1000 is three steps of 20/1000, not four from a quotient of 3.0…04.
        return max(self.min_steps, math.ceil(round(longest / LONGEST_STEP, 9)))


SOLVERS = {
    "euler": Solver(euler, calls_per_step=1, min_steps=1),
    "heun": Solver(heun, calls_per_step=2, min_steps=1),
    "unipc": Solver(unipc, calls_per_step=1, min_steps=2),
    "dpm": Solver(dpm, calls_per_step=1, min_steps=2),
}


@dataclass(frozen=True)
class Reflex:
    """Weights of ReflexFlow's terms (arXiv 2512.04904). The defaults disable all of them."""

    alpha: float = 0.0
    """Weight of the frequency compensation, which emphasizes elements whose prediction the rollout changed."""
    beta1: float = 0.0
    """Weight of the anti-drift term."""
    beta2: float = 1.0
    """Weight of the compensated error."""


@dataclass(frozen=True)
class RolloutStarts:
    """Start points of the rollouts in a batch."""

    sigma: Float[Tensor, " b"]
    """Start sigma of each sample; the training sigma if the sample is not rolled out."""
    rolled: Int64[Tensor, " k"]
    """Batch indices of the samples that are rolled out, ascending."""

    @classmethod
    def at(cls, source: Float[Tensor, " b"], sigma: Float[Tensor, " b"]) -> "RolloutStarts":
        """Starts for rollouts from `source` to `sigma`, for the samples whose `source` is above `sigma`.

        Call it with CPU tensors: the number of such samples is a host value, so a device would have to synchronize.
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
    """Integrate the model from the noised latents at `starts` to `sigma`, in `steps` equal steps per sample.

    Samples that are not rolled out get the plainly noised latents of `noised`, bit for bit, and are left out of the
    model calls. If no sample is rolled out, the model is not called. Runs without gradients.
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
    """`flow_loss` at the rolled-out latents `x`, with ReflexFlow's terms for samples where `is_rolled`.

    Args:
        unrolled: the prediction at the plainly noised latents, without gradient. Required if alpha is not 0.
    """
    prediction = denoise(x, sigma, condition).float()
    penalties = penalty(prediction - velocity(clean, noise), sigma)
    losses = averaged(penalties, weight)
    if reflex.alpha:
        if unrolled is None:
            raise ValueError("frequency compensation needs the prediction at the plainly noised latents")
        factor = compensation(unrolled.float(), prediction.detach(), reflex.alpha, weight)
        # Select after the mean: last bits of a mean depend on the memory layout of its elements.
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
    """The weight of each element's error: 1 + α·|e|/mean|e|, where e = unrolled − rolled is the exposure bias.

    The mean is over a sample, weighted by `weight`. docs/decisions/0006-reflexflow-weight.md explains why.
    """
    bias = (unrolled - rolled).abs()
    typical = rearrange(averaged(bias, weight), "b -> b 1 1 1")
    # If the rollout changed nothing, there is no bias to compensate.
    return 1 + alpha * bias / torch.where(typical > 0, typical, 1)


def drift(
    prediction: Float[Tensor, "b c h w"],
    offset: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Squared distance, 0 to 4, between the unit vectors of `prediction` and of `offset`, which is x − clean.

    If `weight` is given, both are first multiplied by it, which excludes positions of weight 0. On the path both have
    the same direction: x − clean = σ·(noise − clean).
    """
    if weight is not None:
        prediction, offset = (rearrange(weight, "b h w -> b 1 h w") * each for each in (prediction, offset))
    predicted_unit, offset_unit = (
        F.normalize(rearrange(each, "b c h w -> b (c h w)"), dim=1) for each in (prediction, offset)
    )
    return reduce((predicted_unit - offset_unit).square(), "b n -> b", "sum")
