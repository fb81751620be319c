"""A trial of context parallelism: is it exact, how much memory does a process take, and how much does it send?

    torchrun --standalone --nproc-per-node=2 benchmarks/context_parallel.py     # exactness and bytes, on CPUs
    python benchmarks/context_parallel.py                                       # the published models, by shapes alone

DeepSpeed Ulysses (arXiv 2309.14509) around the program's own transformer, which is not changed: each process has some
of the tokens of every sample. Before attention, an all-to-all turns some tokens of all heads into all tokens of some
heads; after it, another turns the result back. Each process gathers the whole velocity and computes the same loss from
it. Its gradients of the weights are those of its own tokens; their sum over the processes is the gradient.

- **off by**: loss and gradients in fp32 against the same pass in one process: the largest difference of a number,
  relative to the largest number of its tensor. Limit: 5e-6. Cases: references, padded or not; token counts that the
  number of processes does not divide; recomputed blocks; a sharded base; all weights.
- **peak**: the most bytes of tensors that exist at one time during a forward and backward pass, in the process with the
  most, and in a single process. Weights do not count, except those that FSDP2 gathers.
- **sent**: bytes that a process sends to others in that pass, and those of the formula, which counts attention alone.
- **published models**: the memory plan's own trace of a step, with the all-to-alls in its blocks.

The number of processes must divide the number of heads. Why the program has no context parallelism:
docs/decisions/0031-context-parallel.md.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist

from many_gpus import adapted, base
from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import DEV, KLEIN_4B, KLEIN_9B, TransformerSpec
from simpletuner.config.run import RunConfig
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flow.loss import flow_loss, squared
from simpletuner.flux2 import transformer as model
from simpletuner.flux2.activations import training
from simpletuner.flux2.arithmetic import training_flop
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.rotary import Rotary
from simpletuner.flux2.transformer import Flux2Transformer, ReferenceAttention, attend
from simpletuner.memory import recompute
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.rendezvous import join
from simpletuner.memory.shard import Sharding, shard
from simpletuner.memory.trace import Ledger
from simpletuner.memory.world import World

TIMEOUT_S = 300.0
LIMIT = 5e-6
"""Limit of the relative difference of a loss or a gradient in fp32."""
SIZES = ((1024, 0), (2048, 0), (2048, 4 * 4096), (2048, 10 * 4096))
"""Edge of an image in pixels, and number of its reference tokens (4,096 for each reference). FLUX.2 generates up to 4
megapixels.
"""
RANKS = (2, 4, 8)
"""Numbers of processes that share a sample."""


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass
class TokenSplit:
    """The tokens of a pass, split over ranks: each rank has an even share of the text, of the target and of the
    references.
    """

    text: int
    image: int
    """Number of tokens of the target."""
    references: ReferenceAttention | None
    rank: int
    size: int
    sent: int = 0
    """Bytes that this rank has sent to others."""

    def places(self, rank: int) -> Tensor:
        """Positions of the tokens of `rank` in the whole sequence."""
        lengths = (self.text, self.image, 0 if self.references is None else self.references.length)
        parts = torch.arange(sum(lengths)).split(lengths)
        return torch.cat([part.tensor_split(self.size)[rank] for part in parts])

    @cached_property
    def counts(self) -> list[int]:
        """Number of tokens of each rank."""
        return [len(self.places(rank)) for rank in range(self.size)]

    @cached_property
    def order(self) -> Tensor:
        """The positions of all ranks' tokens, rank by rank."""
        return torch.cat([self.places(rank) for rank in range(self.size)])

    def own(self, first: int, last: int) -> Tensor:
        """This rank's positions between `first` and `last`, counted from `first`."""
        places = self.places(self.rank)
        return places[(places >= first) & (places < last)] - first

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the next `sent[r]` rows of `x` to each rank r, and receive `received[r]` rows from it."""
        out = x.new_empty(sum(received), *x.shape[1:])
        self.sent += (len(x) - sent[self.rank]) * (x[:1].numel() * x.itemsize)
        if not x.is_meta:
            dist.all_to_all_single(out, x.contiguous(), list(received), list(sent))
        return out


class _Exchanged(torch.autograd.Function):
    """An all-to-all whose backward pass sends the gradient the opposite way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit, sent: list[int], received: list[int]) -> Tensor:
        ctx.split, ctx.way = split, (sent, received)
        return split.all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.way
        return ctx.split.all_to_all(gradients[0], received, sent), None, None, None


