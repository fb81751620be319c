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
    """Share of the masked samples whose loss is weighted by their mask. The others are trained without it."""

    masked_loss_floor: UnitInterval = 0.0
    """Weight of the loss where the mask is black. Where it is white, the weight is 1."""

    masked_loss_invert: bool = False
    """Invert the masks, so that the loss counts where they are black instead of white."""

    masked_loss_prior: NotNegative = 0.0
    """Weight of an additional loss where the mask is black: the distance to the base model's prediction. LoRA only."""
