"""Options for flow matching: the distribution of noise levels, and the loss."""

import math
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.options.kinds import Expects, IsJson, Positive, Slice

TIMESTEPS = 1000.0
"""The timestep of pure noise: sigma 1."""


def _listed_timesteps(value: object) -> object:
    """Convert a comma list, a number or a JSON list to a float tuple; return other values for the type to reject."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),)
    try:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(float(part) for part in parts) if isinstance(parts, list) else value
    except (TypeError, ValueError):
        return value


def _in_range(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(math.isfinite(value) and 0 <= value <= TIMESTEPS for value in values):
        raise ValueError(f"{values} are not all in 0 to {TIMESTEPS:g}")
    if values and max(values) <= 1:
        raise ValueError("these look like sigmas")
    return values


class ScheduleOptions(Slice):
    """Flow matching."""

    flow_schedule_shift: Positive = FLAVOURS[DEFAULT_FLAVOUR].shift
    """Timestep shift: the s in σ' = sσ/(1+(s-1)σ). Above 1, training sees more noisy inputs; 1 changes nothing."""

    flow_schedule_auto_shift: bool = False
    """Compute the shift from the image's size instead: its logarithm is on the line through (256, 0.5) and (4096, 1.15)
    in image tokens."""

    flow_sigmoid_scale: Positive = 1.0
    """Scale of the default distribution, σ = sigmoid(scale·N(0,1)). A larger scale spreads σ more."""

    flow_use_uniform_schedule: bool = False
    """Draw σ from a uniform distribution instead of the default one, before the shift."""

    flow_use_beta_schedule: bool = False
    """Draw σ from a beta distribution instead of the default one, before the shift."""

    flow_beta_schedule_alpha: Positive = 2.0
    """Alpha of the beta distribution."""

    flow_beta_schedule_beta: Positive = 2.0
    """Beta of the beta distribution."""

    flow_custom_timesteps: (
        Annotated[
            tuple[float, ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(_listed_timesteps),
            AfterValidator(_in_range),
            Expects("timesteps from 0 (data) to 1000 (noise), such as 338,548,694 or [338, 548, 694]"),
        ]
        | None
    ) = None
    """Train only at these timesteps (σ = timestep/1000), each as often as it is listed. No shift is applied to them."""

    timestep_strata: bool = False
    """Stratify the timesteps: each of an epoch's n samples draws its σ from a different one of n equal parts of the
    distribution. Each draw is still random, and the distribution stays the same."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """The loss: `l2` is the squared error; `huber` and `smooth_l1` grow only linearly for large errors."""

    huber_c: Positive = 0.1
    """Threshold at which `huber` and `smooth_l1` become linear, before `huber_schedule`."""

    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How `huber_c` depends on the noise level."""