class _Gathered(torch.autograd.Function):
    """Gather the whole velocity on every rank. All ranks compute the same loss from it, so the gradient needs no
    communication.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit) -> Tensor:
        ctx.own = split.own(split.text, split.text + split.image)
        targets = [len(part) for part in torch.arange(split.image).tensor_split(split.size)]
        rows = rearrange(x, "b n c -> n b c").repeat(split.size, 1, 1)
        whole = split.all_to_all(rows, [x.shape[1]] * split.size, targets)
        return rearrange(whole, "n b c -> b n c")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0][:, ctx.own], None


def attend_split(
    split: TokenSplit,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: Rotary,
    references: ReferenceAttention | None = None,  # noqa: ARG001  those of this rank; the whole ones are in `split`
) -> Tensor:
    """`attend` from this rank's tokens to those of all ranks. `angles` are those of the whole sequence."""
    own = [split.counts[split.rank]] * split.size
    if query.is_meta:  # the memory plan traces with this rank's angles only
        cos, sin = (table.new_empty(sum(split.counts), table.shape[-1]) for table in angles)
        angles = cos, sin

    def to_heads(x: Tensor) -> Tensor:
        rows = rearrange(x, "b n (ranks heads) d -> (ranks n) b heads d", ranks=split.size)
        whole: Tensor = _Exchanged.apply(rows, split, own, split.counts)  # type: ignore[no-untyped-call]
        return rearrange(whole[split.order.argsort()], "n b heads d -> b n heads d")

    out = attend(to_heads(query), to_heads(key), to_heads(value), angles, split.references)
    rows = rearrange(out, "b n width -> n b width")[split.order]
    back: Tensor = _Exchanged.apply(rows, split, split.counts, own)  # type: ignore[no-untyped-call]
    return rearrange(back, "(ranks n) b width -> b n (ranks width)", ranks=split.size)


@contextlib.contextmanager
def attending(split: TokenSplit | None) -> Iterator[None]:
    """A context in which the transformer's blocks attend across ranks, also in recompute."""
    model.attend = attend if split is None else functools.partial(attend_split, split)
    try:
        yield
    finally:
        model.attend = attend


class SplitTransformer:
    """The transformer as a `Denoiser` calls it: takes whole samples and returns the whole velocity on every rank."""

    def __init__(self, transformer: Flux2Transformer, split: TokenSplit) -> None:
        self.transformer, self.split = transformer, split
        self.spec, self.dtype = transformer.spec, transformer.dtype

    def __call__(
        self,
        tokens: Tensor,
        context: Tensor,
        sigma: Tensor,
        guidance: Tensor | None,
        position_ids: Tensor,
        context_ids: Tensor,
        choices: Sequence[Any],
        angles: Rotary,
        references: ReferenceAttention | None,
    ) -> Tensor:
        split, end = self.split, context.shape[1] + tokens.shape[1]
        if choices:
            raise ValueError("TREAD keeps other numbers of tokens on each rank")
        tokens = tokens[:, split.own(split.text, end)]
        context = context[:, split.own(0, split.text)]
        if references is not None:
            references = references._replace(length=len(split.own(split.text + split.image, end)))
        velocity = self.transformer(tokens, context, sigma, guidance, position_ids, context_ids, (), angles, references)
        whole: Tensor = _Gathered.apply(velocity, split)  # type: ignore[no-untyped-call]
        return whole


# --- exactness and bytes, on CPUs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pass through a small transformer."""

    name: str
    size: tuple[int, int] = (16, 16)
    """Height and width of the latents."""
    text: int = 64
    references: tuple[int, ...] = ()
    """Reference tokens of each sample; shorter ones are padded."""
    is_own: bool = False
    """Whether references attend only to references."""
    is_recomputed: bool = False
    is_full: bool = False
    is_sharded: bool = False
    """Whether the base of the split pass is sharded over the same ranks (FSDP2)."""

    @property
    def batch(self) -> int:
        return max(1, len(self.references))


CASES = (
    Case("a LoRA"),
    Case("255 image and 61 text tokens", (15, 17), 61),
    Case("recomputed blocks", is_recomputed=True),
    Case("a sharded base", is_recomputed=True, is_sharded=True),
    Case("references, padded", references=(48, 33)),
    Case("references, none in a sample", references=(0, 35)),
    Case("references that see their own", references=(48, 33), is_own=True, is_recomputed=True),
    Case("all weights", is_full=True),
)


@dataclass(frozen=True)
class PassResult:
    loss: Tensor
    gradients: list[Tensor]
    peak: int
    """Bytes without weights."""


def one_pass(case: Case, split: TokenSplit | None, device: torch.device) -> PassResult:
    """Loss and gradients of `case`, computed from the same numbers on every rank. With `split` the ranks share the
    tokens.
    """
    transformer = base()
    if case.is_sharded and split is not None:
        shard(transformer, transformer.blocks, Sharding(device))
    if case.is_full:
        parameters: Sequence[nn.Parameter] = list(transformer.requires_grad_(True).parameters())
    else:
        parameters = adapted(transformer)[0].parameters()
    torch.manual_seed(1)
    for parameter in () if case.is_full else parameters:  # an adapter of zeros has gradients of zeros
        nn.init.normal_(parameter, std=0.05)
    if case.is_recomputed:
        recompute.install(transformer.blocks, draws=False)
    latents, noise = (torch.randn(case.batch, 128, *case.size) for _ in range(2))
    context = TextContext.dense(torch.randn(case.batch, case.text, transformer.spec.context_dim))
    condition = Condition.at(context, 1.0, references_of(case))
    sigma = torch.full((case.batch,), 0.4)
    denoise = Denoiser(
        transformer if split is None else SplitTransformer(transformer, split),  # type: ignore[arg-type]
        "own" if case.is_own else "full",
    )
    with attending(split), Ledger(transformer.parameters()) as ledger:
        loss = flow_loss(denoise, latents, condition, sigma=sigma, noise=noise, penalty=squared).mean()
        loss.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return PassResult(loss.detach(), gradients, ledger.peak)


