"""Activation checkpointing: a block does not save its activations, but recomputes them in backward."""

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
    """Checkpoint each block whenever gradients are enabled. Results and gradients are bit-identical.

    On CUDA this requires kernels that always add in the same order; the backward kernels of fused attention do not.

    Args:
        keep_every: n leaves every n-th block uncheckpointed, which uses more memory and recomputes less.
        inputs: decides where checkpointed inputs are kept; by default on the device.
        draws: whether blocks draw random numbers, as dropout does. If so, the generators' states are saved before a
            block and restored for its recompute. If not, a block that draws nevertheless gets wrong gradients.
    """
    for index, block in enumerate(blocks):
        if keep_every is None or (index + 1) % keep_every:
            block.forward = _recomputed(block.forward, inputs, draws)


def _recomputed(forward: Callable[..., Any], host_inputs: "HostInputs | None", draws: bool) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        with contextlib.nullcontext() if host_inputs is None else host_inputs.enclose_block():
            # Non-reentrant: adapters inside a block get gradients even if none of its inputs requires one.
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)

    return run


@dataclass
class _SavedInput:
    """A block's input in host memory, with the events of its copies."""

    host: Tensor
    written: torch.cuda.Event | None
    fetched: tuple[Tensor, torch.cuda.Event] | None = None


@dataclass
class _BlockInputs:
    """Saved inputs of one pass through one block."""

    inputs: list[_SavedInput] = field(default_factory=list)
    previous: "weakref.ref[_BlockInputs] | None" = None
    """The block that ran before this one. Backward needs its inputs next."""


class HostInputs:
    """Keep inputs of checkpointed blocks in host memory from the forward to the backward pass.

    Only inputs that require gradients are moved: the tokens. Positions and modulation, which all blocks share, stay on
    the device.

    Args:
        ahead: copy on a separate CUDA stream while the accelerator computes, and prefetch in backward. On a CPU the
            copies are made too, but nothing overlaps.
    """

    def __init__(self, device: torch.device, *, ahead: bool = False) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._last: weakref.ref[_BlockInputs] | None = None
        self.copied_bytes = 0
        """Bytes copied to host memory so far."""

    @contextlib.contextmanager
    def enclose_block(self) -> Iterator[None]:
        """Enclose the checkpointed call of one block and move its inputs."""
        block = _BlockInputs(previous=self._last)
        self._last = weakref.ref(block)

        def pack(tensor: Tensor) -> Tensor | tuple[_BlockInputs, _SavedInput]:
            return (block, self._put(block, tensor)) if tensor.requires_grad else tensor

        def unpack(saved: Tensor | tuple[_BlockInputs, _SavedInput]) -> Tensor:
            return saved if isinstance(saved, Tensor) else self._get(*saved)

        # Tensors that the block itself saves do not get here: the checkpoint's own hooks are nested inside these.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    @torch.no_grad()
    def _put(self, block: _BlockInputs, tensor: Tensor) -> _SavedInput:
        is_cuda = self._device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
        written = None
        if self._copy_stream is None:
            host.copy_(tensor, non_blocking=True)
        else:
            self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copy_stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copy_stream)
            written = self._copy_stream.record_event()
        self.copied_bytes += host.nbytes
        block.inputs.append(_SavedInput(host, written))
        return block.inputs[-1]

    @torch.no_grad()
    def _get(self, block: _BlockInputs, saved: _SavedInput) -> Tensor:
        if self._copy_stream is None:
            # Copied on a CPU too: `to` would return the saved tensor itself, which the receiver may overwrite.
            return torch.empty_like(saved.host, device=self._device).copy_(saved.host, non_blocking=True)
        self._fetch(saved)
        assert saved.fetched is not None
        tensor, copied = saved.fetched
        saved.fetched = None
        torch.cuda.current_stream(self._device).wait_event(copied)
        previous_block = None if block.previous is None else block.previous()
        for previous_input in previous_block.inputs if previous_block is not None else ():
            self._fetch(previous_input)
        return tensor

    def _fetch(self, saved: _SavedInput) -> None:
        """Begin to copy an input back to the device."""
        if saved.fetched is not None or self._copy_stream is None or saved.written is None:
            return
        tensor = torch.empty_like(saved.host, device=self._device)
        # Kernels that were launched before may still use this memory.
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        self._copy_stream.wait_event(saved.written)
        with torch.cuda.stream(self._copy_stream):
            tensor.copy_(saved.host, non_blocking=True)
        tensor.record_stream(self._copy_stream)
        saved.fetched = tensor, self._copy_stream.record_event()
