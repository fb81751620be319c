"""Streamed weights: always the bits of resident ones, and never more groups on the device than the ring holds."""

import gc
import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.base.errors import DiskError
from simpletuner.memory import offload, reader, recompute
from simpletuner.memory.reader import read_file

CPU = torch.device("cpu")
WIDTH = 24


class Halves(Tensor):
    """A weight kept as two plain tensors, as quantized ones are: eight bits, and a scale of each row. Its product saves
    the weight itself for the backward pass.
    """

    levels: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, levels: Tensor, scale: Tensor) -> "Halves":
        wrapper = torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype, device=levels.device)
        wrapper.levels, wrapper.scale = levels, scale
        return wrapper

    @classmethod
    def of(cls, weight: Tensor) -> "Halves":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def whole(self) -> Tensor:
        return self.levels.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["levels", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _context: None, _size: object, _stride: object) -> "Halves":
        return Halves(inner["levels"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return HalvesLinear.apply(*args)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Halves(function(args[0].levels), function(args[0].scale))
        raise NotImplementedError(f"{function} of {cls.__name__}")


class HalvesLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Halves, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.whole(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient @ weight.whole(), None, None


class Hidden(torch.autograd.Function):
    """A product that keeps its weight where autograd's hooks do not see it, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.weight, None


class HiddenLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(x, self.weight)


class Adapted(nn.Module):
    """A frozen Linear with a trained one beside it, as an adapter is."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


class Block(nn.Module):
    """Frozen weights in all the ways in which a gradient can want them, and a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH).requires_grad_(False)
        self.inner = Adapted()
        linear = HiddenLinear if kind == "hidden" else nn.Linear
        self.out = linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.register_buffer("gain", torch.rand(WIDTH) + 0.5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(WIDTH) + 0.5)
            self.inner.adapter.weight.mul_(0.1)
        if kind == "quantized":
            self.inner.base.weight = nn.Parameter(Halves.of(self.inner.base.weight.data), requires_grad=False)
            self.out.weight = nn.Parameter(Halves.of(self.out.weight.data), requires_grad=False)
        if kind == "transposed":
            self.out.weight = nn.Parameter(self.out.weight.data.T.contiguous().T, requires_grad=False)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.norm(x) + shift))
        return x + self.out(h) * self.gain


class Model(nn.Module):
    def __init__(self, kind: str = "plain", blocks: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, torch.full((WIDTH,), 0.1))
        return x

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


Groups = Callable[[Sequence[nn.Module]], list[list[nn.Module]]]
LEVELS: dict[str, Groups] = {
    "block": offload.block_groups,
    "two blocks": lambda blocks: offload.block_groups(blocks, 2),
    "all blocks": lambda blocks: offload.block_groups(blocks, 9),
    "leaf": lambda blocks: offload.leaf_groups([part for block in blocks for part in block.children()]),
}
KINDS = ("plain", "quantized", "transposed", "hidden")
RECOMPUTED = (False, None, 2, 3)
"""Not at all, every block, all but every second, all but every third."""


def prepared(
    kind: str = "plain", level: str | None = None, keep_every: int | bool | None = False, **options: Any
) -> tuple[Model, offload.Streaming | None]:
    model = Model(kind)
    streaming = None
    if level is not None:
        streaming = offload.install(model, LEVELS[level](list(model.blocks)), device=CPU, **options)
    if keep_every is not False:
        recompute.install(list(model.blocks), keep_every)
    return model, streaming


def batch(number: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))


def train(model: Model, steps: int = 20) -> list[Tensor]:
    """Loss and gradients of each step, two passes accumulated."""
    optimizer = torch.optim.AdamW(model.trained, lr=1e-2)
    found = []
    for step in range(steps):
        for part in range(2):
            loss = model(batch(2 * step + part)).square().mean()
            loss.backward()
            found.append(loss.detach())
        found += [parameter.grad.clone() for parameter in model.trained if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def resident() -> dict[str, list[Tensor]]:
    """What the untouched model of each kind does in 20 steps."""
    found = {kind: train(Model(kind)) for kind in KINDS}
    assert not torch.equal(found["plain"][0], found["quantized"][0])
    return found


CASES = list(itertools.product(KINDS, LEVELS, RECOMPUTED, (False, True)))


@pytest.mark.parametrize(
    ("kind", "level", "keep_every", "ahead"),
    # Nineteen is no divisor of the number of any of them, so that the quick ones have something of all.
    [case if index % 19 == 0 else pytest.param(*case, marks=pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_twenty_steps_are_the_resident_ones_bit_for_bit(
    resident: dict[str, list[Tensor]], kind: str, level: str, keep_every: int | bool | None, ahead: bool
) -> None:
    model, streaming = prepared(kind, level, keep_every, ahead=ahead)
    assert_same(train(model), resident[kind])
    assert streaming is not None
    groups = len(LEVELS[level](list(Model(kind).blocks)))
    assert streaming.peak_resident == min(1 + ahead, groups)
    if groups > 2:
        assert streaming.copies > 20 * groups
        assert (streaming.prefetched_copies > 20 * groups) == ahead


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_is_the_resident_one_bit_for_bit(level: str) -> None:
    model, streaming = prepared("quantized", level, ahead=True)
    plain = Model("quantized")
    assert streaming is not None
    with torch.no_grad():
        for number in range(3):
            assert torch.equal(model(batch(number)), plain(batch(number)))
    groups = len(LEVELS[level](list(plain.blocks)))
    if groups > 2:
        # From the second pass on each group is there before its turn, but for the first if it shares the last's slot.
        assert streaming.copies <= 3 * groups + 1
        assert streaming.copies - streaming.prefetched_copies <= groups + 2 * (groups % 2)


def weights_alive() -> int:
    """Bytes of all tensors' memory, counted by the garbage collector."""
    memories = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            memory = thing.untyped_storage()
            memories[memory.data_ptr()] = memory.nbytes()
    return sum(memories.values())


def peak(model: Model, before: int) -> int:
    """The most that is alive at any product of an adapter or gradient of one, in one step."""
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, weights_alive() - before)

    for block in model.blocks:
        block.inner.adapter.register_forward_hook(look)
        block.inner.adapter.weight.register_hook(look)
    model(batch(0)[:1]).square().mean().backward()
    return most


@pytest.mark.parametrize("keep_every", [pytest.param(False, marks=pytest.mark.slow), None])
@pytest.mark.parametrize("ahead", [False, True])
def test_no_more_weights_are_alive_than_the_ring_holds(ahead: bool, keep_every: bool | None) -> None:
    """Counted without what the program says of itself. The packed copy is alive too: here it is the same memory."""
    gc.collect()
    before = weights_alive()
    model, _ = prepared("plain", None, keep_every)
    frozen = sum(tensor.nbytes for block in model.blocks for tensor in [*block.parameters(), *block.buffers()])
    frozen -= sum(parameter.nbytes for parameter in model.trained)
    expected = peak(model, before)
    del model
    gc.collect()
    assert weights_alive() == before
    model, streaming = prepared("plain", "block", keep_every, ahead=ahead)
    assert streaming is not None
    group = offload.group_bytes([Model().blocks[0]])
    more = peak(model, before) - expected - (streaming.packed_bytes - frozen)
    # A few activations more are seen: where there are hooks, Python holds what autograd alone held.
    assert (1 + ahead) * group <= more < (2 + ahead) * group


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_that_no_note_is_made_of_are_there_too(ahead: bool) -> None:
    """Nothing but products that hide their weights: what brings these back is the gradient of what they gave."""
    found = []
    for is_streamed in (False, True):
        torch.manual_seed(0)
        layers = [HiddenLinear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(5)]
        if is_streamed:
            model = nn.ModuleList(layers)
            offload.install(model, offload.block_groups(layers), device=CPU, ahead=ahead)
        x = first = batch(0).requires_grad_()
        for layer in layers:
            x = layer(x)
        x.square().sum().backward()
        found.append(first.grad)
    assert torch.equal(*found)


def test_passes_without_gradients_between_forward_and_backward_change_nothing() -> None:
    for keep_every in (False, None):
        found = []
        for level in (None, "block", "leaf"):
            model, _ = prepared("plain", level, keep_every)
            loss = model(batch(0)).square().mean()
            with torch.no_grad():
                model(batch(1))
                model.blocks[2](batch(2), torch.zeros(WIDTH))
            loss.backward()
            found.append([parameter.grad for parameter in model.trained])
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])


