"""The number of steps of a run, and the steps at which saving and validation are due. Imports no torch, so that
`simpletuner plan` can use it.
"""

import math
from dataclasses import dataclass

from simpletuner.base.errors import ConfigError
from simpletuner.config.rules import gap_problem
from simpletuner.config.run import RunConfig
from simpletuner.data.order import Order


@dataclass(frozen=True)
class RunSchedule:
    """The number of steps of a run, and what is due after each of them."""

    config: RunConfig
    steps: int
    batches_per_step: int
    """Micro-batches of a global batch, over all processes."""
    order: Order

    @classmethod
    def of(cls, config: RunConfig, order: Order, batches_per_step: int) -> "RunSchedule":
        """The schedule for `max_train_steps`, or for as many steps as `num_train_epochs` takes, rounded up.

        Raises:
            ConfigError: no image dataset is active in some of the steps.
        """
        steps = config.max_train_steps
        if steps is None and (end := order.end_of(config.num_train_epochs)) is not None:
            steps = max(1, math.ceil(end / batches_per_step))
        gaps = order.gaps(None if steps is None else steps * batches_per_step)
        ConfigError.raise_if(gap_problem("step", gap, steps) for gap in gaps)
        assert steps is not None  # epochs without an end count as a gap
        return cls(config, steps, batches_per_step, order)

    @property
    def epochs(self) -> float:
        """Epochs in the whole run. If the run ends inside an epoch, that one counts as a fraction; an epoch that a
        window of a dataset cuts short counts as one.
        """
        end = self.steps * self.batches_per_step
        epoch, position = self.order.position(end)
        return float(epoch) if position == 0 else epoch + position / len(self.order.epoch(epoch))

    @property
    def notices(self) -> tuple[str, ...]:
        """A notice for each dataset whose window lies outside the run."""
        begun = [span for span in self.order.spans if span.start < self.steps * self.batches_per_step]
        active = {index for span in begun for index in span.active}
        first = begun[0].start // self.batches_per_step + 1 if begun else 1
        return tuple(
            f"{manifest.image_set.id}: its window contains none of the steps {first} to {self.steps}, so this dataset "
            "is not trained."
            for index, manifest in enumerate(self.order.manifests)
            if begun and index not in active
        )

    def is_due(self, step: int, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether an action with these intervals is due after `step`. An epoch that ends within a step counts."""
        if every_steps and step % every_steps == 0:
            return True
        if not every_epochs:
            return False
        before, after = (self.order.position(each * self.batches_per_step)[0] for each in (step - 1, step))
        return after // every_epochs > before // every_epochs

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        options = self.config
        return step == self.steps or self.is_due(
            step, options.checkpoint_step_interval, options.checkpoint_epoch_interval
        )

    def validates(self, step: int) -> bool:
        """Whether validation images are due after `step`."""
        options = self.config
        return not options.validation_disable and (
            step == self.steps or self.is_due(step, options.validation_step_interval, options.validation_epoch_interval)
        )

    def measures_held_out(self, step: int) -> bool:
        """Whether the held-out loss is due after `step`: with every checkpoint, and every `eval_steps_interval` steps,
        or with the validation images if that is not set.
        """
        interval = self.config.eval_steps_interval
        images = self.is_due(step, self.config.validation_step_interval, self.config.validation_epoch_interval)
        return self.saves(step) or (images if interval is None else step % interval == 0)
