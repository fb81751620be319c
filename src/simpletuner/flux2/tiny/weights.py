"""Draw random weights: each tensor depends only on the seed and its name, not on the machine.

Only integers are drawn, then scaled once: normal draws need logarithms, whose last bits differ between processors.
Gains keep activations near unit size.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.base.draws import draw_seed

Shapes = Mapping[str, tuple[int, ...]]

# The mean square of a sinusoid is 1/2, that of SiLU of a unit normal 0.36: hence the gains √2 and 1.67. Modulation,
# gates and the last layer are zero: training starts best if each block is the identity at first (adaLN-Zero, arXiv
# 2212.09748).
START_GAINS = {
    "embedder.linear_1": math.sqrt(2),
    "embedder.linear_2": 1.67,
    "modulation": 0.0,
    "norm_out": 0.0,
    "proj_out": 0.0,
}
# The kleins are used untrained: their blocks must have an effect, or adapters would get no gradient.
KLEIN_GAINS = {
    "embedder.linear_1": math.sqrt(2),
    "embedder.linear_2": 1.67,
    "modulation": 0.5,
    "norm_out": 0.5,
    "proj_out": 0.3,
}
TEXT_GAINS = {"o_proj": 0.25, "down_proj": 0.25}


def draw_uniform(shape: tuple[int, ...], deviation: float, seed: int, *key: str) -> Float[Tensor, "*shape"]:
    """Draw uniform numbers around 0 with standard `deviation`, keyed by `seed` and `key`."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "init", *key))
    steps = torch.randint(-(2**23), 2**23, shape, generator=generator).double() + 0.5
    return (steps * (math.sqrt(3) * deviation / 2**23)).float()


def draw(component: str, shapes: Shapes, gains: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Draw a tensor for each of `shapes`: matrices of variance gain²/fan-in, norms equal to their gain, biases zero."""
    tensors = {}
    for name, shape in shapes.items():
        gain = math.prod((factor for part, factor in gains.items() if part in name), start=1.0)
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.full(shape, gain)
        else:
            # An embedding reads one token: its fan-in is 1.
            fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
            tensors[name] = draw_uniform(shape, gain / math.sqrt(fan_in), seed, component, name)
    return tensors
