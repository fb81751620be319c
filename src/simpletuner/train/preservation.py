"""Preserve the base model's behavior in training: compute its predictions with the adapter disabled."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch
from simpletuner.flow.choice import TokenChoice
from simpletuner.flow.condition import Condition
from simpletuner.flow.loss import Prior
from simpletuner.train.trained import Trainable

DenoiseRouted = Callable[[Tensor, Tensor, Condition, Sequence[TokenChoice]], Tensor]
"""(noised latents, sigma, condition, tokens kept by TREAD's routes) → velocity."""


@dataclass(frozen=True)
class Preservation:
    """The base model's predictions as training targets, with the weights that the options give them."""

    denoise: DenoiseRouted
    disabled: Callable[[], AbstractContextManager[None] | None]
    """Returns a context in which `denoise` is the base model: `Trainable.disabled`."""
    has_second_loss: bool = False
    """Whether the option `preservation` adds a separate loss."""
    prior: float = 0.0
    """The option `masked_loss_prior`."""
    idle: Callable[[], None] | None = None
    """If not None, the model is sharded, so all ranks must call it equally often. `idle` takes part in one call without
    gradient that other ranks make.
    """

    @classmethod
    def of(
        cls, config: RunConfig, denoise: DenoiseRouted, trained: Trainable, idle: Callable[[], None] | None = None
    ) -> "Preservation | None":
        """The preservation that `config` describes; None where training changes the base weights."""
        if trained.disabled() is None:
            return None
        return cls(denoise, trained.disabled, config.preserves, config.masked_loss_prior, idle)

    def predictions(self, batch: Batch, x: Float[Tensor, "b c h w"], condition: Condition) -> Float[Tensor, "b c h w"]:
        """The base model's predictions at `x`, without gradient, in fp32. TREAD's routes keep the same tokens as in the
        pass with gradients, so that predictions differ only by the adapter.

        Torch's generator does not advance: a disabled adapter draws no dropout.
        """
        base_model = self.disabled()
        assert base_model is not None  # ensured by `of` and config.rules: only adapters train with these losses
        with base_model, torch.no_grad():
            return self.denoise(x, batch.sigma, condition, batch.choices).float()

    def prior_of(self, batch: Batch, x: Float[Tensor, "b c h w"]) -> Prior | None:
        """The prior outside the batch's masks; None if there is none. A rank without one takes part in the prediction
        of other ranks.
        """
        if batch.outside_masks is None:
            self._join_other_ranks(may_predict=bool(self.prior) or batch.other_ranks_distill)
            return None
        return Prior(self.predictions(batch, x, batch.condition), self.prior * batch.outside_masks)

    def second_pass(self, batch: Batch) -> tuple[Condition, Float[Tensor, " b"]] | None:
        """The condition of the preservation loss, and each sample's weight in it; None if the batch needs no such pass.

        With a sharded model all ranks make the pass; a rank whose samples do not need it gives them weight 0.
        """
        condition = batch.condition
        if batch.preserved is not None:
            assert batch.preserved_weights is not None
            return Condition(batch.preserved, condition.guidance, condition.references), batch.preserved_weights
        if self.has_second_loss and self.idle is not None:
            return condition, torch.zeros_like(batch.weights)
        return None

    def passes(self, batch: Batch) -> tuple[int, int]:
        """The number of passes with gradients over `batch` on this rank, and of the base model's passes."""
        has_second = self.second_pass(batch) is not None
        return 1 + has_second, has_second + (batch.is_regularization or batch.outside_masks is not None)

    def _join_other_ranks(self, *, may_predict: bool) -> None:
        """If the model is sharded and other ranks may make a prediction, take part in it."""
        if self.idle is not None and may_predict:
            self.idle()
