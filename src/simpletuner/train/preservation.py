"""What holds a run at its base model: the base's own predictions, made by the same weights with the adapter off."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch
from simpletuner.flow.choice import Choice
from simpletuner.flow.condition import Condition
from simpletuner.flow.loss import Prior
from simpletuner.train.trained import Trainable

DenoiseRouted = Callable[[Tensor, Tensor, Condition, Sequence[Choice]], Tensor]
"""(noised latents, sigma, condition, what TREAD's routes keep) → velocity."""


@dataclass(frozen=True)
class Preservation:
    """The base model's predictions, and how much they count, as the options describe it."""

    denoise: DenoiseRouted
    disabled: Callable[[], AbstractContextManager[None] | None]
    """A block in which `denoise` is the base model: `Trainable.disabled`."""
    has_second_loss: bool = False
    """Whether `preservation` adds a loss of its own."""
    prior: float = 0.0
    """`masked_loss_prior`."""
    idle: Callable[[], None] | None = None
    """Where given, the model is sharded: all ranks must call it equally often. This takes part in one call without
    gradient that other ranks make.
    """

    @classmethod
    def of(
        cls, config: RunConfig, denoise: DenoiseRouted, trained: Trainable, idle: Callable[[], None] | None = None
    ) -> "Preservation | None":
        """None where training changes the base itself."""
        if trained.disabled() is None:
            return None
        return cls(denoise, trained.disabled, config.preserves, config.masked_loss_prior, idle)

    def predictions(self, batch: Batch, x: Float[Tensor, "b c h w"], condition: Condition) -> Float[Tensor, "b c h w"]:
        """The base model's predictions at `x`, without gradient, fp32. TREAD's routes keep the tokens that they keep in
        the pass with gradients, so that the two differ by the adapter alone.

        The adapter draws no dropout here: torch's generator stays as it is.
        """
        block = self.disabled()
        assert block is not None  # `of` and config.rules: only an adapter is trained with these losses
        with block, torch.no_grad():
            return self.denoise(x, batch.sigma, condition, batch.choices).float()

    def prior_of(self, batch: Batch, x: Float[Tensor, "b c h w"]) -> Prior | None:
        """The prior outside of the batch's masks; None where there is none. A rank without one takes part in another's
        prediction.
        """
        if batch.outside is None:
            self._take_part(elsewhere=bool(self.prior) or batch.distills_elsewhere)
            return None
        return Prior(self.predictions(batch, x, batch.condition), self.prior * batch.outside)

    def second_pass(self, batch: Batch) -> tuple[Condition, Float[Tensor, " b"]] | None:
        """The condition of the second loss, and each sample's weight in it; None where the batch makes no such pass.

        Ranks of a sharded model all make it: one whose samples take no part weighs its own with 0.
        """
        own = batch.condition
        if batch.preserved is not None:
            assert batch.preserved_weights is not None
            return Condition(batch.preserved, own.guidance, own.references), batch.preserved_weights
        if self.has_second_loss and self.idle is not None:
            return own, torch.zeros_like(batch.weights)
        return None

    def passes(self, batch: Batch) -> tuple[int, int]:
        """Passes with gradients over `batch`, and the base model's, on this rank."""
        has_second = self.second_pass(batch) is not None
        return 1 + has_second, has_second + (batch.is_regularization or batch.outside is not None)

    def _take_part(self, *, elsewhere: bool) -> None:
        """Take part in another rank's prediction, where there may be one and the model needs that."""
        if self.idle is not None and elsewhere:
            self.idle()
