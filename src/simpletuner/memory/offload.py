"""Stream frozen weights to the accelerator group by group, from host memory or from disk.

Each group has one read-only packed copy of its frozen tensors; quantized tensors are packed as their plain parts. The
device has a ring of slots. Before a group computes it is copied into its slot, and its tensors are views into the slot.
Trainable parameters are in no group and stay on the device.

Slots are overwritten, so autograd must not save views into them. A saved-tensor hook stores (group, view) instead and
reloads the group in backward; no other view into a slot leaves a forward pass. Outside of a forward pass the modules
hold placeholders without memory, which raise when used. Why not diffusers' hooks:
docs/decisions/0009-block-streaming.md.
"""

import contextlib
import hashlib
import math
import mmap
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.base.errors import MemoryBudgetError
from simpletuner.base.files import write_atomic
from simpletuner.base.parts import remove_abandoned_parts
from simpletuner.base.sizes import format_size
from simpletuner.memory.free import release_memory
from simpletuner.memory.reader import FileReader

_ALIGNMENT_BYTES = 256
"""Alignment in bytes of each packed tensor; enough for every kernel we call."""


def block_groups(blocks: Sequence[nn.Module], per_group: int = 1) -> list[list[nn.Module]]:
    """Group `blocks`, which are in execution order, into groups of `per_group` blocks."""
    return [list(blocks[start : start + per_group]) for start in range(0, len(blocks), per_group)]


def leaf_groups(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """One group for each outermost module that directly owns frozen tensors; these are mostly single layers."""
    return [[leaf] for module in modules for leaf in _owners(module)]


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    if any(True for _ in _frozen(module)):
        yield module
    else:
        for child in module.children():
            yield from _owners(child)


def group_bytes(units: Iterable[nn.Module]) -> int:
    """Packed size in bytes of the frozen tensors of `units`. Modules may be on the meta device."""
    return sum(_padded_bytes(leaf) for ref in _tensor_refs(units) for leaf in _leaves(ref.tensor))


@dataclass(frozen=True)
class _TensorRef:
    """A frozen parameter or buffer of a module, by name."""

    owner: nn.Module
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        tensor = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name]
        assert tensor is not None
        return tensor

    def assign(self, tensor: Tensor) -> None:
        # Not setattr, which registers the tensor again and may be overridden by a library.
        (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name] = tensor  # type: ignore[assignment]


def _tensor_refs(units: Iterable[nn.Module]) -> Iterator[_TensorRef]:
    for unit in units:
        for owner in unit.modules():
            for ref in _frozen(owner):
                if isinstance(ref.tensor, _Placeholder):
                    raise ValueError(f"{ref.name} of a {type(owner).__name__} is streamed already")
                yield ref


def _frozen(owner: nn.Module) -> Iterator[_TensorRef]:
    """The frozen tensors of `owner`, without those of its submodules."""
    for name, parameter in owner._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            yield _TensorRef(owner, name, is_parameter=True)
    for name, buffer in owner._buffers.items():
        if buffer is not None:
            yield _TensorRef(owner, name, is_parameter=False)


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a tensor subclass, such as a quantized weight; a plain tensor yields itself."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        for name in wrapper.__tensor_flatten__()[0]:
            yield from _leaves(getattr(wrapper, name))
    else:
        yield tensor


def _rebuilt(tensor: Tensor, leaves: Iterator[Tensor]) -> Tensor:
    """A tensor of the class of `tensor`, made of other `leaves` in the order of `_leaves`."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return next(leaves)
    names, context = wrapper.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(wrapper, name), leaves) for name in names}
    rebuilt: Tensor = type(wrapper).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    return rebuilt


def _strides(leaf: Tensor) -> tuple[int, ...]:
    """Strides of a dense copy of `leaf`. A transposed weight stays transposed, so the same kernels run on it."""
    return torch.empty_like(leaf, device="meta").stride()


def _extent(leaf: Tensor) -> int:
    """Bytes from the first element of `leaf` to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, _strides(leaf), strict=True))
    return (1 + reach) * leaf.dtype.itemsize if leaf.numel() else 0


