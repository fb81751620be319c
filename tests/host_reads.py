"""Count where the host reads tensors. On an accelerator each such read waits until the device has caught up."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.train.step import Stepper

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense,  # item, and with it bool, int, float and `in`
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
}
MASKED = {aten.index, aten.index_put, aten.index_put_}
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
UNDISPATCHED_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
"""On a CPU these reach the memory of a tensor without an operator."""
UPLOADS = {torch.tensor, torch.as_tensor}
"""They copy what the host knows to a `device`, and wait for it."""


class _Operators(TorchDispatchMode):
    def __init__(self, device: torch.device, found: list[str]) -> None:
        super().__init__()
        self.device = device
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if operator in COPIES:
            sources = {tensor.device for tensor in tensors}
            sources |= {torch.device(kwargs["device"])} if kwargs.get("device") is not None else set()
            # Of `copy_` and `_foreach_copy_` it is the third argument, of `_to_copy` a named one.
            is_blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            waits = len(sources) > 1 and self.device in sources and is_blocking
        else:
            is_masked = operator in MASKED and any(t is not None and t.dtype == torch.bool for t in args[1])
            waits = (operator in READS or is_masked) and any(tensor.device == self.device for tensor in tensors)
        if waits:
            self.found.append(f"{operator} {_place()}")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, device: torch.device, found: list[str]) -> None:
        super().__init__()
        self.device = device
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_read = func in UNDISPATCHED_READS and args[0].device == self.device
        is_upload = func in UPLOADS and self.device.type != "cpu" and kwargs.get("device") == self.device
        if is_read or is_upload:
            self.found.append(f"{func.__name__} {_place()}")
        return func(*args, **kwargs)


def _place() -> str:
    """The innermost line of the program that led here."""
    frames = [frame for frame in traceback.extract_stack() if "/simpletuner/" in frame.filename]
    return f"in {frames[-1].filename}:{frames[-1].lineno}" if frames else "in the test"


@contextlib.contextmanager
def host_reads(device: torch.device) -> Iterator[list[str]]:
    """Inside, every read of a tensor on `device`, and every copy to or from it that waits, is added to the list.

    On a CPU every tensor counts. The meta device tells the host's tensors from the device's, and refuses to be read.
    """
    found: list[str] = []
    with _Methods(device, found), _Operators(device, found):
        yield found


class MetaStepper(Stepper):
    """A step on the meta device, where nothing has a value: the one read finds ones."""

    def read(self, values: Tensor) -> list[float]:
        return [1.0] * len(values)


class StrictStepper(Stepper):
    """A step under CUDA that raises a RuntimeError wherever the host waits for the device, but for the one read."""

    def read(self, values: Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return super().read(values)
        finally:
            torch.cuda.set_sync_debug_mode("error")


@contextlib.contextmanager
def waiting_raises() -> Iterator[None]:
    """Inside, torch raises a RuntimeError wherever the host waits for a CUDA device. Meant for a `StrictStepper`."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def describe(found: Sequence[str]) -> str:
    """The message of a failed count."""
    return "the host waits for the device:\n" + "\n".join(found)
