"""Gradient checkpointing: a block forgets its activations and computes them again in the backward pass."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def install(
    blocks: Sequence[nn.Module],
    keep_every: int | None = None,
    *,
    inputs: "HostInputs | None" = None,
    draws: bool = True,
) -> None:
    """Make each block recompute itself whenever gradients are wanted; results and gradients stay the same bits.

    On CUDA that takes kernels that always add in the same order; the backward passes of fused attention do not.

    `keep_every` = n leaves every n-th block as it is: more memory, less recomputing. What a block is computed from
    again goes where `inputs` says; by default it stays where it is.

    Args:
        draws: whether blocks draw random numbers, as dropout does. If so, the generators' states are saved before a
            block and set again for its recompute. If not, a block that draws all the same gets wrong gradients.
    """
    for index, block in enumerate(blocks):
        if keep_every is None or (index + 1) % keep_every:
            block.forward = _recomputed(block.forward, inputs, draws)


def _recomputed(forward: Callable[..., Any], kept: "HostInputs | None", draws: bool) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        with contextlib.nullcontext() if kept is None else kept.of_a_block():
            # Non-reentrant: gradients reach adapters inside a block none of whose inputs requires one.
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)

    return run


@dataclass
class _Input:
    """A block's input on its way."""

    host: Tensor
    written: torch.cuda.Event | None
    fetched: tuple[Tensor, torch.cuda.Event] | None = None


@dataclass
class _Block:
    """The inputs of one pass through one block."""

    inputs: list[_Input] = field(default_factory=list)
    before: "weakref.ref[_Block] | None" = None
    """The block that ran before it, whose inputs will be wanted after these."""


class HostInputs:
    """Keeps inputs of recomputed blocks in the machine's memory from the forward to the backward pass.

    Those that want a gradient: the stream of tokens. Positions and modulation are shared by all blocks, and stay.

    Args:
        ahead: copy in a stream of its own while the accelerator computes, and back ahead of time. On a CPU, where
            the copies are made all the same, nothing runs beside.
    """

    def __init__(self, device: torch.device, *, ahead: bool = False) -> None:
        self._device = device
        self._copier = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._last: weakref.ref[_Block] | None = None
        self.copied_bytes = 0
        """Copied away so far."""

    @contextlib.contextmanager
    def of_a_block(self) -> Iterator[None]:
        """Around the checkpointed call of one block."""
        block = _Block(before=self._last)
        self._last = weakref.ref(block)

        def pack(tensor: Tensor) -> Tensor | tuple[_Block, _Input]:
            return (block, self._put(block, tensor)) if tensor.requires_grad else tensor

        def unpack(kept: Tensor | tuple[_Block, _Input]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._get(*kept)

        # What the block itself saves does not come here: the checkpoint's own hooks lie inside of these.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    @torch.no_grad()
    def _put(self, block: _Block, tensor: Tensor) -> _Input:
        is_cuda = self._device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
        written = None
        if self._copier is None:
            host.copy_(tensor, non_blocking=True)
        else:
            self._copier.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copier):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copier)
            written = self._copier.record_event()
        self.copied_bytes += host.nbytes
        block.inputs.append(_Input(host, written))
        return block.inputs[-1]

    @torch.no_grad()
    def _get(self, block: _Block, kept: _Input) -> Tensor:
        if self._copier is None:
            # A copy on a CPU too, where `to` would hand out what is kept, to be overwritten by whoever gets it.
            return torch.empty_like(kept.host, device=self._device).copy_(kept.host, non_blocking=True)
        self._fetch(kept)
        assert kept.fetched is not None
        tensor, there = kept.fetched
        kept.fetched = None
        torch.cuda.current_stream(self._device).wait_event(there)
        before = None if block.before is None else block.before()
        for wanted in before.inputs if before is not None else ():
            self._fetch(wanted)
        return tensor

    def _fetch(self, kept: _Input) -> None:
        """Begin to copy an input back."""
        if kept.fetched is not None or self._copier is None or kept.written is None:
            return
        tensor = torch.empty_like(kept.host, device=self._device)
        # The memory may be in use by what was launched before.
        self._copier.wait_stream(torch.cuda.current_stream(self._device))
        self._copier.wait_event(kept.written)
        with torch.cuda.stream(self._copier):
            tensor.copy_(kept.host, non_blocking=True)
        tensor.record_stream(self._copier)
        kept.fetched = tensor, self._copier.record_event()