def _padded_bytes(leaf: Tensor) -> int:
    return math.ceil(_extent(leaf) / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor with the shape, strides and dtype of `like` at byte `offset` of `memory`."""
    return memory[offset : offset + _extent(like)].view(like.dtype).as_strided(like.shape, _strides(like))


class _Placeholder(Tensor):
    """Placeholder for a tensor that is not on the device. It has the shape and dtype; computing with it raises.

    A meta tensor would not do: on the CPU, torch's products with one return garbage instead of raising.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "_Placeholder":
        placeholder: _Placeholder = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return placeholder

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs lack the first argument
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].dtype, args[0].device)
        raise RuntimeError(f"{function} of a streamed weight, outside of its module's forward pass")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class _Slot:
    """Device memory for one group at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.group: _Group | None = None
        self.copy_done: torch.cuda.Event | None = None
        """Marks the end of a copy into the slot that was issued on the copy stream."""


class _Group:
    """Modules that are copied together: their packed copy, in memory or in a file, and their tensors as views into
    `slot`.
    """

    def __init__(self, units: Sequence[nn.Module], index: int, slot: _Slot, folder: Path | None) -> None:
        self.index = index
        self.slot = slot
        self.units: list[tuple[nn.Module, list[tuple[_TensorRef, Tensor, Tensor]]]] = []
        """Each module with its tensors: where the tensor belongs, the view into `slot`, and the placeholder."""
        packed = torch.zeros(group_bytes(units), dtype=torch.uint8)
        offset = 0
        for unit in units:
            tensors: list[tuple[_TensorRef, Tensor, Tensor]] = []
            for ref in _tensor_refs([unit]):
                tensor, leaves = ref.tensor, []
                for leaf in _leaves(tensor):
                    if type(leaf) not in (Tensor, nn.Parameter):
                        raise TypeError(f"{ref.name}: a {type(leaf).__name__} cannot be split into plain tensors")
                    _view(packed, offset, leaf).copy_(leaf.detach())
                    leaves.append(_view(slot.memory, offset, leaf))
                    offset += _padded_bytes(leaf)
                view = _rebuilt(tensor, iter(leaves))
                placeholder: Tensor = _Placeholder(tensor.shape, tensor.dtype, slot.memory.device)
                if ref.is_parameter:
                    view, placeholder = (
                        nn.Parameter(view, requires_grad=False),
                        nn.Parameter(placeholder, requires_grad=False),
                    )
                ref.assign(placeholder)  # frees the original before the next group is packed
                tensors.append((ref, view, placeholder))
            self.units.append((unit, tensors))
        self.size = packed.nbytes
        self.file = None if folder is None else _on_disk(packed, folder)
        self.packed = packed if folder is None else None
        if self.packed is not None and slot.memory.device.type == "cuda":
            _pin(self.packed)


def _pin(memory: Tensor) -> None:
    """Page-lock `memory`, so that copies from it to the GPU are asynchronous.

    It locks exactly these bytes, whereas torch rounds its own pinned memory up to powers of two.
    """
    address = memory.data_ptr()
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if code:
        raise MemoryBudgetError.of(
            f"{format_size(memory.nbytes)} of host memory cannot be pinned for copies to the GPU (CUDA error {code})",
            remedy="Free host memory, raise `ulimit -l`, or give --group_offload_to_disk_path to stream from a disk.",
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False


def _buffers(size: int, count: int, device: torch.device) -> list[Tensor]:
    """`count` buffers of `size` bytes in host memory, pinned if `device` is a GPU."""
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
    if device.type == "cuda":
        for buffer in buffers:
            _pin(buffer)
    return buffers


def _on_disk(packed: Tensor, folder: Path) -> Path:
    """Write `packed` to a file in `folder` that is named after its SHA-256, unless the file already has these bytes.

    Raises:
        DiskError: no space.
    """
    content = packed.numpy().data
    path = folder / f"{hashlib.sha256(content).hexdigest()}.weights"
    if not (path.exists() and path.stat().st_size == packed.nbytes and torch.equal(_mapped(path), packed)):
        # Not synced to disk: a later run that finds the file damaged writes it again.
        write_atomic(path, content, sync=False)
    return path


def _mapped(path: Path) -> Tensor:
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # It warns that the memory is read-only, as intended.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class _SlotView:
    """Saved for autograd in place of a view into a slot."""

    group: _Group
    tensor: Tensor


_Mode = tuple[bool, bool]
"""Whether backward is running, and whether gradients are enabled. Both determine which group runs next."""


class Streaming:
    """Groups of streamed weights, their slots, and counts of the copies. Made by `install`."""

    def __init__(
        self, groups: Sequence[Sequence[nn.Module]], device: torch.device, *, ahead: bool, folder: Path | None
    ) -> None:
        groups = [units for units in groups if group_bytes(units)]
        slot_count = min(1 + ahead, len(groups))
        if folder is not None:
            remove_abandoned_parts(folder, ".*.weights.*.part")
        size = max(map(group_bytes, groups), default=0)
        self._device = device
        self._slots = [_Slot(size, device) for _ in range(slot_count)]
        self._groups = [_Group(units, i, self._slots[i % slot_count], folder) for i, units in enumerate(groups)]
        self._slot_by_address = {slot.memory.data_ptr(): slot for slot in self._slots}
        self._copy_stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._is_backward = False
        self._current: tuple[_Mode, _Group] | None = None
        """The group that was loaded last, with its mode."""
        self._successors: dict[tuple[_Mode, int], tuple[_Mode, _Group]] = {}
        """The (mode, group) that followed each (mode, group index). Learned in the first step."""
        self._earlier_work: torch.cuda.Event | None = None
        """Marks the end of all work that was launched for groups before the current one."""

        self._reader = None if folder is None else FileReader(_buffers(size, min(2, len(self._groups)), device))

        self.slot_bytes = size
        self.packed_bytes = sum(group.size for group in self._groups)
        self.peak_resident = 0
        """Maximum number of groups on the device at once, so far."""
        self.copies = 0
        """Number of copies of groups to the device."""
        self.prefetched_copies = 0
        """The prefetched ones of `copies`."""
        self.copied_bytes = 0
        for group in self._groups:
            for unit, tensors in group.units:
                unit.forward = self._streamed(group, tensors, unit.forward)

    def __str__(self) -> str:
        slots = f"{len(self._slots)} of up to {format_size(self.slot_bytes)} on the device at once"
        return f"{len(self._groups)} groups of weights, {format_size(self.packed_bytes)}, {slots}"

    @property
    def ring_bytes(self) -> int:
        """Size of all slots on the device."""
        return len(self._slots) * self.slot_bytes

    def description(self) -> str:
        """Counts of the copies so far, as text."""
        read = "" if self._reader is None else f"{self._reader.reads_ahead} of {self._reader.reads} files read ahead, "
        return (
            f"{self.copies} copies, {format_size(self.copied_bytes)}, {self.prefetched_copies} of them prefetched, "
            f"{read}at most {self.peak_resident} groups on the device"
        )

    def _streamed(
        self, group: _Group, tensors: list[tuple[_TensorRef, Tensor, Tensor]], forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def run(*inputs: Any, **keywords: Any) -> Any:
            self._load(group)
            with self._saved_tensor_hooks(), _materialized(tensors):
                out = forward(*inputs, **keywords)
            self._prefetch()
            return pytree.tree_map_only(Tensor, partial(self._output, group), out)

        return run

    def _output(self, group: _Group, tensor: Tensor) -> Tensor:
        """An output of a module of `group`: never a view into a slot, and with a hook that loads the group in backward.

        The hook covers tensors that a library saves without saved-tensor hooks: it runs before backward uses them.
        """
        if self._group_of(tensor) is not None:
            tensor = tensor.clone()
        if tensor.requires_grad:

            def load(_: Tensor) -> None:
                with self._in_backward():
                    self._load(group)

            tensor.register_hook(load)
        return tensor

    def _saved_tensor_hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Hooks that make autograd save (group, view) for tensors in a slot.

        Other tensors go to the enclosing hooks, those of activation checkpointing, which torch would otherwise skip.
        """
        outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)  # None if no hooks are active

        def pack(tensor: Tensor) -> object:
            group = self._group_of(tensor)
            if group is not None:
                return _SlotView(group, tensor)
            if outer is not None:
                return outer[0](tensor)
            return tensor.detach() if tensor.requires_grad else tensor  # a saved output must not hold its graph

        def unpack(saved: Any) -> Tensor:
            with self._in_backward():
                if isinstance(saved, _SlotView):
                    self._load(saved.group)
                    tensor = saved.tensor
                else:
                    tensor = saved if outer is None else outer[1](saved)
                self._prefetch()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _group_of(self, tensor: Tensor) -> _Group | None:
        """The group whose slot contains the memory of `tensor` or of one of its leaves; None if there is none."""
        for leaf in _leaves(tensor):
            slot = self._slot_by_address.get(leaf.untyped_storage().data_ptr())
            if slot is not None:
                return slot.group
        return None

    @contextlib.contextmanager
    def _in_backward(self) -> Iterator[None]:
        was_backward, self._is_backward = self._is_backward, True
        try:
            yield
        finally:
            self._is_backward = was_backward

    def _load(self, group: _Group) -> None:
        """Make sure that `group` is in its slot for all work that is launched from now on."""
        if self._current is None or self._current[1] is not group:
            current = (self._is_backward, torch.is_grad_enabled()), group
            if self._current is not None:
                previous_mode, previous_group = self._current
                self._successors[previous_mode, previous_group.index] = current
            self._current = current
            if self._copy_stream is not None:
                self._earlier_work = torch.cuda.current_stream(self._device).record_event()
        slot = group.slot
        if slot.copy_done is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copy_done)
            slot.copy_done = None
        if slot.group is not group:
            self._fill(group)
            self._read_next_file(*self._current)

    def _prefetch(self) -> None:
        """Begin to copy the next group. Called after the current group's work is launched: a copy from disk blocks the
        CPU, but the accelerator keeps computing.
        """
        if len(self._slots) < 2 or self._current is None:
            return
        mode, current_group = self._current
        following = self._successors.get((mode, current_group.index))
        if following is None:
            return
        _, group = following
        if group.slot.group is group or group.slot is current_group.slot:
            return
        self.prefetched_copies += 1
        if self._copy_stream is None or self._earlier_work is None:
            self._fill(group)
        else:
            self._copy_stream.wait_event(self._earlier_work)
            with torch.cuda.stream(self._copy_stream):
                self._fill(group)
            group.slot.copy_done = self._copy_stream.record_event()
        self._read_next_file(*following)

    def _read_next_file(self, mode: _Mode, group: _Group) -> None:
        """Begin to read the file of the next group after `group` that is not in a slot."""
        if self._reader is None:
            return
        for _ in range(len(self._slots) + 1):  # groups in slots need no copy
            following = self._successors.get((mode, group.index))
            if following is None:
                return
            mode, group = following
            if group.slot.group is not group and group.file is not None:
                self._reader.begin(group.file, group.size)
                return

    @torch.no_grad()
    def _fill(self, group: _Group) -> None:
        slot = group.slot
        slot.group = None  # in case the copy fails
        target = slot.memory[: group.size]
        if group.packed is not None:
            target.copy_(group.packed, non_blocking=True)
        else:
            assert self._reader is not None
            assert group.file is not None
            is_cuda = self._device.type == "cuda"
            target.copy_(self._reader.content(group.file, group.size), non_blocking=is_cuda)
            if is_cuda:
                copy_end = torch.cuda.Event(blocking=True)  # blocking: the reader thread sleeps while it waits
                copy_end.record(torch.cuda.current_stream(self._device))
                self._reader.keep_until(copy_end)
        slot.group = group
        self.copies += 1
        self.copied_bytes += group.size
        self.peak_resident = max(self.peak_resident, sum(slot.group is not None for slot in self._slots))