def references_of(case: Case) -> References | None:
    """Random references, each a row of tokens."""
    generator = torch.Generator().manual_seed(2)
    each = []
    for length in case.references:
        ids = torch.zeros(1, length, 4, dtype=torch.int64)
        ids[..., 0], ids[..., 2] = 10, torch.arange(length)
        each.append(References(torch.randn(1, length, 128, generator=generator), ids))
    return References.stacked(each, [1] * len(each)) if each else None


def split_of(case: Case, world: World) -> TokenSplit:
    """The split of the tokens of `case` over `world`."""
    found, references = references_of(case), None
    if found is not None:
        references = ReferenceAttention(found.tokens.shape[1], found.is_token, case.is_own)
    return TokenSplit(case.text, case.size[0] * case.size[1], references, world.rank, world.size)


def compare(world: World, cases: Sequence[Case]) -> None:
    """Print a row for each case; every rank calls it."""
    spec = base().spec
    for case in cases:
        alone = one_pass(case, None, world.device)
        split = split_of(case, world)
        shared = one_pass(case, split, world.device)
        world.sum_(shared.gradients)
        pairs = zip(alone.gradients, shared.gradients, strict=True)
        gradients = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
        loss = abs(float((shared.loss - alone.loss) / alone.loss))
        peak, sent = (max(world.gather_json(number)) for number in (shared.peak, split.sent))
        passes = 3 if case.is_recomputed else 2
        formula = attention_bytes(spec, case.batch * max(split.counts), world.size, 4, passes)
        if world.is_main:
            print(
                f"{case.name:<30} off by: loss {loss:.1e}, gradients {gradients:.1e}; peak {peak / 2**20:5.1f} of "
                f"{alone.peak / 2**20:5.1f} MiB, {peak / alone.peak:.3f}; sent {sent / 2**20:6.2f} MiB, formula "
                f"{formula / 2**20:6.2f}",
                flush=True,
            )
        if not max(loss, gradients) <= LIMIT:
            raise SystemExit(f"{case.name}: off by {max(loss, gradients):.1e}, more than {LIMIT:.0e}")


def attention_bytes(spec: TransformerSpec, tokens: int, size: int, itemsize: int, passes: int) -> int:
    """Bytes that a process with `tokens` tokens sends to others in the all-to-alls of a step: the queries, keys, values
    and results of each block, in each of the `passes` (forward, backward and recompute).
    """
    return passes * spec.blocks * 4 * tokens * spec.hidden * itemsize * (size - 1) // size


# --- the published models, by shapes alone ----------------------------------------------------------------------------


def published() -> None:
    """Print a row for each model, size of images and number of reference tokens."""
    print(
        "A LoRA of rank 16, all blocks recomputed, bf16, one image, 512 text tokens. Activations of a process in GiB,"
    )
    print("alone / with activation_offload / shared by 2, 4, 8 (GB that each sends); PFLOP of the step")
    for name, spec in (("dev", DEV), ("klein-9b", KLEIN_9B), ("klein-4b", KLEIN_4B)):
        config = RunConfig.model_validate({"model_type": "lora"})
        architecture = replace(Architecture.of(config), transformer=spec)
        for side, references in SIZES:
            footprint = Footprint(
                config, architecture, Workload((side, side), 1, samples_images=False), MachineMemory(None, 0, None)
            )
            whole = footprint.transformer_pass((side, side), 1, references)
            cells = [f"{training(whole).total / GIB:.2f}", f"{training(whole, offloaded=True).total / GIB:.2f}"]
            for size in RANKS:
                split = TokenSplit(whole.text_tokens, whole.image_tokens, ReferenceAttention(references), 0, size)
                own = replace(
                    whole,
                    text_tokens=whole.text_tokens // size,
                    image_tokens=whole.image_tokens // size,
                    reference_tokens=references // size,
                )
                with attending(split):
                    part = training(own).total
                sent = attention_bytes(spec, own.total_tokens, size, whole.dtype.itemsize, passes=3)
                cells.append(f"{part / GIB:.2f} ({sent / 1e9:.1f})")
            flop = training_flop(whole).hardware / 1e15
            print(f"{name}, {side}x{side}, {references} reference tokens: {' / '.join(cells)}; {flop:.2f}", flush=True)


def main() -> None:
    """Compare if there are several processes; otherwise describe the published models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="compare only this case; may be repeated")
    given = parser.parse_args().case or names
    torch.set_num_threads(1)
    world = join(os.environ, TIMEOUT_S)
    if world.is_alone:
        published()
    else:
        compare(world, [case for case in CASES if case.name in given])


if __name__ == "__main__":
    main()
