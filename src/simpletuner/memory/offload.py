"""Frozen weights that wait in the machine's memory, or on its disk, and come to the accelerator group by group.

Each group's frozen tensors, quantized ones taken apart, lie packed in one copy that is only ever read. On the device
there is a ring of slots, and a group that is wanted is copied into its own: its tensors are views there. What learns
is in no group and stays on the device.

Autograd would keep views of a slot whose content goes. So what it saves of a slot is a note of the group instead, and
that brings the group back when the gradient wants it; nothing else of a slot leaves a forward pass. Outside of those,
the modules hold tensors without memory, which fail when they are used. Why not diffusers' hooks:
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
from simpletuner.base.parts import sweep_parts
from simpletuner.base.sizes import format_size
from simpletuner.memory.free import release_memory
from simpletuner.memory.reader import FileReader

_ALIGNMENT_BYTES = 256
"""Bytes; what the kernels of every library are content with."""


def block_groups(blocks: Sequence[nn.Module], per_group: int = 1) -> list[list[nn.Module]]:
    """Blocks in the order in which they run, `per_group` together."""
    return [list(blocks[start : start + per_group]) for start in range(0, len(blocks), per_group)]


def leaf_groups(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Each outermost module that itself owns frozen tensors, by itself: in the main single layers."""
    return [[leaf] for module in modules for leaf in _owners(module)]


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    if any(True for _ in _frozen(module)):
        yield module
    else:
        for child in module.children():
            yield from _owners(child)


def group_bytes(units: Iterable[nn.Module]) -> int:
    """What the frozen tensors of `units` take, packed: also of modules on the meta device."""
    return sum(_room(leaf) for place in _places(units) for leaf in _leaves(place.tensor))


@dataclass(frozen=True)
class _Place:
    """Where a frozen tensor lives in a model."""

    owner: nn.Module
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        tensor = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        # Not by setattr: that would register, and be answered by whatever a library has put in its way.
        (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.name] = tensor  # type: ignore[assignment]


def _places(units: Iterable[nn.Module]) -> Iterator[_Place]:
    for unit in units:
        for owner in unit.modules():
            for place in _frozen(owner):
                if isinstance(place.tensor, _Away):
                    raise ValueError(f"{place.name} of a {type(owner).__name__} is streamed already")
                yield place


def _frozen(owner: nn.Module) -> Iterator[_Place]:
    """The frozen tensors that `owner` has itself."""
    for name, parameter in owner._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            yield _Place(owner, name, is_parameter=True)
    for name, buffer in owner._buffers.items():
        if buffer is not None:
            yield _Place(owner, name, is_parameter=False)


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass, such as a quantized weight, is made of; of any other itself."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        for name in wrapper.__tensor_flatten__()[0]:
            yield from _leaves(getattr(wrapper, name))
    else:
        yield tensor


def _rebuilt(tensor: Tensor, leaves: Iterator[Tensor]) -> Tensor:
    """What `tensor` is, of other leaves, in the order of `_leaves`."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return next(leaves)
    names, context = wrapper.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(wrapper, name), leaves) for name in names}
    rebuilt: Tensor = type(wrapper).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    return rebuilt


def _strides(leaf: Tensor) -> tuple[int, ...]:
    """Those of `leaf` where it is dense: a transposed weight stays one, and the kernels that run on it the same."""
    return torch.empty_like(leaf, device="meta").stride()


def _extent(leaf: Tensor) -> int:
    """Bytes from the first number of `leaf` to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, _strides(leaf), strict=True))
    return (1 + reach) * leaf.dtype.itemsize if leaf.numel() else 0


