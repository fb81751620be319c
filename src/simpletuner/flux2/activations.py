"""Activation and gradient memory of a transformer pass, block by block, for LoRA and full training.

Each kind of block is traced once (`simpletuner.memory.trace`), and the results are added up in execution order: saved
activations accumulate in the forward pass, gradients in the backward pass. The peak is somewhere in the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.flux2.lora import LinearRange, wrap
from simpletuner.flux2.rotary import Rotary
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import DoubleBlock, OutputNorm, ReferenceAttention, SingleBlock
from simpletuner.memory import recompute
from simpletuner.memory.trace import MemoryCost, fuse_attention, on_meta_device, trace, trace_forward

Adapted = tuple[tuple[str, LinearRange], ...]
"""Adapted Linears of a block: each one's name within the block, and the rows and columns that are adapted."""


@dataclass(frozen=True)
class TransformerPass:
    """Configuration of a transformer pass: token counts, dtype, trainable parameters and recomputation."""

    spec: TransformerSpec
    dtype: torch.dtype
    """Of weights and activations."""
    batch: int
    text_tokens: int
    """Text tokens in each sample."""
    image_tokens: int
    """Image tokens in each sample."""
    is_autocast: bool = False
    """Whether each matrix product casts its weight, and autograd saves the cast copy."""
    is_full: bool = False
    """Whether all weights are trainable."""
    is_released: bool = False
    """Whether each weight's gradient is freed as soon as it is complete."""
    adapted: tuple[Adapted, ...] = ()
    """Adapted Linears of each block, double blocks first; empty if there are no adapters."""
    rank: int = 0
    dropout: float = 0.0
    recomputed: tuple[bool, ...] = ()
    """Whether each block is recomputed in the backward pass; empty if none is."""
    routes: tuple[Route, ...] = ()
    reference_tokens: int = 0
    """Reference tokens in each sample, in addition to the image tokens, padding included."""
    reference_attention: ReferenceView = "full"

    @property
    def total_tokens(self) -> int:
        """All tokens in each sample."""
        return self.text_tokens + self.image_tokens + self.reference_tokens

    @property
    def stream_bytes(self) -> int:
        """Bytes of the hidden states of image and reference tokens."""
        return self.batch * (self.image_tokens + self.reference_tokens) * self.spec.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class _Block:
    """Everything that determines a block's memory."""

    pass_: TransformerPass
    """Without per-block settings; `image_tokens` counts only the tokens that this block processes."""
    is_double: bool
    is_recomputed: bool
    is_tracked: bool
    """Whether its inputs require gradients."""
    is_routed: bool
    adapters: Adapted

    @property
    def stream_sizes(self) -> list[int]:
        """Bytes of each input tensor that blocks do not share."""
        return [
            self.pass_.batch * count * self.pass_.spec.hidden * self.pass_.dtype.itemsize
            for count in self.stream_tokens
        ]

    @property
    def stream_tokens(self) -> tuple[int, ...]:
        """Tokens of each sample in each of these tensors."""
        return (
            (self.pass_.text_tokens, self.pass_.image_tokens + self.pass_.reference_tokens)
            if self.is_double
            else (self.pass_.total_tokens,)
        )


@dataclass(frozen=True)
class Activations:
    """Peak memory of a training step in bytes, without weights and optimizer state."""

    saved: int
    """Tensors saved by autograd, of blocks whose backward pass has not run yet."""
    host_inputs: int
    """Peak of recomputed blocks' inputs in host memory. Pinned allocations are rounded up to powers of two."""
    workspace: int
    """Temporary memory of the block that is running."""
    gradients: int
    """Weight gradients that exist at the peak."""

    @property
    def total(self) -> int:
        return self.saved + self.workspace + self.gradients


IN_FLIGHT = 2
"""Offloaded block inputs that are on the accelerator at a time: the one in use and the next one."""