def test_two_passes_before_one_gradient_or_a_gradient_twice_change_nothing() -> None:
    for keep_every in (False, None):
        found = []
        for level in (None, "block", "leaf"):
            model, _ = prepared("plain", level, keep_every, **({} if level is None else {"ahead": True}))
            loss = model(batch(0)).square().mean() + model(model(batch(1)).detach()).square().mean()
            loss.backward(retain_graph=keep_every is False)
            if keep_every is False:
                loss.backward()
            found.append([parameter.grad for parameter in model.trained])
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])


@pytest.mark.parametrize("keep_every", [False, None])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_after_an_error_in_the_middle_the_next_step_is_right(level: str, keep_every: bool | None) -> None:
    expected = train(Model(), 2)
    model, _ = prepared("plain", level, keep_every, ahead=True)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = model.blocks[3].norm.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(batch(0))
    hook.remove()

    loss = model(batch(0)).square().mean()
    hook = model.blocks[1].inner.adapter.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    hook.remove()
    del loss
    for parameter in model.trained:
        parameter.grad = None
    assert_same(train(model, 2), expected)


class Giving(nn.Module):
    """Hands out memory of its own."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((4,), value))

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.table, {"some": self.table[1:3]}


def test_what_a_module_hands_out_is_not_overwritten_later() -> None:
    model = nn.ModuleList(Giving(value) for value in (1.0, 2.0))
    offload.install(model, offload.leaf_groups([model]), device=CPU)
    first = model[0]()
    model[1]()
    assert first[0].tolist() == [1] * 4
    assert first[1]["some"].tolist() == [1, 1]


def test_a_weight_outside_of_its_module_is_an_error_and_no_noise() -> None:
    model, _ = prepared("plain", "block")
    weight = model.blocks[0].out.weight
    assert (weight.shape, weight.dtype, weight.device) == ((WIDTH, WIDTH), torch.float32, CPU)
    assert repr(weight) == "_Placeholder([24, 24], torch.float32)"
    for use in (lambda: batch(0) @ weight.T, lambda: F.linear(batch(0), weight), lambda: weight + 1):
        with pytest.raises(RuntimeError, match="of a streamed weight, outside of its module's forward pass"):
            use()


def test_what_learns_stays_the_same_parameter() -> None:
    model = Model()
    trained = model.trained
    offload.install(model, offload.block_groups(list(model.blocks)), device=CPU)
    assert all(ours is theirs for ours, theirs in zip(model.trained, trained, strict=True))
    assert [name for name, tensor in model.named_parameters() if type(tensor) is nn.Parameter] == [
        "first.weight", "first.bias", *(f"blocks.{index}.inner.adapter.weight" for index in range(5))
    ]  # fmt: skip


def test_groups() -> None:
    model = Model()
    blocks = list(model.blocks)
    assert [len(group) for group in offload.block_groups(blocks, 2)] == [2, 2, 1]
    assert offload.leaf_groups([model.first]) == [[model.first]]
    # A block that owns a buffer is one leaf with all below it: its buffer is wanted while they run.
    assert offload.leaf_groups(blocks) == [[block] for block in blocks]
    assert [type(leaf).__name__ for (leaf,) in offload.leaf_groups(blocks[0].children())] == [
        "RMSNorm", "Linear", "Linear"
    ]  # fmt: skip
    # Four-byte numbers: two matrices, a bias, a norm, a buffer, each filled up to 256 bytes.
    assert offload.group_bytes(blocks[:1]) == 2 * 2304 + 3 * 256
    with torch.device("meta"):
        assert offload.group_bytes([Model().blocks[0]]) == 2 * 2304 + 3 * 256


def test_what_has_no_frozen_weights_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    streaming = offload.install(model, offload.block_groups(list(model)), device=CPU)
    assert "forward" not in vars(model[0])
    assert str(streaming) == "0 groups of weights, 0 B, 0 of up to 0 B on the device at once"


def test_a_module_is_streamed_once() -> None:
    model, _ = prepared("plain", "block")
    with pytest.raises(ValueError, match="weight of a RMSNorm is streamed already"):
        offload.install(model, [[model.blocks[0].norm]], device=CPU)


class Opaque(Tensor):
    """Of a class that does not say what it is made of."""


def test_a_weight_that_cannot_be_taken_apart_is_named() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Opaque), requires_grad=False)
    with pytest.raises(TypeError, match="weight: a Opaque cannot be split into plain tensors"):
        offload.install(linear, [[linear]], device=CPU)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_from_a_disk_the_bits_are_the_same_and_files_are_used_again(
    tmp_path: Path, resident: dict[str, list[Tensor]]
) -> None:
    model, streaming = prepared("quantized", "two blocks", None, folder=tmp_path)
    assert_same(train(model), resident["quantized"])
    files = files_of(tmp_path)
    assert len(files) == 3
    assert streaming is not None
    assert sum(len(content) for content, _ in files.values()) == streaming.packed_bytes
    model, _ = prepared("quantized", "two blocks", None, folder=tmp_path, ahead=True)
    assert_same(train(model), resident["quantized"])
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "level", ["block", *(pytest.param(level, marks=pytest.mark.slow) for level in ("all blocks", "leaf"))]
)
def test_from_a_slow_disk_the_bits_are_the_same_and_files_are_read_ahead(
    tmp_path: Path, resident: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch, level: str, ahead: bool
) -> None:
    delays = random.Random(0)

    def slowly(*arguments: Any) -> None:
        time.sleep(delays.choice((0, 0, 1e-3, 3e-3)))
        read_file(*arguments)

    monkeypatch.setattr(reader, "read_file", slowly)
    model, streaming = prepared("plain", level, None, folder=tmp_path, ahead=ahead)
    with torch.no_grad():
        model(batch(0))  # another order
    assert_same(train(model), resident["plain"])
    assert streaming is not None
    counts = re.search(r"(\d+) of (\d+) files read ahead", streaming.description())
    assert counts is not None
    reads_ahead, reads = map(int, counts.groups())
    assert reads == streaming.copies
    # The first passes teach the order. Of leaves it is learned in part: recomputed, one follows on another's way back.
    assert reads_ahead >= {"block": reads - 20, "all blocks": 0, "leaf": reads // 2}[level]


@pytest.mark.parametrize("moment", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_a_file_that_vanishes_ends_the_step_and_the_next_is_right(
    tmp_path: Path, resident: dict[str, list[Tensor]], moment: str
) -> None:
    model, streaming = prepared("plain", "block", None, folder=tmp_path)
    assert streaming is not None
    for _ in range(2):
        model(batch(0)).square().mean().backward()
    loss = model(batch(0)).square().mean()
    file = streaming._groups[2].file
    assert file is not None
    moved = file.rename(tmp_path / "elsewhere")
    step = loss.backward if moment == "backward" else partial(model, batch(0))
    with pytest.raises(DiskError, match=f"{file.name} cannot be read: No such file"):
        step()
    moved.rename(file)
    for parameter in model.trained:
        parameter.grad = None
    assert_same(train(model), resident["plain"])


def test_files_of_other_weights_or_damaged_ones_are_never_used(
    tmp_path: Path, resident: dict[str, list[Tensor]]
) -> None:
    prepared("plain", "block", folder=tmp_path)
    files = files_of(tmp_path)
    assert len(files) == 5
    damaged, cut, *_ = sorted(files)
    (tmp_path / damaged).write_bytes(files[damaged][0][:-1] + b"\1")
    (tmp_path / cut).write_bytes(files[cut][0][:-256])
    model, _ = prepared("quantized", "block", folder=tmp_path)
    assert_same(train(model), resident["quantized"])
    assert len(files_of(tmp_path)) == 10
    model, _ = prepared("plain", "block", folder=tmp_path)
    assert_same(train(model), resident["plain"])
    found = files_of(tmp_path)
    assert all(found[name][0] == content for name, (content, _) in files.items())
