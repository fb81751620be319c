"""Compare the optimizers on the example `tiny-lora`: held-out loss, time of a step, bytes of state per parameter.

python benchmarks/optimizers.py [--steps 40] [--only NAME,NAME]     (about a minute an optimizer on two idle cores)
python benchmarks/optimizers.py --survey                            (which names of the libraries can be used)
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATES = {
    "adamw": 6e-3,
    "adamw_bf16": 6e-3,
    "adamw8bit": 6e-3,
    "adafactor": 0.1,
    "lion": 1e-3,
    "prodigy": 1.0,
    "adamw_schedulefree": 1e-2,
    "came": 3e-3,
    "muon": 6e-3,
}
"""Sensible learning rates, not tuned; adamw's is the example's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", default=",".join(RATES))
    parser.add_argument("--survey", action="store_true")
    options = parser.parse_args()
    if options.survey:
        survey()
        return
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| optimizer | learning_rate | loss before | after | of the average | s/step | state, bytes a parameter |"
        )
        print("|---|---|---|---|---|---|---|")
        for name in options.only.split(","):
            print(row(Path(folder), name, options.steps), flush=True)


def row(folder: Path, name: str, steps: int) -> str:
    """One run, as a line of the table."""
    command = [sys.executable, "-m", "simpletuner", "train", "--example", "tiny-lora", f"--output_dir=output/{name}"]
    command += [f"--optimizer={name}", f"--learning_rate={RATES[name]}", f"--max_train_steps={steps}", "--use_ema"]
    command += ["--ema_decay=0.9", "--validation_disable", f"--eval_steps_interval={steps}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"| {name} | {done.stderr.strip()} |"
    run = folder / "output" / name
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    measured = [event for event in events if event["type"] == "validation" and event["loss"] is not None]
    seconds = statistics.median(event["seconds"] for event in events if event["type"] == "step")
    return (
        f"| {name} | {RATES[name]:g} | {measured[0]['loss']:.3f} | {measured[-1]['loss']:.3f} "
        f"| {measured[-1]['ema_loss']:.3f} | {seconds:.2f} | {state_bytes(run, steps):.2f} |"
    )


def state_bytes(run: Path, steps: int) -> float:
    """Bytes of state per parameter, counted in the checkpoint."""
    import torch
    from safetensors import safe_open

    sizes = {"parameter": 0, "state": 0}
    with safe_open(run / "checkpoints" / f"step-{steps:06d}" / "optimizer.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a dict
            tensor: torch.Tensor = file.get_tensor(key)
            kind = key.partition("/")[0]
            if kind == "parameter":
                sizes["parameter"] += tensor.numel()
            elif kind != "average":
                sizes["state"] += tensor.numel() * tensor.element_size()
    return sizes["state"] / sizes["parameter"]


def survey() -> None:
    """Try every optimizer of every library as a run would, on two small matrices."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from simpletuner.base.errors import ConfigError
    from simpletuner.config.optimizers import LIBRARIES
    from simpletuner.config.options.optim import OptimOptions
    from simpletuner.train import optim

    def usable(name: str) -> str:
        matrices = [torch.nn.Parameter(torch.randn(4, 64)), torch.nn.Parameter(torch.zeros(64, 4))]
        try:
            optim.build(matrices, OptimOptions(optimizer=name))
        except ConfigError as error:
            return str(error).splitlines()[0]
        return ""

    for library, place in LIBRARIES.items():
        began = time.monotonic()
        module: Any = importlib.import_module(place)
        names = [
            name
            for name, value in sorted(vars(module).items())
            if isinstance(value, type)
            and issubclass(value, torch.optim.Optimizer)
            and value is not torch.optim.Optimizer
        ]
        answers = {name: usable(f"{library}:{name}") for name in names}
        refused = {name: answer for name, answer in answers.items() if answer}
        took = time.monotonic() - began
        print(f"{library}: {len(names) - len(refused)} of {len(names)} can be used ({took:.1f} s)")
        for answer in refused.values():
            print(f"  {answer}")


if __name__ == "__main__":
    main()
