"""How much memory a pass through a module takes, found by running its own code on tensors that hold no numbers.

Tensors are on torch's meta device: shapes and lifetimes are those of the real pass, nothing is allocated and nothing
computed. So what autograd saves, what recomputing saves on that, and what a gradient needs on its way are counted and
not guessed. What a kernel takes inside itself is not seen.
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
    """Counts the bytes of all tensors that are made while it is active, until they are gone. Storages count once."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """What is `known` from before counts nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._counted: set[int] = set()
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, counts=True)
        return result

    def _note(self, tensor: Tensor, *, counts: bool) -> None:
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
class Cost:
    """Bytes that a stretch of a model takes, its weights and what is shared between stretches not counted."""

    kept: int
    """From its forward to its backward pass, its outputs not counted. An input counts if it is needed later."""
    forward: int
    """At most during its forward pass, inputs and outputs counted."""
    backward: int
    """At most during its backward pass, beyond `kept`; the gradients of its outputs and inputs counted."""
    gradients: int
    """Of its weights, which it leaves behind."""


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output, and the logarithm of each row's sum. On the meta device
    torch takes the plain way, with a table of all pairs, which no device we train on does.
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
    """Make `module` attend as on a device with fused attention, also where it is recomputed: call it before that."""
    forward = module.forward

    def run(*inputs: Any) -> Any:
        with _Fused():
            return forward(*inputs)

    module.forward = run


TracedForward = Callable[..., Sequence[Tensor]]
"""Streams in, streams out."""


@contextlib.contextmanager
def pretending(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors and modules are made without memory, in `dtype` where nothing else is said."""
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def trace(
    run: TracedForward,
    streams: Callable[[], list[Tensor]],
    weights: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    *,
    is_released: bool = False,
) -> Cost:
    """What `run(*streams())` costs with its backward pass, all of it made inside `pretending`.

    Args:
        is_released: each weight's gradient is freed as soon as it is whole.
    """
    ledger = Ledger([*weights, *shared])
    for weight in weights if is_released else ():
        weight.register_post_accumulate_grad_hook(_free_gradient)
    with ledger:
        outputs = list(run(*streams()))
        forward = ledger.peak
        edges = [get_gradient_edge(each) for each in outputs]
        kept = ledger.live - sum(each.untyped_storage().nbytes() for each in outputs)
        gradients = [torch.empty_like(each) for each in outputs]
        outputs.clear()
        ledger.peak = ledger.live
        torch.autograd.backward(edges, gradients)
        backward = ledger.peak - kept
    left = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    for tensor in (*weights, *shared):
        tensor.grad = None
    return Cost(kept, forward, backward, left)


def _free_gradient(weight: Tensor) -> None:
    weight.grad = None


def trace_forward(run: TracedForward, streams: Callable[[], list[Tensor]], weights: Sequence[Tensor]) -> int:
    """Bytes that `run(*streams())` takes at most without gradients, inputs and outputs counted."""
    ledger = Ledger(weights)
    with torch.no_grad(), ledger:
        run(*streams())
    return ledger.peak
