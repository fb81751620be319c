"""What training dev takes on a GPU and how long a step lasts: resident and streamed, under what smaller cards leave.

    python benchmarks/gpu/memory.py [--steps 3] [--precisions bf16,int8,int4] [--caps 22.5,14.5,10.5,7]
    python benchmarks/gpu/memory.py --tiny --device cpu          that the script itself works

dev's shapes, all 8 + 48 blocks, random weights made on the device block by block, an adapter of rank 16 on every Linear
of every block, AdamW, recomputed blocks, 1024² (4096 image and 512 text tokens), batch 1. Nothing is downloaded.
Beside torch it needs einops, jaxtyping, pydantic, safetensors, tokenizers, pillow, numpy and tqdm only, which pip takes
as wheels where there is no network. "planned" is what `simpletuner plan` expects of the GPU.
Quantised weights are random numbers in the formats of int8-quanto and int4-quanto: no library of theirs is needed.
Streamed bf16 takes 60 GiB of memory, 8 bits 30, 4 bits 15.

Each precision is held in a process of its own, in which the caps come one after the other, the largest first
(`torch.cuda.set_per_process_memory_fraction`; the CUDA context is outside of it, hence 22.5 GiB for a card of 24).
Where a cap is too small, the inputs of recomputed blocks go to the host as well, and then the ring is made one group
shorter, without a stream. The share hidden is 1 − (step − step without copies) / copies alone; without copies the
weights are of whichever group was there first, which changes no time.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import DEV, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.precision import PrecisionName
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.lora import attach
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN, context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload, recompute
from simpletuner.memory.planner import Machine
from simpletuner.memory.precision import make_room, targets

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
FORMATS: dict[str, PrecisionName] = {"int8": "int8-quanto", "int4": "int4-quanto"}
SPREAD = {"int8": 74.0, "int4": 4.6}
"""Standard deviation of an even draw of all numbers of a format."""
TINY = replace(DEV, heads=4, head_dim=32, double_blocks=2, single_blocks=6, context_dim=64, axes=(8, 8, 8, 8))
SIDE, TEXT = {True: 4, False: 64}, {True: 16, False: 512}
"""Image tokens along an edge and text tokens, of the tiny model and of dev."""
HEADS = (
    "precision",
    "weights",
    "cap",
    "inputs",
    "planned",
    "peak reserved",
    "s/step",
    "process RAM",
    "copied",
    "hidden",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precisions", default="bf16,int8,int4")
    parser.add_argument("--caps", default="22.5,14.5,10.5,7")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        measure(arguments, **json.loads(arguments.case))
        return
    name = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "CPU"
    print(f"{name}, torch {torch.__version__}\n", flush=True)
    rows: list[dict[str, str]] = []
    for precision in arguments.precisions.split(","):
        caps = [float(cap) for cap in arguments.caps.split(",")]
        if precision != "bf16":
            rows += apart(arguments, precision=precision, ring=0, caps=[])
        for ring in (2, 1):
            found = apart(arguments, precision=precision, ring=ring, caps=caps)
            rows += [row for row in found if ring == 1 or row["s/step"] != "does not fit"]
            caps = [cap for cap, row in zip(caps, found, strict=True) if row["s/step"] == "does not fit"]
            if not caps:
                break
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for row in rows:
        print("| " + " | ".join(row[head] for head in HEADS) + " |")


def apart(arguments: argparse.Namespace, **case: Any) -> list[dict[str, str]]:
    """The rows of a case, measured in a process of its own."""
    flags = ["--steps", str(arguments.steps), "--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    command = [sys.executable, __file__, *flags, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, str]] = [json.loads(line) for line in done.stdout.splitlines()]
    return rows


def measure(arguments: argparse.Namespace, precision: str, ring: int, caps: Sequence[float]) -> None:
    """Print a row for each cap; with a ring of no group, resident, the one row without a cap."""
    device = torch.device(arguments.device)
    model = transformer(TINY if arguments.tiny else DEV, precision, device, is_resident=not ring)
    streaming = None
    if ring > 0:
        streaming = offload.install(model, offload.block_groups(model.blocks), device=device, ahead=ring == 2)
    free()
    plain = [block.forward for block in model.blocks]
    for cap in caps or (None,):
        row: dict[str, str] = {}
        for goes_to_host in (False, True):
            for block, forward in zip(model.blocks, plain, strict=True):
                block.forward = forward
            inputs = recompute.HostInputs(device, ahead=ring == 2) if goes_to_host else None
            recompute.install(model.blocks, inputs=inputs)
            row = {
                "precision": precision,
                "weights": {0: "resident", 1: "streamed", 2: "streamed, ahead"}[ring],
                "cap": "none" if cap is None or device.type == "cpu" else f"{cap:g} GiB",
                "inputs": "on the host" if goes_to_host else "on the device",
                "planned": f"{planned(arguments, precision, ring, goes_to_host) / GIB:.2f} GiB",
            }
            try:
                row |= measured(model, streaming, cap, arguments, device)
            except torch.OutOfMemoryError:
                row |= dict.fromkeys(HEADS[5:], "") | {"s/step": "does not fit"}
            model.zero_grad(set_to_none=True)
            free()
            if row["s/step"] != "does not fit":
                break
        print(json.dumps(row), flush=True)


def planned(arguments: argparse.Namespace, precision: str, ring: int, goes_to_host: bool) -> int:
    """Bytes of the accelerator that `simpletuner plan` expects of this, without an autoencoder beside it."""
    config = RunConfig(
        base_model_precision=FORMATS.get(precision, "no_change"),
        enable_group_offload=ring > 0,
        group_offload_use_stream=ring == 2,
        activation_offload=goes_to_host,
        tokenizer_max_length=TEXT[arguments.tiny],
    )
    architecture = Architecture.of(config)
    if arguments.tiny:
        architecture = replace(architecture, transformer=TINY)
    edge = PIXELS_PER_TOKEN * SIDE[arguments.tiny]
    work = Workload(bucket=(edge, edge), batch=1, draws=False)
    roomy = Machine(accelerator=2**50, ram=2**50, disk=None)
    return Footprint(config, architecture, work, roomy).train().total("accelerator")


def measured(
    model: Flux2Transformer,
    streaming: offload.Streaming | None,
    cap: float | None,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, str]:
    """Memory and times of a few steps, after two that warm up and teach the ring what comes next."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if cap is None else min(1.0, cap * GIB / whole), device)
        torch.cuda.reset_peak_memory_stats(device)
    step = training(model, SIDE[arguments.tiny], TEXT[arguments.tiny], device)
    for _ in range(2):
        step()
    before = 0 if streaming is None else streaming.copied_bytes
    seconds = timed(step, arguments.steps, device)
    row = {
        "peak reserved": f"{torch.cuda.max_memory_reserved(device) / GIB:.2f} GiB" if device.type == "cuda" else "",
        "s/step": f"{seconds:.2f}",
        "process RAM": f"{resident_gib():.1f} GiB",
        "copied": "",
        "hidden": "",
    }
    if streaming is not None:
        copied = (streaming.copied_bytes - before) / arguments.steps
        row["copied"] = f"{copied / GIB:.2f} GiB/step"
        without, alone = uncopied(streaming, step, copied, arguments.steps, device)
        # On a CPU nothing runs beside anything.
        row["hidden"] = f"{1 - (seconds - without) / alone:.0%} of {alone:.2f} s" if device.type == "cuda" else ""
    return row


