"""Measure the cost of several processes: processor time of a step against a bare loop, the base's memory, collectives.

    python benchmarks/many_gpus.py [--ranks 2] [--rounds 8] [--steps 4] [--json FILE]

A FLUX.2 transformer with random weights, 5 blocks of width 256, fp32, with a LoRA of rank 16 on every Linear; the same
batches, held in memory, two micro-batches a process and step. Processes run on this machine's CPUs over gloo, with one
thread each. Both loops run in the same processes and alternate every `--steps` steps; every other round runs them in
the opposite order. A ratio is the median over rounds of ours / bare, each the processor time of all processes
(`time.process_time`: waiting for another process costs none).

- **one process**: the program's `Stepper` against forward, backward, clip and AdamW written out.
- **DDP**: the program's `Stepper` on several processes against torch's DistributedDataParallel over the same modules,
  with `no_sync` for all micro-batches except the last. Limit: 5 %.
- **FSDP2**: the same with a sharded base, against the program's DDP; and the bytes of the base that a process holds
  between steps, compared with the whole base.
- **ZeRO** 1, 2, 3, if DeepSpeed is installed: the program's `Stepper` under each of its stages against the bare loop
  over the same modules: its engine's forward, backward and step, its clipping, torch's AdamW. Limit: 5 %.
- **collectives**: calls of torch.distributed in a step, by kind.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

LIMIT = 1.05
WARM_UP = 2
MICRO_BATCHES, BATCH, SIDE, TEXT = 2, 1, 16, 64
"""Micro-batches per process and step, samples per micro-batch, tokens per edge of an image, text tokens."""
TIMEOUT_S = 120.0


Loop = Callable[[], None]
"""Makes one training step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of each loop in a round")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--in-rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_rank:
        measure(given.rounds, given.steps)
        return
    rows = []
    for size in (1, given.ranks):
        for row in started(size, given.rounds, given.steps):
            rows.append(row)
            print(text(row), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def text(row: dict[str, Any]) -> str:
    """A row as text."""
    if row["kind"] == "step":
        limit = f" (limit {row['limit']})" if row["limit"] else ""
        return (
            f"{row['name']:<28} {row['ours_s']:.4f} s/step of the processors, {row['against']} {row['other_s']:.4f}; "
            f"median ratio {row['ratio']:.3f}, {row['least']:.3f}–{row['most']:.3f}{limit}"
        )
    if row["kind"] == "memory":
        whole, held = row["whole_bytes"] / 2**20, row["held_bytes"] / 2**20
        return f"{row['name']:<28} {held:.2f} of {whole:.2f} MiB of the base a process: {row['share']:.3f}"
    calls = ", ".join(f"{count:g} {name}" for name, count in row["calls"].items()) or "none"
    return f"{row['name']:<28} {calls}"


def started(size: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The rows that rank 0 of `size` ranks measures."""
    from simpletuner.runs.ranks import RANKS_FOLDER

    command = [sys.executable, "-P", __file__, "--in-rank", f"--rounds={rounds}", f"--steps={steps}"]
    with tempfile.TemporaryDirectory(prefix="simpletuner-ranks-") as folder:
        own = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), RANKS_FOLDER: folder, "OMP_NUM_THREADS": "1"}
        if size == 1:
            own.pop(RANKS_FOLDER)
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        answers = [process.communicate()[0] for process in processes]
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise SystemExit(f"ranks {failed} failed; what they said is above")
    return [json.loads(line) for line in answers[0].splitlines() if line.startswith("{")]


def measure(rounds: int, steps: int) -> None:
    """Print this world's rows; every rank calls it."""
    import torch

    from simpletuner.memory.rendezvous import join

    torch.set_num_threads(1)
    world = join(os.environ, TIMEOUT_S)

    def report(**row: Any) -> None:
        if world.is_main:
            print(json.dumps(row), flush=True)

    if world.is_alone:
        report(**compared("one process", program(world), "a bare loop", bare(world), rounds, steps, world))
        return
    name = f"{world.size} processes"
    ddp = program(world)
    report(**compared(f"{name}, DDP", ddp, "torch's DDP", bare(world), rounds, steps, world, limit=LIMIT))
    report(kind="collectives", name=f"{name}, DDP", calls=collectives(ddp, steps))
    report(kind="collectives", name=f"{name}, torch's DDP", calls=collectives(bare(world), steps))
    fsdp, held, whole = sharded(world)
    report(**compared(f"{name}, FSDP2", fsdp, "our DDP", ddp, rounds, steps, world))
    report(kind="collectives", name=f"{name}, FSDP2", calls=collectives(fsdp, steps))
    report(kind="memory", name=f"{name}, FSDP2", held_bytes=held, whole_bytes=whole, share=held / whole)
    if importlib.util.find_spec("deepspeed") is None:
        return
    for stage in (1, 2, 3):
        zero, label = zero_program(world, stage), f"{name}, ZeRO {stage}"
        engine = bare_zero(world, stage)
        report(**compared(label, zero, "DeepSpeed's loop", engine, rounds, steps, world, limit=LIMIT))
        report(kind="collectives", name=label, calls=collectives(zero, steps))
        report(kind="collectives", name=f"{name}, bare ZeRO {stage}", calls=collectives(engine, steps))


def compared(
    name: str, ours: Loop, against: str, other: Loop, rounds: int, steps: int, world: Any, *, limit: float | None = None
) -> dict[str, Any]:
    """A row with the processor seconds of a step of two loops that alternate."""
    for loop in (ours, other):
        timed(loop, WARM_UP, world)
    seconds: dict[str, list[float]] = {"ours": [], "other": []}
    sides = {"ours": ours, "other": other}
    for number in range(rounds):
        for side in ("ours", "other") if number % 2 == 0 else ("other", "ours"):
            seconds[side].append(timed(sides[side], steps, world))
    ratios = [one / two for one, two in zip(seconds["ours"], seconds["other"], strict=True)]
    return {
        "kind": "step",
        "name": name,
        "against": against,
        "ours_s": statistics.median(seconds["ours"]),
        "other_s": statistics.median(seconds["other"]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "limit": limit,
    }


def timed(loop: Loop, steps: int, world: Any) -> float:
    """Processor seconds of a step, summed over all ranks."""
    world.gather_json(None)
    began = time.process_time()
    for _ in range(steps):
        loop()
    took = time.process_time() - began
    return math.fsum(world.gather_json(took)) / steps


def base() -> Any:
    """A frozen transformer of random weights, the same on every rank."""
    import torch

    from simpletuner.config.flavours import DEV
    from simpletuner.flux2.transformer import Flux2Transformer

    spec = replace(DEV, heads=4, head_dim=64, double_blocks=1, single_blocks=4, context_dim=256, axes=(16, 16, 16, 16))
    torch.manual_seed(0)
    return Flux2Transformer(spec).requires_grad_(False).train()


def adapted(transformer: Any) -> tuple[Any, Any]:
    """A new adapter on a transformer, and the options of both."""
    from simpletuner.config.run import RunConfig
    from simpletuner.flux2.lora import attach

    config = RunConfig(lora_rank=16, flux_lora_target="all", learning_rate=1e-4)
    return attach(transformer, config, seed=0), config


def batches(transformer: Any, world: Any) -> list[Any]:
    """This rank's micro-batches of a step."""
    import torch

    from simpletuner.data.batch import Batch
    from simpletuner.flow.condition import Condition, TextContext

    made = []
    for number in range(MICRO_BATCHES):
        place = number * world.size + world.rank
        generator = torch.Generator().manual_seed(place)
        latents, noise = (torch.randn(BATCH, 128, SIDE, SIDE, generator=generator) for _ in range(2))
        rows = torch.randn(TEXT, transformer.spec.context_dim, generator=generator)
        slots = range(place * BATCH, (place + 1) * BATCH)
        made.append(
            Batch(
                latents=latents,
                condition=Condition.at(TextContext(rows, torch.arange(TEXT).expand(BATCH, -1)), 1.0),
                sigma=torch.linspace(0.3, 0.7, BATCH),
                noise=noise,
                names=tuple(f"random/{slot}" for slot in slots),
                weights=torch.ones(BATCH),
                slots=slots,
            )
        )
    return made


def program(world: Any) -> Loop:
    """The program's own step."""
    return stepping(base(), world)


def zero_program(world: Any, stage: int) -> Loop:
    """The program's step under DeepSpeed."""
    return stepping(base(), world, stage)


def stepping(transformer: Any, world: Any, zero_stage: int = 0) -> Loop:
    """The program's step on an adapter of `transformer`."""
    import torch

    from simpletuner.data.batch import GlobalBatch
    from simpletuner.flux2.denoiser import Denoiser
    from simpletuner.memory.zero import ZeroShards, engine_settings
    from simpletuner.train import optim
    from simpletuner.train.step import Objective, Stepper

    adapter, config = adapted(transformer)
    forward = None
    if zero_stage:
        settings = engine_settings({"stage": zero_stage}, torch.float32, BATCH)
        adapter.masters = zero = ZeroShards(transformer, adapter.weights, settings, world)
        forward = zero.forward
    stepper = Stepper(
        denoise=Denoiser(transformer, forward=forward),
        parameters=adapter.parameters(),
        optimizer=optim.build(adapter.parameters(), config),
        options=config,
        objective=Objective.of(config, config, 0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        masters=adapter.masters,
        world=None if world.is_alone else world,
    )
    own = tuple(batches(transformer, world))
    size = MICRO_BATCHES * BATCH * world.size
    names = tuple(f"random/{slot}" for slot in range(size))

    def step() -> None:
        stepper(GlobalBatch(1, 0, own, size, names), config.learning_rate)

    return step


def bare(world: Any) -> Loop:
    """The same step over the same modules written out, in torch's DistributedDataParallel on several ranks."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from simpletuner.flow.loss import flow_loss, squared
    from simpletuner.flux2.denoiser import Denoiser

    transformer = base()
    adapter, config = adapted(transformer)
    parameters = adapter.parameters()
    denoise = Denoiser(transformer)

    class Losses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, batch: Any) -> torch.Tensor:
            return flow_loss(
                denoise, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise, penalty=squared
            )

    module: torch.nn.Module = Losses()
    without_sync: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if not world.is_alone:
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        module, without_sync = wrapped, wrapped.no_sync
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    own = batches(transformer, world)

    def step() -> None:
        for batch in own[:-1]:
            with without_sync():
                (module(batch).sum() / (MICRO_BATCHES * BATCH)).backward()
        losses = module(own[-1])
        (losses.sum() / (MICRO_BATCHES * BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        losses.tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_zero(world: Any, stage: int) -> Loop:
    """The same step over the same modules in DeepSpeed's engine, written out."""
    import deepspeed
    import torch

    from simpletuner.flow.loss import flow_loss, squared
    from simpletuner.flux2.denoiser import Denoiser

    transformer = base()
    adapter, config = adapted(transformer)
    parameters = adapter.parameters()
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=transformer,
        model_parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True),
        config=settings,
    )
    denoise = Denoiser(transformer, forward=engine)
    own = batches(transformer, world)

    def step() -> None:
        device_losses = []
        for batch in own:
            losses = flow_loss(
                denoise, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise, penalty=squared
            )
            engine.backward(losses.sum() / BATCH)
            engine.step()
            device_losses.append(losses.detach())
        torch.cat(device_losses).tolist()

    return step


def sharded(world: Any) -> tuple[Loop, int, int]:
    """The program's step with the base sharded; bytes of the base that this rank holds, and of the whole base."""
    from simpletuner.memory.shard import Sharding, local_bytes, shard

    transformer = base()
    whole = sum(parameter.nbytes for parameter in transformer.parameters())
    shard(transformer, transformer.blocks, Sharding(world.device))
    held = local_bytes(transformer.parameters())  # before an adapter is among them
    return stepping(transformer, world), held, whole


def collectives(loop: Loop, steps: int) -> dict[str, float]:
    """Calls in a step, by kind."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            loop()
    calls = {event.key.removeprefix("gloo:"): event.count for event in recorded.key_averages() if "gloo:" in event.key}
    return {name: count / steps for name, count in sorted(calls.items())}


if __name__ == "__main__":
    main()
