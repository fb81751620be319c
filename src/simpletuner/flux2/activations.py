"""What a step through the transformer keeps in memory, block by block, with whatever trains in them.

Each kind of block is traced once (`simpletuner.memory.trace`), and the kinds are put together in the order in which
the passes run: kept bytes pile up forwards and gradients backwards, and somewhere on the way back is the peak.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.flux2.lora import Range, wrap
from simpletuner.flux2.rotary import Rotary
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import DoubleBlock, OutputNorm, ReferenceAttention, SingleBlock
from simpletuner.memory import recompute
from simpletuner.memory.trace import Cost, fuse_attention, pretending, trace, trace_forward

Adapted = tuple[tuple[str, Range], ...]
"""The Linears of a block that wear an adapter, by their names in the block, and what of each learns."""


@dataclass(frozen=True)
class Pass:
    """What goes through the transformer, and how."""

    spec: TransformerSpec
    dtype: torch.dtype
    """Of the weights, and of what is between them."""
    batch: int
    text: int
    """Text tokens of a sample."""
    image: int
    """Image tokens of a sample."""
    is_autocast: bool = False
    """Whether weights are cast for each multiplication, and the copies kept for the gradient."""
    is_full: bool = False
    """Whether every weight learns."""
    is_released: bool = False
    """Whether each weight's gradient is freed as soon as it is whole."""
    adapted: tuple[Adapted, ...] = ()
    """Of each block, doubles first; empty where no adapter is."""
    rank: int = 0
    dropout: float = 0.0
    recomputed: tuple[bool, ...] = ()
    """Of each block; empty where none is."""
    routes: tuple[Route, ...] = ()
    references: int = 0
    """Reference tokens of a sample, beside the image tokens; padding counts."""
    reference_attention: ReferenceView = "full"

    @property
    def joint(self) -> int:
        """All tokens of a sample."""
        return self.text + self.image + self.references

    @property
    def stream_bytes(self) -> int:
        """Of the image and reference tokens between two blocks."""
        return self.batch * (self.image + self.references) * self.spec.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class _Block:
    """All that decides what a block costs."""

    at: Pass
    """With nothing in it that belongs to single blocks; its image tokens are those that the block sees."""
    is_double: bool
    is_recomputed: bool
    is_tracked: bool
    """Whether its inputs want gradients."""
    is_routed: bool
    adapters: Adapted

    @property
    def stream_sizes(self) -> list[int]:
        """Bytes of each tensor that goes in and is not shared."""
        return [self.at.batch * count * self.at.spec.hidden * self.at.dtype.itemsize for count in self.stream_tokens]

    @property
    def stream_tokens(self) -> tuple[int, ...]:
        """Tokens of each."""
        return (self.at.text, self.at.image + self.at.references) if self.is_double else (self.at.joint,)


@dataclass(frozen=True)
class Activations:
    """Bytes at the moment of a training step at which the most is in memory, weights and optimizer not counted."""

    kept: int
    """By autograd, for the blocks that still wait for their gradient."""
    elsewhere: int
    """Inputs of recomputed blocks that wait in the machine's memory, at most. Memory that copies to an accelerator are
    made from comes in powers of two."""
    workspace: int
    """Of the block at work."""
    gradients: int
    """Of weights, those that are there by then."""

    @property
    def total(self) -> int:
        return self.kept + self.workspace + self.gradients


IN_FLIGHT = 2
"""Offloaded block inputs that are on the accelerator all the same: the one in use and the next."""