@lru_cache(maxsize=256)
def training(
    pass_: TransformerPass, *, offloaded: bool = False, accumulated: bool = False, shards: int = 1
) -> Activations:
    """Peak memory of a forward and backward pass.

    Args:
        offloaded: whether the inputs of recomputed blocks are in host memory.
        accumulated: whether gradients of earlier micro-batches exist already.
        shards: number of shards of each gradient. When a block's backward pass ends, a process keeps only its shard.
    """
    blocks = _blocks(pass_)
    costs = [_cost(block) for block in blocks]
    tail = _tail(replace(pass_, adapted=(), recomputed=(), routes=()))
    offloaded_bytes = [
        cost.saved if offloaded and block.is_recomputed and block.is_tracked else 0
        for block, cost in zip(blocks, costs, strict=True)
    ]
    all_gradients = -(-(tail.gradients + sum(cost.gradients for cost in costs)) // shards)

    moments: list[Activations] = []
    saved = in_flight = 0
    for index, cost in enumerate(costs):
        in_flight = sum(offloaded_bytes[max(0, index - IN_FLIGHT + 1) : index + 1])
        moments.append(Activations(saved + in_flight, 0, cost.forward, all_gradients if accumulated else 0))
        saved += cost.saved - offloaded_bytes[index]
    gradients = all_gradients if accumulated else 0
    moments.append(Activations(saved + in_flight, 0, tail.saved + tail.backward, gradients))
    gradients += 0 if accumulated else -(-tail.gradients // shards)
    for index in reversed(range(len(costs))):
        in_flight = sum(offloaded_bytes[max(0, index - IN_FLIGHT + 1) : index + 1])
        # TREAD: the gradient of all tokens, including those that bypass this block.
        bypass = pass_.stream_bytes if blocks[index].is_routed else 0
        # `backward` includes the gradients of this block's weights.
        moments.append(Activations(saved + in_flight, 0, costs[index].backward + bypass, gradients))
        saved -= costs[index].saved - offloaded_bytes[index]
        gradients += 0 if accumulated else -(-costs[index].gradients // shards)
    worst = max(moments, key=lambda moment: moment.total)
    offloaded_sizes = (block.stream_sizes for block, size in zip(blocks, offloaded_bytes, strict=True) if size)
    return replace(worst, host_inputs=sum(1 << (size - 1).bit_length() for sizes in offloaded_sizes for size in sizes))


def saved_bytes(pass_: TransformerPass) -> int:
    """Bytes that autograd saves between the forward and the backward pass, for blocks and last layers."""
    return (
        sum(_cost(block).saved for block in _blocks(pass_))
        + _tail(replace(pass_, adapted=(), recomputed=(), routes=())).saved
    )


@lru_cache(maxsize=64)
def sampling(pass_: TransformerPass) -> int:
    """Peak activation bytes of a pass without gradients."""
    blocks = _blocks(replace(pass_, recomputed=(), routes=()))
    return max(_forward(replace(block, is_tracked=False)) for block in blocks)


def _blocks(pass_: TransformerPass) -> list[_Block]:
    """Each block of the transformer, in execution order."""
    blocks = []
    is_tracked = pass_.is_full
    bare = replace(pass_, adapted=(), recomputed=(), routes=())
    for index in range(pass_.spec.blocks):
        route = next((route for route in pass_.routes if route.start <= index <= route.end), None)
        image = pass_.image_tokens if route is None else route.keeps(pass_.image_tokens)
        adapters = pass_.adapted[index] if pass_.adapted else ()
        blocks.append(
            _Block(
                pass_=replace(bare, image_tokens=image),
                is_double=index < pass_.spec.double_blocks,
                is_recomputed=bool(pass_.recomputed) and pass_.recomputed[index],
                is_tracked=is_tracked,
                is_routed=image < pass_.image_tokens,
                adapters=adapters,
            )
        )
        is_tracked = is_tracked or bool(adapters)
    return blocks


@lru_cache(maxsize=512)
def _cost(block: _Block) -> MemoryCost:
    """Memory of a block in a training step."""
    if not (block.pass_.is_full or block.adapters or block.is_tracked):
        return MemoryCost(0, _forward(block), 0, 0)
    with on_meta_device(block.pass_.dtype):
        run, streams, weights, shared = _build(block)
        cost = trace(run, streams, weights, shared, frees_gradients=block.pass_.is_released)
    copies = sum(weight.nbytes for weight in weights) if block.pass_.is_autocast else 0
    if block.is_recomputed:
        return replace(cost, backward=cost.backward + copies)
    return replace(cost, saved=cost.saved + copies)


@lru_cache(maxsize=64)
def _forward(block: _Block) -> int:
    """Peak bytes of a block's forward pass without gradients."""
    with on_meta_device(block.pass_.dtype):
        run, streams, weights, shared = _build(block)
        return trace_forward(run, streams, [*weights, *shared])


_BuiltBlock = tuple[Callable[..., Sequence[Tensor]], Callable[[], list[Tensor]], list[Tensor], list[Tensor]]
"""A function that runs the block, a function that creates its inputs, its weights, and tensors that blocks share."""


def _build(block: _Block) -> _BuiltBlock:
    """Build the module and the inputs of a block, to trace it."""
    pass_ = block.pass_
    spec, batch, dtype = pass_.spec, pass_.batch, pass_.dtype
    module: nn.Module = DoubleBlock(spec) if block.is_double else SingleBlock(spec)
    module.requires_grad_(pass_.is_full)
    for name, adapted_range in block.adapters:
        a = torch.empty(pass_.rank, adapted_range.columns[1] - adapted_range.columns[0])
        b = torch.empty(adapted_range.rows[1] - adapted_range.rows[0], pass_.rank)
        wrap(module, name, a, b, adapted_range=adapted_range, scale=1.0, dropout=pass_.dropout)
    fuse_attention(module)
    if block.is_recomputed:
        recompute.install([module])
    module.train()

    def stream(tokens: int) -> Tensor:
        return torch.empty(batch, tokens, spec.hidden, dtype=dtype, requires_grad=block.is_tracked)

    def modulation(sets: int) -> Tensor:
        return torch.empty(batch, 1, 3 * sets * spec.hidden, dtype=dtype, requires_grad=pass_.is_full)

    tables = (batch,) if block.is_routed or pass_.reference_tokens else ()
    half = (*tables, pass_.total_tokens, spec.head_dim // 2)
    angles: Rotary = (torch.empty(half, dtype=torch.float32), torch.empty(half, dtype=torch.float32))
    modulations = [modulation(2), modulation(2)] if block.is_double else [modulation(1)]

    is_isolated = pass_.reference_tokens > 0 and pass_.reference_attention == "own"
    references = ReferenceAttention(pass_.reference_tokens, is_isolated=True) if is_isolated else None

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
def _tail(pass_: TransformerPass) -> MemoryCost:
    """Memory of the output norm, the output projection and the loss."""
    spec = pass_.spec
    with on_meta_device(pass_.dtype):
        norm, out = OutputNorm(spec), nn.Linear(spec.hidden, spec.in_channels, bias=False)
        weights = [*norm.parameters(), *out.parameters()]
        for weight in weights:
            weight.requires_grad_(pass_.is_full)
        vector = torch.empty(pass_.batch, spec.hidden, dtype=pass_.dtype)
        target = torch.empty(pass_.batch, pass_.image_tokens, spec.in_channels, dtype=torch.float32)

        def run(joint: Tensor) -> Sequence[Tensor]:
            predicted = out(norm(joint[:, pass_.text_tokens : pass_.text_tokens + pass_.image_tokens], vector))
            return ((predicted.float() - target).square().mean(),)

        def joint() -> list[Tensor]:
            shape = (pass_.batch, pass_.total_tokens, spec.hidden)
            return [torch.empty(shape, dtype=pass_.dtype, requires_grad=True)]

        return trace(run, joint, weights, [vector, target], frees_gradients=pass_.is_released)
