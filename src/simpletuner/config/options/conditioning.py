"""Options for reference images and loss masks."""

from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice, UnitInterval

ReferenceView = Literal["full", "own"]
"""Which tokens the reference tokens attend to."""


class ConditioningOptions(Slice):
    """References and masks."""

    reference_dropout_probability: UnitInterval = 0.0
    """Share of the samples to train without their reference images."""

    reference_attention: ReferenceView = "full"
    """Which tokens the reference tokens attend to: all tokens (`full`), or only their sample's reference tokens
    (`own`)."""

    masked_loss_probability: UnitInterval = 1.0
    """Share of the samples with a mask whose loss the mask weights. The others are trained without their mask."""

    masked_loss_floor: UnitInterval = 0.0
    """Lowest weight of a mask: the weight of the loss where the mask is black."""

    masked_loss_invert: bool = False
    """Invert the masks: black is trained, white is not."""

    masked_loss_prior: NotNegative = 0.0
    """Weight of the distance to the base model's prediction where the mask is black. LoRA only."""
