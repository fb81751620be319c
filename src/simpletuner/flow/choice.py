"""The image tokens that a TREAD route processes. `data` draws them for each batch; the transformer reads them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class TokenChoice:
    """The image tokens of each sample in a batch that blocks `start` to `end` (inclusive) process."""

    start: int
    end: int
    kept_tokens: Int64[Tensor, "b kept"]
    """Indices of the kept image tokens, ascending. Reference tokens are always kept: the denoiser appends theirs."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TokenChoice":
        """The same tokens with `change` applied to the tensor `kept_tokens`."""
        return replace(self, kept_tokens=change(self.kept_tokens))

    def to(self, device: torch.device) -> "TokenChoice":
        return self.mapped(lambda tokens: tokens.to(device, non_blocking=True))