@lru_cache(maxsize=256)
def training(at: Pass, *, offloaded: bool = False, accumulated: bool = False, shards: int = 1) -> Activations:
    """The worst moment of a forward and backward pass.

    Args:
        offloaded: the inputs of recomputed blocks wait in the machine's memory.
        accumulated: gradients are there from the passes before.
        shards: each process keeps one of so many parts of a gradient as soon as its block's backward pass is over.
    """
    blocks = _blocks(at)
    costs = [_cost(block) for block in blocks]
    tail = _tail(replace(at, adapted=(), recomputed=(), routes=()))
    away = [
        cost.kept if offloaded and block.is_recomputed and block.is_tracked else 0
        for block, cost in zip(blocks, costs, strict=True)
    ]
    every = -(-(tail.gradients + sum(cost.gradients for cost in costs)) // shards)

    moments: list[Activations] = []
    kept = flying = 0
    for index, cost in enumerate(costs):
        flying = sum(away[max(0, index - IN_FLIGHT + 1) : index + 1])
        moments.append(Activations(kept + flying, 0, cost.forward, every if accumulated else 0))
        kept += cost.kept - away[index]
    gradients = every if accumulated else 0
    moments.append(Activations(kept + flying, 0, tail.kept + tail.backward, gradients))
    gradients += 0 if accumulated else -(-tail.gradients // shards)
    for index in reversed(range(len(costs))):
        flying = sum(away[max(0, index - IN_FLIGHT + 1) : index + 1])
        detour = at.stream_bytes if blocks[index].is_routed else 0
        # The gradients that this block leaves are in what it takes for its backward pass.
        moments.append(Activations(kept + flying, 0, costs[index].backward + detour, gradients))
        kept -= costs[index].kept - away[index]
        gradients += 0 if accumulated else -(-costs[index].gradients // shards)
    worst = max(moments, key=lambda moment: moment.total)
    waiting = (block.stream_sizes for block, size in zip(blocks, away, strict=True) if size)
    return replace(worst, elsewhere=sum(1 << (size - 1).bit_length() for sizes in waiting for size in sizes))


def kept_bytes(at: Pass) -> int:
    """What autograd holds between the forward and the backward pass, for blocks and last layers."""
    return (
        sum(_cost(block).kept for block in _blocks(at)) + _tail(replace(at, adapted=(), recomputed=(), routes=())).kept
    )


@lru_cache(maxsize=64)
def sampling(at: Pass) -> int:
    """Bytes that a pass without gradients takes at most."""
    blocks = _blocks(replace(at, recomputed=(), routes=()))
    return max(_forward(replace(block, is_tracked=False)) for block in blocks)


def _blocks(at: Pass) -> list[_Block]:
    found = []
    is_tracked = at.is_full
    bare = replace(at, adapted=(), recomputed=(), routes=())
    for index in range(at.spec.blocks):
        route = next((route for route in at.routes if route.start <= index <= route.end), None)
        image = at.image if route is None else route.keeps(at.image)
        adapters = at.adapted[index] if at.adapted else ()
        found.append(
            _Block(
                at=replace(bare, image=image),
                is_double=index < at.spec.double_blocks,
                is_recomputed=bool(at.recomputed) and at.recomputed[index],
                is_tracked=is_tracked,
                is_routed=image < at.image,
                adapters=adapters,
            )
        )
        is_tracked = is_tracked or bool(adapters)
    return found


@lru_cache(maxsize=512)
def _cost(block: _Block) -> Cost:
    if not (block.at.is_full or block.adapters or block.is_tracked):
        return Cost(0, _forward(block), 0, 0)
    with pretending(block.at.dtype):
        run, streams, weights, shared = _made(block)
        cost = trace(run, streams, weights, shared, is_released=block.at.is_released)
    copies = sum(weight.nbytes for weight in weights) if block.at.is_autocast else 0
    if block.is_recomputed:
        return replace(cost, backward=cost.backward + copies)
    return replace(cost, kept=cost.kept + copies)


@lru_cache(maxsize=64)
def _forward(block: _Block) -> int:
    with pretending(block.at.dtype):
        run, streams, weights, shared = _made(block)
        return trace_forward(run, streams, [*weights, *shared])


Made = tuple[Callable[..., Sequence[Tensor]], Callable[[], list[Tensor]], list[Tensor], list[Tensor]]
"""How to run it, what goes in, its weights, and what it shares with the others."""


def _made(block: _Block) -> Made:
    at = block.at
    spec, batch, dtype = at.spec, at.batch, at.dtype
    module: nn.Module = DoubleBlock(spec) if block.is_double else SingleBlock(spec)
    module.requires_grad_(at.is_full)
    for name, place in block.adapters:
        a = torch.empty(at.rank, place.columns[1] - place.columns[0])
        b = torch.empty(place.rows[1] - place.rows[0], at.rank)
        wrap(module, name, a, b, place=place, scale=1.0, dropout=at.dropout)
    fuse_attention(module)
    if block.is_recomputed:
        recompute.install([module])
    module.train()

    def stream(tokens: int) -> Tensor:
        return torch.empty(batch, tokens, spec.hidden, dtype=dtype, requires_grad=block.is_tracked)

    def modulation(sets: int) -> Tensor:
        return torch.empty(batch, 1, 3 * sets * spec.hidden, dtype=dtype, requires_grad=at.is_full)

    tables = (batch,) if block.is_routed or at.references else ()
    half = (*tables, at.joint, spec.head_dim // 2)
    angles: Rotary = (torch.empty(half, dtype=torch.float32), torch.empty(half, dtype=torch.float32))
    modulations = [modulation(2), modulation(2)] if block.is_double else [modulation(1)]

    is_own = at.references > 0 and at.reference_attention == "own"
    references = ReferenceAttention(at.references, is_own=True) if is_own else None

    def run(*streams: Tensor) -> Sequence[Tensor]:
        out = module(*streams, *modulations, angles, references)
        return out if isinstance(out, tuple) else (out,)

    return (
        run,
        lambda: [stream(count) for count in block.stream_tokens],
        list(module.parameters()),
        [*modulations, *angles],
    )


@lru_cache(maxsize=64)
def _tail(at: Pass) -> Cost:
    """The last norm, the last matrix and the loss."""
    spec = at.spec
    with pretending(at.dtype):
        norm, out = OutputNorm(spec), nn.Linear(spec.hidden, spec.in_channels, bias=False)
        weights = [*norm.parameters(), *out.parameters()]
        for weight in weights:
            weight.requires_grad_(at.is_full)
        vector = torch.empty(at.batch, spec.hidden, dtype=at.dtype)
        target = torch.empty(at.batch, at.image, spec.in_channels, dtype=torch.float32)

        def run(joint: Tensor) -> Sequence[Tensor]:
            predicted = out(norm(joint[:, at.text : at.text + at.image], vector))
            return ((predicted.float() - target).square().mean(),)

        def joint() -> list[Tensor]:
            shape = (at.batch, at.joint, spec.hidden)
            return [torch.empty(shape, dtype=at.dtype, requires_grad=True)]

        return trace(run, joint, weights, [vector, target], is_released=at.is_released)
