"""Gradient checkpointing: a block forgets its activations and computes them again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def install(blocks: Sequence[nn.Module], keep_every: int | None = None) -> None:
    """Make each block recompute itself whenever gradients are wanted; results and gradients stay the same bits.

    `keep_every` = n leaves every n-th block as it is: more memory, less recomputing.
    """
    for index, block in enumerate(blocks):
        if keep_every is None or (index + 1) % keep_every:
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        # Non-reentrant: gradients reach adapters inside a block none of whose inputs requires one.
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run