@contextlib.contextmanager
def moved_to_host(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Move those of `tensors` that are on `device` to host memory, where they can be read; on exit move them back.

    Their bits do not change. Streamed tensors are skipped. No other tensor may be a view of one of them.
    """
    moved: list[Tensor] = []
    try:
        for tensor in tensors:
            for leaf in [] if isinstance(tensor, _Placeholder) else _leaves(tensor):
                if leaf.device.type == device.type:
                    leaf.data = leaf.data.to("cpu", copy=True)
                    moved.append(leaf)
        release_memory(device)
        yield
    finally:
        for leaf in moved:
            leaf.data = leaf.data.to(device, copy=True)


@contextlib.contextmanager
def _materialized(tensors: list[tuple[_TensorRef, Tensor, Tensor]]) -> Iterator[None]:
    for ref, view, _ in tensors:
        ref.assign(view)
    try:
        yield
    finally:
        for ref, _, placeholder in tensors:
            ref.assign(placeholder)


def install(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Module]],
    *,
    device: torch.device,
    ahead: bool = False,
    folder: Path | None = None,
) -> Streaming:
    """Stream the frozen tensors of `groups` to `device` when their modules run; move the rest of `model` to `device`.

    Trainable parameters must already have `requires_grad`. Call this before `recompute.install`, so that recompute
    loads its groups. Results and gradients are bit-identical. On CUDA this requires kernels that always add in the
    same order; the backward kernels of fused attention do not.

    Args:
        groups: modules of `model` that are copied together, none inside another; see `block_groups`, `leaf_groups`.
        ahead: prefetch the next group into a second slot while one computes; on CUDA on a separate stream. The order
            of the groups is learned as the model runs.
        folder: store the packed groups as files in this folder and read them from there; None keeps them in memory.

    Raises:
        DiskError: no space in `folder`.
        MemoryBudgetError: the memory of the packed groups cannot be pinned.
        ValueError: a module is streamed already.
        TypeError: a frozen tensor has a class that cannot be split into plain tensors.
    """
    streaming = Streaming(groups, device, ahead=ahead, folder=folder)
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.data = parameter.data.to(device)  # the same object: an optimizer may refer to it
            elif parameter is not None and not isinstance(parameter, _Placeholder):
                owner._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, _Placeholder):
                owner._buffers[name] = buffer.to(device)
    return streaming
