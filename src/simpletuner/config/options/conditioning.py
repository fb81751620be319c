"""Reference images and masks of the loss."""

from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice, UnitInterval

ReferenceView = Literal["full", "own"]
"""What reference tokens attend to."""


class ConditioningOptions(Slice):
    """References and masks."""

    reference_dropout_probability: UnitInterval = 0.0
    """Share of the samples that are trained without their references."""

    reference_attention: ReferenceView = "full"
    """What reference tokens attend to: everything (`full`), or the references of their sample alone (`own`)."""

    masked_loss_probability: UnitInterval = 1.0
    """Share of the samples with a mask whose loss is weighted by it."""

    masked_loss_floor: UnitInterval = 0.0
    """The lowest weight: where the mask is black, the loss still counts this much."""

    masked_loss_invert: bool = False
    """Black counts, and white does not."""

    masked_loss_prior: NotNegative = 0.0
    """Weight, where the mask is black, of the distance to the base model's own prediction. LoRA only."""
