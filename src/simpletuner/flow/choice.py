"""Which image tokens TREAD's routes process. Drawn with a batch; the transformer reads it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The image tokens that blocks `start` to `end` process, of each sample of a batch."""

    start: int
    end: int
    kept: Int64[Tensor, "b kept"]
    """Places of the tokens in the picture, rising. The denoiser adds those of references, which are always kept."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Choice":
        """The same choice with `change` applied to its tensor."""
        return replace(self, kept=change(self.kept))

    def to(self, device: torch.device) -> "Choice":
        return self.mapped(lambda kept: kept.to(device, non_blocking=True))
