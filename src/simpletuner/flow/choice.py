"""The image tokens that a TREAD route processes. The data side draws them with a batch; the transformer reads them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The image tokens of each sample in a batch that blocks `start` to `end` (inclusive) process."""

    start: int
    end: int
    kept: Int64[Tensor, "b kept"]
    """Indices of the kept image tokens, ascending. The denoiser appends those of references, which are always kept."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Choice":
        """The same tokens with `change` applied to the tensor `kept`."""
        return replace(self, kept=change(self.kept))

    def to(self, device: torch.device) -> "Choice":
        return self.mapped(lambda kept: kept.to(device, non_blocking=True))
