"""The density of sigma that a run trains with: that of its options, shifted by a constant or for the resolution.

Imports no torch, so that `simpletuner plan` uses the same function as training.
"""

import math
from dataclasses import dataclass

from simpletuner.config.options.schedule import TIMESTEPS, ScheduleOptions
from simpletuner.flow.sigma import (
    Density,
    beta_density,
    listed_density,
    mu_linear,
    shifted,
    sigmoid_density,
    uniform_density,
)


@dataclass(frozen=True)
class Timesteps:
    """A density of sigma before the shift, and the shift."""

    density: Density
    shift: float | None
    """None derives the shift from the sample's size."""
    offset_scale: float = 0.0
    """Change of logit(sigma) per unit of offset of the normal draw; 0 for densities without a normal draw."""

    @classmethod
    def of(cls, options: ScheduleOptions) -> "Timesteps":
        """The density that the options describe. Listed timesteps are never shifted."""
        if options.flow_custom_timesteps is not None:
            return cls(listed_density([timestep / TIMESTEPS for timestep in options.flow_custom_timesteps]), 1.0)
        scale = 0.0
        if options.flow_use_uniform_schedule:
            density = uniform_density()
        elif options.flow_use_beta_schedule:
            density = beta_density(options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta)
        else:
            scale = options.flow_sigmoid_scale
            density = sigmoid_density(scale)
        return cls(density, None if options.flow_schedule_auto_shift else options.flow_schedule_shift, scale)

    def shift_of(self, tokens: int, offset: float = 0.0) -> float:
        """The shift for a sample of `tokens` image tokens, in a dataset whose normal draws are shifted by `offset`.

        sigmoid(scale·(z + offset)) is sigmoid(scale·z) shifted by exp(scale·offset), and shifts multiply.
        """
        shift = math.exp(mu_linear(tokens)) if self.shift is None else self.shift
        return shift * math.exp(self.offset_scale * offset)

    def sigma(self, u: float, tokens: int, offset: float = 0.0) -> float:
        """The sigma at quantile `u`, in (0, 1), of the shifted density."""
        return shifted(self.density(u), self.shift_of(tokens, offset))
