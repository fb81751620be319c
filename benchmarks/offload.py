"""Measure the overhead of streaming where compute can hide none of it: a step on a CPU, offloaded against resident.

    python benchmarks/offload.py [--rounds 7] [--heads 8] [--side 16]

The baseline is the same transformer with all weights resident, also recomputed. Every case has its own model with the
same weights. Each round times each case once; every other round runs in the opposite order. The result is the median of
the rounds' ratios, of wall time and of processor time, which is more reliable on a busy machine. The copies stay within
one memory, so all of them are overhead. The losses must be equal, bit for bit.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from simpletuner.base.sizes import format_size
from simpletuner.config.flavours import DEV
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.flux2.lora import attach
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import recompute
from simpletuner.train.placement import stream_blocks

CPU = torch.device("cpu")
TEXT = 64
ON: dict[str, object] = {"enable_group_offload": True}
CASES: dict[str, dict[str, object]] = {
    "resident": {},
    "blocks": ON,
    "two blocks a group": ON | {"group_offload_blocks_per_group": 2},
    "single layers": ON | {"group_offload_type": "leaf_level"},
    "blocks from disk": ON | {"group_offload_to_disk_path": "blocks"},
    "inputs on the host": {"activation_offload": True},
    "blocks, inputs on the host": ON | {"activation_offload": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--side", type=int, default=16, help="tokens along a side of the image")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simpletuner-offload-") as folder:
        steps = {
            name: step(arguments, OffloadOptions.model_validate(case), Path(folder)) for name, case in CASES.items()
        }
        losses = {name: [one(), one()] for name, one in steps.items()}  # also warms up and records the order of groups
        if any(loss != losses["resident"] for loss in losses.values()):
            raise SystemExit(f"the losses differ: {losses}")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        busy: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.rounds):
            for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
                began, began_busy = time.perf_counter(), time.process_time()
                steps[name]()
                seconds[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - began_busy)
    print("\n| case | s/step | against resident | on the processor | against resident |\n|---|---:|---:|---:|---:|")
    for name in steps:
        print(f"| {name} | {told(seconds, name)} | {told(busy, name)} |")


def told(found: Mapping[str, list[float]], name: str) -> str:
    ratio = statistics.median(a / b for a, b in zip(found[name], found["resident"], strict=True))
    return f"{statistics.median(found[name]):.3f} ({min(found[name]):.3f} to {max(found[name]):.3f}) | {ratio:.3f}"


def step(arguments: argparse.Namespace, options: OffloadOptions, folder: Path) -> Callable[[], float]:
    """A forward and backward pass that gives its loss."""
    spec = replace(
        DEV, heads=arguments.heads, head_dim=32, double_blocks=2, single_blocks=6, context_dim=64, axes=(8, 8, 8, 8)
    )
    torch.manual_seed(0)
    model = Flux2Transformer(spec).requires_grad_(False)
    attach(model, LoraOptions(lora_rank=16), seed=0)
    if options.group_offload_to_disk_path is not None:
        place = str(folder / options.group_offload_to_disk_path)
        options = options.model_copy(update={"group_offload_to_disk_path": place})
    streaming = stream_blocks(model, options, CPU)
    if streaming is not None:
        print(streaming)
    recompute.install(model.blocks, inputs=recompute.HostInputs(CPU) if options.activation_offload else None)
    model.train()
    tokens, context = torch.randn(1, arguments.side**2, 128), torch.randn(1, TEXT, spec.context_dim)
    places, ones = image_ids(arguments.side, arguments.side), torch.ones(1)
    weights = sum(parameter.nbytes for block in model.blocks for parameter in block.parameters())
    print(f"{spec.hidden} wide, {tokens.shape[1]} + {TEXT} tokens, {format_size(weights)} of weights in blocks")

    def one() -> float:
        loss = model(tokens, context, ones, ones, places, context_ids(TEXT)).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss)

    return one


if __name__ == "__main__":
    main()
