"""Options for the guidance value that dev's guidance embedder gets in training."""

from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice


class GuidanceOptions(Slice):
    """Guidance in training."""

    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """Guidance value in training: `constant` uses one value; `random-range` draws one uniformly for each sample."""

    flux_guidance_value: NotNegative = 1.0
    """Guidance value in the mode `constant`."""

    flux_guidance_min: NotNegative = 1.0
    """Lowest guidance value in the mode `random-range`."""

    flux_guidance_max: NotNegative = 4.0
    """Highest guidance value in the mode `random-range`."""
