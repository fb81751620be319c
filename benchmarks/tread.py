"""Measure what TREAD saves: forward and backward pass of the transformer with and without routes, in interleaved pairs.

    python benchmarks/tread.py [--rounds 3] [--heads 2] [--only-contract]

A transformer of dev's depth (8 double and 48 single blocks) that is narrow enough for a CPU, with an adapter on every
Linear and 512 text tokens. Route: blocks 2 to -2. First 1024² at ratio 0.5, compared with the speedup that the blocks
themselves allow: the times of one double and one single block alone, with all tokens and with the kept ones, multiplied
by their numbers. Then a table by ratio and resolution. Every round times each case once, so that a change in the
machine's speed affects all of them; the median over the rounds counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.lora import attach
from simpletuner.flux2.rotary import rotary
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN, context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices

TEXT = 512
START, END, BLOCKS = 2, 54, 56
RATIOS = (0.25, 0.5, 0.75)
SIDES = (512, 768, 1024)
LEAST_SHARE, LEAST_GAIN = 0.85, 1.5

Name = TypeVar("Name")
Case = tuple[int, float]
"""Edge of the image in pixels, and share of its tokens that is kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2, help="attention heads of 32 channels each")
    parser.add_argument("--only-contract", action="store_true", help="only 1024² at ratio 0.5, no table")
    arguments = parser.parse_args()
    model = transformer(arguments.heads)

    contract = timed(
        {
            "all tokens": lambda: whole_pass(model, (1024, 1.0)),
            "half": lambda: whole_pass(model, (1024, 0.5)),
            "blocks, all tokens": lambda: blocks_alone(model, 1024, 1.0),
            "blocks, half": lambda: blocks_alone(model, 1024, 0.5),
        },
        arguments.rounds,
    )
    gain = ratio(contract["all tokens"], contract["half"])
    allowed = ratio(contract["blocks, all tokens"], contract["blocks, half"])
    share = (gain - 1) / (allowed - 1)
    print(f"1024², ratio 0.5: {spread(contract['all tokens'])} without, {spread(contract['half'])} with TREAD")
    print(f"the blocks alone: {spread(contract['blocks, all tokens'])} and {spread(contract['blocks, half'])}")
    print(f"{gain:.2f} times as fast (at least {LEAST_GAIN}); the blocks allow {allowed:.2f}")
    print(f"{share:.0%} of the gain that the blocks allow (at least {LEAST_SHARE:.0%})")
    if arguments.only_contract:
        return

    cases: list[Case] = [(side, share) for side in SIDES for share in (1.0, *RATIOS)]
    table = timed({case: partial(whole_pass, model, case) for case in cases}, arguments.rounds)
    print("\n| resolution | image tokens | without | " + " | ".join(f"ratio {kept}" for kept in RATIOS) + " |")
    print("|---|---:|---:|" + "---:|" * len(RATIOS))
    for side in SIDES:
        plain = table[side, 1.0]
        cells = [f"{statistics.median(table[side, k]):.2f} s, {ratio(plain, table[side, k]):.2f} ×" for k in RATIOS]
        print(f"| {side}² | {tokens_of(side)} | {statistics.median(plain):.2f} s | {' | '.join(cells)} |")


def tokens_of(side: int) -> int:
    return (side // PIXELS_PER_TOKEN) ** 2


def timed(cases: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of each case in each round. Every other round runs in the opposite order."""
    found: dict[Name, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            found[name].append(cases[name]())
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def transformer(heads: int) -> Flux2Transformer:
    """dev's depth, `heads` × 32 wide, with an adapter on every Linear of every block."""
    spec = TransformerSpec(
        heads=heads,
        head_dim=32,
        double_blocks=8,
        single_blocks=48,
        context_dim=64,
        guidance_embeds=True,
        axes=(8, 8, 8, 8),
    )
    torch.manual_seed(0)
    model = Flux2Transformer(spec).requires_grad_(False)
    attach(model, LoraOptions(lora_rank=4), seed=0)
    return model.train()


def whole_pass(model: Flux2Transformer, case: Case) -> float:
    """Seconds of one forward and backward of the whole transformer, choices drawn in between as in training."""
    side, kept = case
    tokens, ones = tokens_of(side), torch.ones(1)
    x, context = torch.randn(1, tokens, 128), torch.randn(1, TEXT, model.spec.context_dim)
    ids = image_ids(side // PIXELS_PER_TOKEN, side // PIXELS_PER_TOKEN)
    began = time.perf_counter()
    choices = draw_choices([Route(START, END, kept)], seed=0, step=0, slots=[0], tokens=tokens)
    model(x, context, ones, ones, ids, context_ids(TEXT), choices).square().mean().backward()
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds


def blocks_alone(model: Flux2Transformer, side: int, kept: float) -> float:
    """Seconds of all blocks alone: those of the route with the kept tokens, the others with all. Each kind of block is
    timed by itself."""
    tokens = tokens_of(side)
    inside = Route(START, END, kept).keeps(tokens)
    doubles = model.spec.double_blocks
    routed_doubles = doubles - START
    routed_singles = END + 1 - doubles
    return (
        START * block_alone(model, 0, tokens)
        + routed_doubles * block_alone(model, 0, inside)
        + routed_singles * block_alone(model, doubles, inside)
        + (BLOCKS - END - 1) * block_alone(model, doubles, tokens)
    )


def block_alone(model: Flux2Transformer, index: int, tokens: int) -> float:
    """Seconds of one forward and backward pass of one block: the better of two, because the first may warm up."""
    hidden = model.spec.hidden
    side = int(tokens**0.5) + 1
    ids = torch.cat([context_ids(TEXT), image_ids(side, side)[:tokens]])
    angles = rotary(ids, model.spec.axes, model.spec.theta)
    seconds = []
    for _ in range(2):
        text, image = (torch.randn(1, n, hidden, requires_grad=True) for n in (TEXT, tokens))
        began = time.perf_counter()
        if index < model.spec.double_blocks:
            modulation = torch.ones(1, 1, 6 * hidden)
            text, image = model.blocks[index](text, image, modulation, modulation, angles)
            loss = text.mean() + image.mean()
        else:
            loss = model.blocks[index](torch.cat([text, image], dim=1), torch.ones(1, 1, 3 * hidden), angles).mean()
        loss.backward()
        seconds.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return min(seconds)


if __name__ == "__main__":
    main()
