"""Flow matching: the density of noise levels, and the loss."""

from typing import Literal

from simpletuner.config.options.kinds import Positive, Slice


class ScheduleOptions(Slice):
    """Flow matching."""

    flow_schedule_shift: Positive = 3.0
    """The s in σ' = sσ/(1+(s-1)σ): above 1 trains more on noisy inputs; 1 changes nothing."""

    flow_schedule_auto_shift: bool = False
    """Take the shift from the picture's size instead: the line through (256, 0.5) and (4096, 1.15)
    in image tokens."""

    flow_sigmoid_scale: Positive = 1.0
    """Spread of the default density, σ = sigmoid(scale·N(0,1))."""

    flow_use_uniform_schedule: bool = False
    """Draw σ evenly instead."""

    flow_use_beta_schedule: bool = False
    """Draw σ from a beta distribution instead."""

    flow_beta_schedule_alpha: Positive = 2.0
    """First parameter of the beta distribution."""

    flow_beta_schedule_beta: Positive = 2.0
    """Second parameter of the beta distribution."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Squared error, or one that grows only linearly for large errors."""

    huber_c: Positive = 0.1
    """The error at which `huber` and `smooth_l1` turn linear, before `huber_schedule`."""

    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How `huber_c` depends on the noise level."""
