"""Compare seconds a step of `simpletuner train` with those of a bare loop, in interleaved pairs, with peak memory.

    python benchmarks/step.py [--pairs 5] [--steps 40]

Both train the same adapter on the same batches with the same draws, clip and optimizer. The bare loop holds its batches
in memory and does nothing else; the program also reads caches, writes events and files, shows the bar and checks for
requests. Each run is a separate process. A pair is one run of each, and pairs follow each other, so that a change in
the machine's speed affects both alike. The result of a run is its median step without the first three.
"""

import argparse
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from example import flags, lay_out, peak_gib, train
from simpletuner.runs.events import read_events

WARM_UP = 3
LIMIT = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        print(bare_loop(arguments.bare, arguments.steps))
        return

    ratios = []
    with tempfile.TemporaryDirectory(prefix="simpletuner-step-") as folder:
        work = Path(folder)
        lay_out(work)
        train(work, "cold", steps=1)
        for pair in range(arguments.pairs):
            # Every other pair in the opposite order, so that an effect on the second run of a pair affects both kinds.
            if pair % 2:
                bare = measured_bare(work, arguments.steps)
                ours = program(work, f"pair-{pair}", arguments.steps)
            else:
                ours = program(work, f"pair-{pair}", arguments.steps)
                bare = measured_bare(work, arguments.steps)
            ratios.append(ours / bare)
            print(f"pair {pair + 1}: program {ours:.4f} s/step, bare {bare:.4f} s/step, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} (limit {LIMIT}), peak {peak_gib():.2f} GiB")


def program(work: Path, name: str, steps: int) -> float:
    """Seconds between one step's event and the next: all that happens in between is in it."""
    events = read_events(train(work, name, steps=steps) / "events.jsonl")
    times = [datetime.datetime.fromisoformat(event["time"]) for event in events if event["type"] == "step"]
    gaps = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    return statistics.median(gaps[WARM_UP:])


def measured_bare(work: Path, steps: int) -> float:
    command = [sys.executable, __file__, "--bare", str(work), "--steps", str(steps)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def bare_loop(work: Path, steps: int) -> float:
    """Seconds of the median step."""
    import torch

    from simpletuner.config.load import load
    from simpletuner.data.order import Order
    from simpletuner.flow.loss import flow_loss, squared
    from simpletuner.flux2.denoiser import Denoiser
    from simpletuner.flux2.load import load_transformer
    from simpletuner.flux2.lora import attach
    from simpletuner.flux2.source import locate
    from simpletuner.memory.precision import DTYPES
    from simpletuner.memory.world import World
    from simpletuner.train.batches import BatchBuilder
    from simpletuner.train.caches import prepare
    from simpletuner.train.report import Reporter
    from simpletuner.train.step import Objective

    os.chdir(work)
    loaded = load(flags("bare", steps), folder=Path(), environ={})
    config, device = loaded.config, torch.device("cpu")
    source = locate(config, report=print)
    prepared = prepare(loaded, source, World(0, 1, device), Reporter())
    order = Order(prepared.train, seed=config.seed, batch_size=config.train_batch_size)
    objective = Objective.of(config, config, config.seed)
    per_step = config.gradient_accumulation_steps
    build = BatchBuilder(config, prepared, order, objective, None, batches_per_step=per_step, world=World.single())
    global_batches = [build(step) for step in range(1, steps + 1)]

    transformer = load_transformer(source, DTYPES[config.base_dtype], device).requires_grad_(False).train()
    parameters = attach(transformer, config, seed=config.seed).parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    denoise = Denoiser(transformer)

    seconds = []
    for whole in global_batches:
        began = time.monotonic()
        for batch in whole.batches:
            losses = flow_loss(
                denoise, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise, penalty=squared
            )
            (losses.sum() / whole.size).backward()
            losses.tolist()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()
