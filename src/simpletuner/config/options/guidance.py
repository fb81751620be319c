"""The guidance value that dev's embedder is fed in training."""

from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice


class GuidanceOptions(Slice):
    """Guidance in training."""

    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """`constant` feeds one value; `random-range` draws one for each sample, evenly."""

    flux_guidance_value: NotNegative = 1.0
    """The value of `constant`."""

    flux_guidance_min: NotNegative = 1.0
    """The lower end of `random-range`."""

    flux_guidance_max: NotNegative = 4.0
    """The upper end of `random-range`."""
