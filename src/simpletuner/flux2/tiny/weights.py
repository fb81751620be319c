"""Drawn weights: each tensor depends on the seed and its name, on no machine.

Only integers are drawn, and scaled once: no vectorized logarithm, whose last bits differ between processors.
Gains keep activations near unit size.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed

Shapes = Mapping[str, tuple[int, ...]]

# Mean squares: a sinusoid has 1/2, SiLU of a unit normal 0.36. What modulates, gates and ends is zero: a transformer
# starts to learn best where each block does nothing yet (adaLN-Zero, arXiv 2212.09748).
START_GAINS = {
    "embedder.linear_1": math.sqrt(2),
    "embedder.linear_2": 1.67,
    "modulation": 0.0,
    "norm_out": 0.0,
    "proj_out": 0.0,
}
# A klein is not trained before it is used: its blocks must do something, or their adapters would get no gradient.
KLEIN_GAINS = {
    "embedder.linear_1": math.sqrt(2),
    "embedder.linear_2": 1.67,
    "modulation": 0.5,
    "norm_out": 0.5,
    "proj_out": 0.3,
}
TEXT_GAINS = {"o_proj": 0.25, "down_proj": 0.25}


def drawn(shape: tuple[int, ...], deviation: float, seed: int, *place: str) -> Float[Tensor, "*shape"]:
    """Uniform numbers around 0 with standard `deviation`; `place` names the draw."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "init", *place))
    steps = torch.randint(-(2**23), 2**23, shape, generator=generator).double() + 0.5
    return (steps * (math.sqrt(3) * deviation / 2**23)).float()


def draw(component: str, shapes: Shapes, gains: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """A tensor for each of `shapes`: matrices of variance gain²/fan-in, norms at their gain, biases zero."""
    tensors = {}
    for name, shape in shapes.items():
        gain = math.prod((factor for part, factor in gains.items() if part in name), start=1.0)
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.full(shape, gain)
        else:
            # A token's embedding is its own fan-in.
            fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
            tensors[name] = drawn(shape, gain / math.sqrt(fan_in), seed, component, name)
    return tensors
