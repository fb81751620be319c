"""What TREAD saves on a GPU: the transformer's forward and backward at dev's size, by ratio and resolution.

    python benchmarks/gpu/tread.py [--rounds 5] [--doubles 8 --singles 48] [--no-recompute]

Weights are drawn on the GPU in bf16, since their values change no time: nothing is downloaded. dev's take 60 GiB, so
all of it needs 80 GB; `--doubles 2 --singles 12` fits where that is not there, and has the same ratios but for the two
blocks outside the route at the start and the one at the end. Blocks are recomputed, as in training by default. Every
round times each case once; the median over the rounds counts, after one round that does not.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from simpletuner.config.flavours import DEV, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN, context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute

TEXT = 512
START, FROM_END = 2, 2
RATIOS = (0.25, 0.5, 0.75)
SIDES = (512, 768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--doubles", type=int, default=DEV.double_blocks)
    parser.add_argument("--singles", type=int, default=DEV.single_blocks)
    parser.add_argument("--heads", type=int, default=DEV.heads)
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    spec = replace(
        DEV, heads=arguments.heads, double_blocks=arguments.doubles, single_blocks=arguments.singles, context_dim=1024
    )
    model = transformer(spec, device)
    if not arguments.no_recompute:
        recompute.install(model.blocks)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}: {spec.double_blocks} + {spec.single_blocks} blocks, {spec.hidden} wide")

    cases = [(side, kept) for side in SIDES for kept in (1.0, *RATIOS)]
    seconds: dict[tuple[int, float], list[float]] = {case: [] for case in cases}
    memory: dict[tuple[int, float], float] = {}
    for number in range(arguments.rounds + 1):
        for case in cases if number % 2 == 0 else reversed(cases):
            took, memory[case] = one_pass(model, *case, device)
            if number:
                seconds[case].append(took)
    print("\n| resolution | image tokens | without | " + " | ".join(f"ratio {kept}" for kept in RATIOS) + " |")
    print("|---|---:|---:|" + "---:|" * len(RATIOS))
    for side in SIDES:
        plain = statistics.median(seconds[side, 1.0])
        cells = [f"{plain * 1000:.0f} ms, {memory[side, 1.0]:.1f} GiB"]
        for kept in RATIOS:
            routed = statistics.median(seconds[side, kept])
            cells.append(f"{routed * 1000:.0f} ms, {memory[side, kept]:.1f} GiB, {plain / routed:.2f} ×")
        print(f"| {side}² | {(side // PIXELS_PER_TOKEN) ** 2} | {' | '.join(cells)} |")


def transformer(spec: TransformerSpec, device: torch.device) -> Flux2Transformer:
    """A bf16 transformer of small random weights, with an adapter of rank 16 on every Linear of every block."""
    with torch.device("meta"):
        model = Flux2Transformer(spec)
    model = model.bfloat16().to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=generator)
    attach(model, LoraOptions(lora_rank=16), seed=0)
    return model.train()


def one_pass(model: Flux2Transformer, side: int, kept: float, device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of one forward and backward, the choice of tokens included, as in training."""
    grid = side // PIXELS_PER_TOKEN
    tokens = torch.randn(1, grid * grid, 128, device=device, dtype=torch.bfloat16)
    context = torch.randn(1, TEXT, model.spec.context_dim, device=device, dtype=torch.bfloat16)
    ones = torch.ones(1, device=device)
    places, text_places = image_ids(grid, grid, device), context_ids(TEXT, device)
    route = Route(START, model.spec.blocks - FROM_END, kept)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    choices = draw_choices([route], seed=0, step=0, slots=[0], tokens=grid * grid)
    moved = [choice.to(device) for choice in choices]
    model(tokens, context, ones, ones, places, text_places, moved).float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return seconds, peak


if __name__ == "__main__":
    main()
