"""All options of a run: flat by inheritance, sliced by type."""

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
"""In the order in which help and docs show them."""


OPTION_NAMES: tuple[str, ...] = tuple(name for group in SLICES for name in group.model_fields)
"""Every option, in the same order."""


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
    """Every option of a run. Made by `simpletuner.config.load.load`, which checks across options as well."""

    @property
    def effective_batch(self) -> int:
        """Images of one optimizer step on all processes, where no dataset has a batch size of its own."""
        return super().effective_batch * self.ranks

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps on fp32 copies of weights that compute in less. Without them it rounds
        stochastically.
        """
        rounds = self.optimizer_release_gradients or known_optimizer(self.optimizer).rounds_by_chance
        return self.model_type == "full" and self.base_dtype != "fp32" and not rounds

    @property
    def is_average_on_cpu(self) -> bool:
        """Whether the moving average lies in host memory, off an accelerator."""
        return self.ema_device == "cpu" or (self.ema_device == "auto" and self.model_type == "full")
