"""Measure the memory of a pass through a module by running it on the meta device.

Shapes and lifetimes of tensors are those of the real pass, but nothing is allocated or computed. So tensors saved by
autograd, savings by checkpointing, and temporary memory in backward are counted, not estimated. Memory that a kernel
allocates internally is not counted.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Count the bytes of all tensors created while this mode is active, until they are freed. Storages count once."""

    def __init__(self, uncounted: Iterable[Tensor] = ()) -> None:
        """Tensors in `uncounted`, and views of them, do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._counted: set[int] = set()
        for tensor in uncounted:
            self._register(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._register(leaf, counts=True)
        return result

    def _register(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted:
            return
        size = storage.nbytes() if counts else 0
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


@dataclass(frozen=True)
class MemoryCost:
    """Bytes that a section of a model takes, without its weights and without tensors shared between sections."""

    saved: int
    """Saved from forward to backward, without the outputs. An input counts if backward needs it."""
    forward: int
    """Peak during the forward pass, with inputs and outputs."""
    backward: int
    """Peak during the backward pass in addition to `saved`, with the gradients of outputs and inputs."""
    gradients: int
    """Gradients of its weights that remain after the backward pass."""


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves: its inputs, its output, and the log-sum-exp of each row.

    On the meta device torch takes the unfused path, which stores the whole attention matrix. No device that we train on
    takes that path.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def fuse_attention(module: nn.Module) -> None:
    """Make `module` use the memory of fused attention, in recompute too. Call it before the module is checkpointed."""
    forward = module.forward

    def run(*inputs: Any) -> Any:
        with _Fused():
            return forward(*inputs)

    module.forward = run


TracedForward = Callable[..., Sequence[Tensor]]
"""Takes and returns streams of tokens."""


@contextlib.contextmanager
def on_meta_device(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors and modules on the meta device, by default in `dtype`, inside this context."""
    default_dtype = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)


def trace(
    run: TracedForward,
    streams: Callable[[], list[Tensor]],
    weights: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    *,
    frees_gradients: bool = False,
) -> MemoryCost:
    """Memory of `run(*streams())` and its backward pass. All tensors must have been created inside `on_meta_device`.

    Args:
        frees_gradients: whether each weight's gradient is freed as soon as it is complete.
    """
    ledger = Ledger([*weights, *shared])
    for weight in weights if frees_gradients else ():
        weight.register_post_accumulate_grad_hook(_free_gradient)
    with ledger:
        outputs = list(run(*streams()))
        forward = ledger.peak
        edges = [get_gradient_edge(each) for each in outputs]
        saved = ledger.live - sum(each.untyped_storage().nbytes() for each in outputs)
        gradients = [torch.empty_like(each) for each in outputs]
        outputs.clear()
        ledger.peak = ledger.live
        torch.autograd.backward(edges, gradients)
        backward = ledger.peak - saved
    remaining = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    for tensor in (*weights, *shared):
        tensor.grad = None
    return MemoryCost(saved, forward, backward, remaining)


def _free_gradient(weight: Tensor) -> None:
    weight.grad = None


def trace_forward(run: TracedForward, streams: Callable[[], list[Tensor]], weights: Sequence[Tensor]) -> int:
    """Peak bytes of `run(*streams())` without gradients, with inputs and outputs."""
    ledger = Ledger(weights)
    with torch.no_grad(), ledger:
        run(*streams())
    return ledger.peak
