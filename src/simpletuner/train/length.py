"""How long a run is and what is due when. Without torch, so that `simpletuner plan` counts as training does."""

import math
from dataclasses import dataclass

from simpletuner.base.errors import ConfigError
from simpletuner.config.rules import uncovered
from simpletuner.config.run import RunConfig
from simpletuner.data.order import Order


@dataclass(frozen=True)
class Plan:
    """How long the run is and what is due when."""

    config: RunConfig
    steps: int
    batches_per_step: int
    """Micro-batches of a global batch, over all processes."""
    order: Order

    @classmethod
    def of(cls, config: RunConfig, order: Order, batches_per_step: int) -> "Plan":
        """`max_train_steps`, or else as many steps as `num_train_epochs` take, rounded up.

        Raises:
            ConfigError: in some of the steps no image set is active.
        """
        steps = config.max_train_steps
        if steps is None and (end := order.end_of(config.num_train_epochs)) is not None:
            steps = max(1, math.ceil(end / batches_per_step))
        gaps = order.gaps(None if steps is None else steps * batches_per_step)
        ConfigError.raise_if(uncovered("step", gap, steps) for gap in gaps)
        assert steps is not None  # epochs that have no end are a gap
        return cls(config, steps, batches_per_step, order)

    @property
    def epochs(self) -> float:
        """Epochs in the whole run; those that are cut short count as one."""
        end = self.steps * self.batches_per_step
        epoch, place = self.order.place(end)
        return float(epoch) if place == 0 else epoch + place / len(self.order.epoch(epoch))

    @property
    def notices(self) -> tuple[str, ...]:
        """Sets whose window lies outside of the run."""
        begun = [span for span in self.order.spans if span.start < self.steps * self.batches_per_step]
        active = {index for span in begun for index in span.active}
        first = begun[0].start // self.batches_per_step + 1 if begun else 1
        return tuple(
            f"{manifest.image_set.id}: its window leaves out steps {first} to {self.steps}: the set is not trained."
            for index, manifest in enumerate(self.order.manifests)
            if begun and index not in active
        )

    def is_due(self, step: int, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether something with these intervals happens after `step`. An epoch that ends inside a step counts."""
        if every_steps and step % every_steps == 0:
            return True
        if not every_epochs:
            return False
        before, after = (self.order.place(each * self.batches_per_step)[0] for each in (step - 1, step))
        return after // every_epochs > before // every_epochs

    def saves(self, step: int) -> bool:
        options = self.config
        return step == self.steps or self.is_due(
            step, options.checkpoint_step_interval, options.checkpoint_epoch_interval
        )

    def draws(self, step: int) -> bool:
        options = self.config
        return not options.validation_disable and (
            step == self.steps or self.is_due(step, options.validation_step_interval, options.validation_epoch_interval)
        )

    def measures(self, step: int) -> bool:
        """Held-out loss: on its own interval, or whenever pictures are due; always where a checkpoint is."""
        own = self.config.eval_steps_interval
        pictures = self.is_due(step, self.config.validation_step_interval, self.config.validation_epoch_interval)
        return self.saves(step) or (pictures if own is None else step % own == 0)
