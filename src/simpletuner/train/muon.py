"""Muon for the matrices it is made for, AdamW for the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of two: `torch.optim.Muon` on some parameter groups, `torch.optim.AdamW` on the others.

    Muon whitens what a hidden matrix learns (https://kellerjordan.github.io/posts/muon); embedders, last layers and
    vectors are no hidden matrices, and its authors give those to AdamW. State and groups of both are this one's.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
    ) -> None:
        """Groups of each, and arguments of each."""
        super().__init__([*matrices, *others], {})
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(list(matrices), **muon),
            torch.optim.AdamW(list(others), **adamw),
        )
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  torch's signature
        """One step of both on the gradients that are there."""
        for part in self._parts:
            part.step()
