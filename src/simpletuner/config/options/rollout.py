"""Options for scheduled sampling: training on inputs that the model generated (rollouts)."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from simpletuner.config.options.kinds import NotNegative, Slice, UnitInterval, Whole


class RolloutOptions(Slice):
    """Scheduled sampling."""

    scheduled_sampling_max_step_offset: Annotated[int, Ge(0), Le(1000)] = 0
    """Maximum length of a rollout, in steps of 1/1000 of σ. Each sample draws a length from 0 to this. 0 turns rollouts
    off; a sample that draws 0 is trained without one."""

    scheduled_sampling_probability: UnitInterval = 1.0
    """Share of the samples that draw a rollout length, if there is no ramp."""

    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    """Distribution of rollout lengths: `uniform`, or more short (`biased_early`) or more long (`biased_late`) ones."""

    scheduled_sampling_prob_start: UnitInterval = 0.0
    """Share of samples with a rollout before the ramp."""

    scheduled_sampling_prob_end: UnitInterval = 0.5
    """Share of samples with a rollout after the ramp."""

    scheduled_sampling_ramp_steps: Whole = 0
    """Optimizer steps over which the share changes from `scheduled_sampling_prob_start` to
    `scheduled_sampling_prob_end`. 0 means no ramp: `scheduled_sampling_probability` applies throughout."""

    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the ramp: `linear`, or `cosine` with a smooth start and end."""

    scheduled_sampling_start_step: Whole = 0
    """Step after which the ramp begins."""

    scheduled_sampling_sampler: Literal["euler", "heun", "unipc", "dpm"] = "euler"
    """ODE solver of the rollouts: Euler, Heun, UniPC of order 2, or DPM-Solver++ (2M)."""

    scheduled_sampling_reflexflow: bool = True
    """Add ReflexFlow's two loss terms to samples with a rollout."""

    scheduled_sampling_reflexflow_alpha: NotNegative = 1.0
    """Extra weight of the error of those elements whose prediction the rollout changed. 0 saves a model call."""

    scheduled_sampling_reflexflow_beta1: NotNegative = 10.0
    """Weight of the ReflexFlow term that turns the prediction toward the direction from the image's latents to the
    rolled-out input."""

    scheduled_sampling_reflexflow_beta2: NotNegative = 1.0
    """Weight of the prediction error in ReflexFlow."""

    @property
    def has_reflexflow(self) -> bool:
        """Whether any sample gets ReflexFlow's terms."""
        return self.scheduled_sampling_max_step_offset > 0 and self.scheduled_sampling_reflexflow
