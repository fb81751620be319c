"""Flow matching: the density of noise levels, and the loss."""

import math
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.options.kinds import IsJson, Positive, Says, Slice

TIMESTEPS = 1000.0
"""The timestep of pure noise: sigma 1."""


def _listed_timesteps(value: object) -> object:
    """A comma list, a single number or a JSON list as a tuple of numbers; anything else for the type to refuse."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),)
    try:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(float(part) for part in parts) if isinstance(parts, list) else value
    except (TypeError, ValueError):
        return value


def _in_range(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(math.isfinite(value) and 0 <= value <= TIMESTEPS for value in values):
        raise ValueError(f"{values} leaves 0 to {TIMESTEPS:g}")
    if values and max(values) <= 1:
        raise ValueError("these look like sigmas")
    return values


class ScheduleOptions(Slice):
    """Flow matching."""

    flow_schedule_shift: Positive = FLAVOURS[DEFAULT_FLAVOUR].shift
    """The s in σ' = sσ/(1+(s-1)σ): above 1 trains more on noisy inputs; 1 changes nothing."""

    flow_schedule_auto_shift: bool = False
    """Take the shift from the picture's size instead: the line through (256, 0.5) and (4096, 1.15)
    in image tokens."""

    flow_sigmoid_scale: Positive = 1.0
    """Spread of the default density, σ = sigmoid(scale·N(0,1))."""

    flow_use_uniform_schedule: bool = False
    """Draw σ evenly instead, before the shift."""

    flow_use_beta_schedule: bool = False
    """Draw σ from a beta distribution instead, before the shift."""

    flow_beta_schedule_alpha: Positive = 2.0
    """First parameter of the beta distribution."""

    flow_beta_schedule_beta: Positive = 2.0
    """Second parameter of the beta distribution."""

    flow_custom_timesteps: (
        Annotated[
            tuple[float, ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(_listed_timesteps),
            AfterValidator(_in_range),
            Says("timesteps from 0 (data) to 1000 (noise), as 338,548,694 or [338, 548, 694]"),
        ]
        | None
    ) = None
    """Train at these timesteps only (σ = timestep/1000), each as often as it is listed. They are taken as they
    stand: no shift moves them."""

    timestep_strata: bool = False
    """Cover the density evenly: of an epoch's n samples each draws its σ from another n-th of it. What a sample
    draws stays random, and the density stays the same."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Squared error, or one that grows only linearly for large errors."""

    huber_c: Positive = 0.1
    """The error at which `huber` and `smooth_l1` turn linear, before `huber_schedule`."""

    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How `huber_c` depends on the noise level."""