def _room(leaf: Tensor) -> int:
    return math.ceil(_extent(leaf) / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _view(memory: Tensor, at: int, like: Tensor) -> Tensor:
    """A tensor like `like` in the bytes of `memory` from `at` on."""
    return memory[at : at + _extent(like)].view(like.dtype).as_strided(like.shape, _strides(like))


class _Away(Tensor):
    """Stands in a module for a tensor that is not on the device: its shape and type, and an error for whoever computes
    with it. (With torch's meta tensors a product on a CPU is no error, but noise.)
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "_Away":
        away: _Away = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return away

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # its first argument is left out of torch's own types
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].dtype, args[0].device)
        raise RuntimeError(f"{function} of a weight that is streamed, outside of its module's forward pass")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class _Slot:
    """Room on the device for one group at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: _Group | None = None
        self.ready: torch.cuda.Event | None = None
        """When a copy that another stream has been asked for will be there."""


class _Group:
    """Modules that come and go together: their packed copy, in memory or in a file, and their tensors as views into
    `slot`.
    """

    def __init__(self, units: Sequence[nn.Module], index: int, slot: _Slot, folder: Path | None) -> None:
        self.index = index
        self.slot = slot
        self.units: list[tuple[nn.Module, list[tuple[_Place, Tensor, Tensor]]]] = []
        """Each module, and of each of its tensors the place, the view, and what stands there while it is away."""
        packed = torch.zeros(group_bytes(units), dtype=torch.uint8)
        at = 0
        for unit in units:
            tensors: list[tuple[_Place, Tensor, Tensor]] = []
            for place in _places([unit]):
                tensor, leaves = place.tensor, []
                for leaf in _leaves(tensor):
                    if type(leaf) not in (Tensor, nn.Parameter):
                        raise TypeError(f"{place.name}: a {type(leaf).__name__} cannot be taken apart")
                    _view(packed, at, leaf).copy_(leaf.detach())
                    leaves.append(_view(slot.memory, at, leaf))
                    at += _room(leaf)
                view = _rebuilt(tensor, iter(leaves))
                away: Tensor = _Away(tensor.shape, tensor.dtype, slot.memory.device)
                if place.is_parameter:
                    view, away = nn.Parameter(view, requires_grad=False), nn.Parameter(away, requires_grad=False)
                place.put(away)  # which lets the tensor itself go, before the next group is packed
                tensors.append((place, view, away))
            self.units.append((unit, tensors))
        self.size = packed.nbytes
        self.file = None if folder is None else _on_disk(packed, folder)
        self.packed = packed if folder is None else None
        if self.packed is not None and slot.memory.device.type == "cuda":
            _pin(self.packed)


def _pin(memory: Tensor) -> None:
    """Lock `memory` in place, so that copies from it need no help of the processor. Just its bytes: torch's own pinned
    memory comes in powers of two.
    """
    address = memory.data_ptr()
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if code:
        raise MemoryBudgetError.of(
            f"{format_size(memory.nbytes)} of memory cannot be locked for copies to the GPU (CUDA error {code})",
            remedy="Is the memory short, or `ulimit -l` low? --group_offload_to_disk_path reads from a disk.",
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False


def _buffers(size: int, count: int, device: torch.device) -> list[Tensor]:
    """In host memory, for copies to `device`."""
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
    if device.type == "cuda":
        for buffer in buffers:
            _pin(buffer)
    return buffers


def _on_disk(packed: Tensor, folder: Path) -> Path:
    """A file of `folder` with the same bytes. It is named by them: what is there under that name and holds them is
    kept, whatever wrote it.

    Raises:
        DiskError: no space.
    """
    content = packed.numpy().data
    path = folder / f"{hashlib.sha256(content).hexdigest()}.weights"
    if not (path.exists() and path.stat().st_size == packed.nbytes and torch.equal(_mapped(path), packed)):
        # Not flushed: a start that finds it damaged writes it again.
        write_atomic(path, content, sync=False)
    return path


def _mapped(path: Path) -> Tensor:
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # That the memory cannot be written, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class _Note:
    """What autograd keeps of a tensor in a slot."""

    group: _Group
    tensor: Tensor


_Mode = tuple[bool, bool]
"""Whether a gradient is being computed, and whether what runs is recorded for one: what comes next depends on both."""


class Streaming:
    """What `install` has set up."""

    def __init__(
        self, groups: Sequence[Sequence[nn.Module]], device: torch.device, *, ahead: bool, folder: Path | None
    ) -> None:
        groups = [units for units in groups if group_bytes(units)]
        ring = min(1 + ahead, len(groups))
        if folder is not None:
            sweep_parts(folder, ".*.weights.*.part")
        size = max(map(group_bytes, groups), default=0)
        self._device = device
        self._slots = [_Slot(size, device) for _ in range(ring)]
        self._groups = [_Group(units, i, self._slots[i % ring], folder) for i, units in enumerate(groups)]
        self._at = {slot.memory.data_ptr(): slot for slot in self._slots}
        self._copier = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._is_backward = False
        self._now: tuple[_Mode, _Group] | None = None
        """The group that was brought last, and the mode in which it was."""
        self._next: dict[tuple[_Mode, int], tuple[_Mode, _Group]] = {}
        """Which group came after a group that was brought in a mode, and in which mode: learned in the first step."""
        self._entered: torch.cuda.Event | None = None
        """When all work on other groups than the present one will be done."""

        self._reader = None if folder is None else FileReader(_buffers(size, min(2, len(self._groups)), device))

        self.slot_bytes = size
        self.packed_bytes = sum(group.size for group in self._groups)
        self.peak_resident = 0
        """The most groups that were ever on the device at once."""
        self.copies = 0
        """Groups copied to the device."""
        self.copies_ahead = 0
        """Of these, copied before they were asked for."""
        self.copied_bytes = 0
        for group in self._groups:
            for unit, tensors in group.units:
                unit.forward = self._streamed(group, tensors, unit.forward)

    def __str__(self) -> str:
        room = f"{len(self._slots)} of up to {format_size(self.slot_bytes)} on the device at once"
        return f"{len(self._groups)} groups of weights, {format_size(self.packed_bytes)}, {room}"

    @property
    def ring_bytes(self) -> int:
        """Of all slots on the device."""
        return len(self._slots) * self.slot_bytes

    def told(self) -> str:
        """What has been copied so far, for people."""
        read = "" if self._reader is None else f"{self._reader.reads_ahead} of {self._reader.reads} files read ahead, "
        return (
            f"{self.copies} copies, {format_size(self.copied_bytes)}, {self.copies_ahead} of them ahead of time, "
            f"{read}at most {self.peak_resident} groups on the device"
        )

    def _streamed(
        self, group: _Group, tensors: list[tuple[_Place, Tensor, Tensor]], forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def run(*inputs: Any, **named: Any) -> Any:
            self._bring(group)
            with self._saving(), _in_place(tensors):
                out = forward(*inputs, **named)
            self._look_ahead()
            return pytree.tree_map_only(Tensor, partial(self._leaving, group), out)

        return run

    def _leaving(self, group: _Group, tensor: Tensor) -> Tensor:
        """A result of a module of `group`: never memory of a slot, and the group is there when its gradient is wanted.
        For what a library hides from autograd's hooks, and before any that it does not.
        """
        if self._holder(tensor) is not None:
            tensor = tensor.clone()
        if tensor.requires_grad:

            def bring(_: Tensor) -> None:
                with self._in_backward():
                    self._bring(group)

            tensor.register_hook(bring)
        return tensor

    def _saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, autograd saves notes of what is in a slot. All else goes the way it would go without this: where the
        block is recomputed, to the hooks of the recomputation, which torch would else not ask.
        """
        outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)  # None without any

        def pack(tensor: Tensor) -> object:
            group = self._holder(tensor)
            if group is not None:
                return _Note(group, tensor)
            if outer is not None:
                return outer[0](tensor)
            return tensor.detach() if tensor.requires_grad else tensor  # a result that is saved must not hold its graph

        def unpack(kept: Any) -> Tensor:
            with self._in_backward():
                if isinstance(kept, _Note):
                    self._bring(kept.group)
                    tensor = kept.tensor
                else:
                    tensor = kept if outer is None else outer[1](kept)
                self._look_ahead()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _holder(self, tensor: Tensor) -> _Group | None:
        """The group of whose slot `tensor`, or a part of it, is a view."""
        for leaf in _leaves(tensor):
            slot = self._at.get(leaf.untyped_storage().data_ptr())
            if slot is not None:
                return slot.holds
        return None

    @contextlib.contextmanager
    def _in_backward(self) -> Iterator[None]:
        before, self._is_backward = self._is_backward, True
        try:
            yield
        finally:
            self._is_backward = before

    def _bring(self, group: _Group) -> None:
        """Have `group` in its slot for what is launched from here on."""
        if self._now is None or self._now[1] is not group:
            now = (self._is_backward, torch.is_grad_enabled()), group
            if self._now is not None:
                before, last = self._now
                self._next[before, last.index] = now
            self._now = now
            if self._copier is not None:
                self._entered = torch.cuda.current_stream(self._device).record_event()
        slot = group.slot
        if slot.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
            slot.ready = None
        if slot.holds is not group:
            self._fill(group)
            self._read_ahead(*self._now)

    def _look_ahead(self) -> None:
        """Begin to copy what will be wanted next. Called once the present group's work is launched: from a disk the
        copy keeps the processor, but not the accelerator.
        """
        if len(self._slots) < 2 or self._now is None:
            return
        mode, now = self._now
        following = self._next.get((mode, now.index))
        if following is None:
            return
        _, group = following
        if group.slot.holds is group or group.slot is now.slot:
            return
        self.copies_ahead += 1
        if self._copier is None or self._entered is None:
            self._fill(group)
        else:
            self._copier.wait_event(self._entered)
            with torch.cuda.stream(self._copier):
                self._fill(group)
            group.slot.ready = self._copier.record_event()
        self._read_ahead(*following)

    def _read_ahead(self, mode: _Mode, group: _Group) -> None:
        """Begin to read the file of the group that will have to be copied next after `group`."""
        if self._reader is None:
            return
        for _ in range(len(self._slots) + 1):  # those in slots are not copied
            following = self._next.get((mode, group.index))
            if following is None:
                return
            mode, group = following
            if group.slot.holds is not group and group.file is not None:
                self._reader.begin(group.file, group.size)
                return

    @torch.no_grad()
    def _fill(self, group: _Group) -> None:
        slot = group.slot
        slot.holds = None  # should the copy fail
        room = slot.memory[: group.size]
        if group.packed is not None:
            room.copy_(group.packed, non_blocking=True)
        else:
            assert self._reader is not None
            assert group.file is not None
            is_cuda = self._device.type == "cuda"
            room.copy_(self._reader.content(group.file, group.size), non_blocking=is_cuda)
            if is_cuda:
                end = torch.cuda.Event(blocking=True)  # the thread sleeps until then
                end.record(torch.cuda.current_stream(self._device))
                self._reader.copy_ends(end)
        slot.holds = group
        self.copies += 1
        self.copied_bytes += group.size
        self.peak_resident = max(self.peak_resident, sum(slot.holds is not None for slot in self._slots))


@contextlib.contextmanager
def set_aside(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, those of `tensors` that are on `device`, streamed ones left out, lie in host memory and can be read
    there; afterwards on `device` again, bit for bit. No other tensor may be a view of one of them.
    """
    moved: list[Tensor] = []
    try:
        for tensor in tensors:
            for leaf in [] if isinstance(tensor, _Away) else _leaves(tensor):
                if leaf.device.type == device.type:
                    leaf.data = leaf.data.to("cpu", copy=True)
                    moved.append(leaf)
        release_memory(device)
        yield
    finally:
        for leaf in moved:
            leaf.data = leaf.data.to(device, copy=True)


@contextlib.contextmanager
def _in_place(tensors: list[tuple[_Place, Tensor, Tensor]]) -> Iterator[None]:
    for place, view, _ in tensors:
        place.put(view)
    try:
        yield
    finally:
        for place, _, away in tensors:
            place.put(away)


def install(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Module]],
    *,
    device: torch.device,
    ahead: bool = False,
    folder: Path | None = None,
) -> Streaming:
    """Keep the frozen tensors of `groups` off `device` but for the one that computes; move all else of `model` there.

    What is trained must have `requires_grad` by now. Call it before `recompute.install`: what is recomputed then brings
    its group back. Results and gradients are the same bits. On CUDA that takes kernels that always add in the
    same order; the backward passes of fused attention do not.

    Args:
        groups: modules of `model` that come and go together, none inside another; see `block_groups`, `leaf_groups`.
        ahead: copy the group that will be wanted next while one computes, in a second slot; on CUDA in a stream of its
            own. The order is learned as the model runs.
        folder: where packed groups are files, and are read from, instead of being in memory.

    Raises:
        DiskError: no space in `folder`.
        MemoryBudgetError: the memory for the packed groups cannot be locked.
        ValueError: a module is streamed already.
        TypeError: a frozen tensor of a class that cannot be taken apart.
    """
    streaming = Streaming(groups, device, ahead=ahead, folder=folder)
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.data = parameter.data.to(device)  # the same parameter: others may know it
            elif parameter is not None and not isinstance(parameter, _Away):
                owner._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, _Away):
                owner._buffers[name] = buffer.to(device)
    return streaming
