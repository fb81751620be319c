"""All options of a run: one flat class that inherits from the option slices."""

from simpletuner.config.optimizers import known_optimizer
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.compile import CompileOptions
from simpletuner.config.options.conditioning import ConditioningOptions
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.ema import EmaOptions
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.kinds import Slice
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.preservation import PreservationOptions
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.config.options.tread import TreadOptions
from simpletuner.config.options.validation import ValidationOptions

SLICES: tuple[type[Slice], ...] = (
    ModelOptions,
    DataOptions,
    LoraOptions,
    OptimOptions,
    EmaOptions,
    ScheduleOptions,
    RolloutOptions,
    GuidanceOptions,
    ConditioningOptions,
    PreservationOptions,
    TreadOptions,
    PrecisionOptions,
    OffloadOptions,
    CompileOptions,
    ValidationOptions,
    CheckpointOptions,
    TrackingOptions,
    ProcessOptions,
    RankOptions,
)
"""The option slices, in the order of help and docs."""


OPTION_NAMES: tuple[str, ...] = tuple(name for group in SLICES for name in group.model_fields)
"""Name of every option, in the order of help and docs."""


class RunConfig(
    ModelOptions,
    DataOptions,
    LoraOptions,
    OptimOptions,
    EmaOptions,
    ScheduleOptions,
    RolloutOptions,
    GuidanceOptions,
    ConditioningOptions,
    PreservationOptions,
    TreadOptions,
    PrecisionOptions,
    OffloadOptions,
    CompileOptions,
    ValidationOptions,
    CheckpointOptions,
    TrackingOptions,
    ProcessOptions,
    RankOptions,
):
    """Every option of a run. `simpletuner.config.load.load` creates it and also checks combinations of options."""

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step on all processes, where no dataset sets its own batch size."""
        return super().effective_batch * self.ranks

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps fp32 master copies of bf16 or fp16 weights. Without masters it rounds
        stochastically.
        """
        rounds = self.optimizer_release_gradients or known_optimizer(self.optimizer).rounds_stochastically
        return self.model_type == "full" and self.base_dtype != "fp32" and not rounds

    @property
    def is_average_on_cpu(self) -> bool:
        """Whether the moving average is in host memory."""
        return self.ema_device == "cpu" or (self.ema_device == "auto" and self.model_type == "full")
