"""Muon for hidden matrices and AdamW for all other parameters, as one optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on some parameter groups and `torch.optim.AdamW` on the others, as one optimizer.

    Muon orthogonalizes the updates of hidden matrices (https://kellerjordan.github.io/posts/muon). Its authors use
    AdamW for embeddings, last layers and vectors. This optimizer exposes the state and groups of both.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        other_groups: Sequence[dict[str, Any]],
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
    ) -> None:
        """`matrices` are Muon's parameter groups and `other_groups` AdamW's; `muon` and `adamw` are the arguments of
        their constructors.
        """
        super().__init__([*matrices, *other_groups], {})
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(list(matrices), **muon),
            torch.optim.AdamW(list(other_groups), **adamw),
        )
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for optimizer in self._optimizers:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """Step both optimizers on the current gradients."""
        for optimizer in self._optimizers:
            optimizer.step()