def uncopied(
    streaming: offload.Streaming, step: Callable[[], None], copied: float, steps: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of a step in which nothing is copied, and of as many copies as a step makes, with nothing beside."""

    def mark(group: Any) -> None:
        group.slot.holds = group

    fill = streaming._fill
    streaming._fill = mark  # type: ignore[method-assign]
    try:
        without = timed(step, steps, device)
    finally:
        streaming._fill = fill  # type: ignore[method-assign]
    for slot in streaming._slots:
        slot.holds = None
    before = streaming.copied_bytes
    began = time.perf_counter()
    for group in streaming._groups:
        fill(group)
    wait(device)
    speed = (streaming.copied_bytes - before) / (time.perf_counter() - began)
    return without, copied / speed


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """The median step's seconds."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def training(model: Flux2Transformer, side: int, text: int, device: torch.device) -> Callable[[], None]:
    """One optimiser step on a picture of side × side tokens."""
    tokens = torch.randn(1, side * side, model.spec.in_channels, device=device, dtype=torch.bfloat16)
    context = torch.randn(1, text, model.spec.context_dim, device=device, dtype=torch.bfloat16)
    ones = torch.ones(1, device=device)
    places, text_places = image_ids(side, side, device), context_ids(text, device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(tokens, context, ones, ones, places, text_places).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def transformer(spec: TransformerSpec, precision: str, device: torch.device, *, is_resident: bool) -> Flux2Transformer:
    """One of small random weights with an adapter; made on `device` a block at a time, and left there or not."""
    with torch.device("meta"):
        model = Flux2Transformer(spec).bfloat16().requires_grad_(False)
        if precision != "bf16":
            make_room(model, targets(model, BLOCKS, FORMATS[precision]), FORMATS[precision], torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    blocks = set(model.blocks)
    for part in [*model.blocks, *(child for child in model.children() if not isinstance(child, nn.ModuleList))]:
        part.to_empty(device=device)
        for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            fill(name.rpartition(".")[2], tensor, precision, generator)
        if part in blocks and not is_resident:
            part.to("cpu")
    attach(model, LoraOptions(lora_rank=16, flux_lora_target="all"), seed=0)
    return model.train()


def fill(name: str, tensor: torch.Tensor, precision: str, generator: torch.Generator) -> None:
    """Weights of about 0.02, in the one way or the other."""
    if name == "weight":
        tensor.normal_(std=0.02, generator=generator)
    elif name == "data":
        tensor.random_(generator=generator)
    else:
        scale = 0.02 / SPREAD[precision]
        tensor.fill_({"scale": scale, "shift": 7.5 * scale}[name])


def resident_gib() -> float:
    """Memory of this process, locked pages included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].removesuffix("kB")) * 1024 / GIB


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
