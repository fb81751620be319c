"""Scheduled sampling: training on inputs that the model has made itself."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from simpletuner.config.options.kinds import NotNegative, Slice, UnitInterval, Whole


class RolloutOptions(Slice):
    """Scheduled sampling."""

    scheduled_sampling_max_step_offset: Annotated[int, Ge(0), Le(1000)] = 0
    """The longest rollout, in steps of 1/1000 of σ; each sample draws a length from 0 to this. 0 is off, and a
    sample that draws 0 is trained as without rollouts."""

    scheduled_sampling_probability: UnitInterval = 1.0
    """Share of samples that draw a length."""

    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    """How lengths are drawn: evenly, with short ones more often (`biased_early`) or with long ones."""

    scheduled_sampling_prob_start: UnitInterval = 0.0
    """The probability before the ramp."""

    scheduled_sampling_prob_end: UnitInterval = 0.5
    """The probability after the ramp."""

    scheduled_sampling_ramp_steps: Whole = 0
    """Optimizer steps in which the probability goes from `scheduled_sampling_prob_start` to
    `scheduled_sampling_prob_end`. 0 takes `scheduled_sampling_probability` throughout."""

    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = "linear"
    """The way there: straight, or with a soft start and end."""

    scheduled_sampling_start_step: Whole = 0
    """The step after which the ramp begins."""

    scheduled_sampling_sampler: Literal["euler", "heun", "unipc", "dpm"] = "euler"
    """The solver of a rollout: Euler, Heun, UniPC of order 2, DPM-Solver++ (2M)."""

    scheduled_sampling_reflexflow: bool = True
    """Add ReflexFlow's two terms to samples that are rolled out."""

    scheduled_sampling_reflexflow_alpha: NotNegative = 1.0
    """How much more an element's error counts where rolling out changed the prediction; 0 saves a model call."""

    scheduled_sampling_reflexflow_beta1: NotNegative = 10.0
    """Weight of the term that turns the prediction into the direction that leads from the picture to its input."""

    scheduled_sampling_reflexflow_beta2: NotNegative = 1.0
    """Weight of the error itself."""

    @property
    def has_reflexflow(self) -> bool:
        """Whether ReflexFlow's terms are added to anything."""
        return self.scheduled_sampling_max_step_offset > 0 and self.scheduled_sampling_reflexflow
