"""Train half of a run in one layout of processes and resume it in another, for every pair, with the real command.

    python tools/resume_matrix.py [FOLDER] [--pairs single:fsdp2,ddp2:single | --draw 2] [--steps 4]

The layouts are one process, two or four under DDP, two or four under FSDP2, and two under each stage of DeepSpeed
(`--draw` leaves these out). All have the effective batch 4: 1 process with 4 accumulation steps, 2 with 2, 4 with 1.
The run is one LoRA on the embedded model in fp32, on generated images. Each first half is trained once and copied; each
second half resumes the copy with `simpletuner train`. For each pair the table shows how far the losses, the final
adapter and the optimizer state are from those of a run that one process trained without interruption. FOLDER keeps the
runs; without it they are deleted.

Tolerance: fp32 sums of the same gradients in another order. 20 steps in another order differed by 1.1e-7 in their
losses and by 1.7e-7 in the norm of the adapter, both relative. The limits are ten times that, and 1e-4 for the
optimizer's second moments and other tensors of squares or of numbers near zero. Exit code: 0, or 1 if a pair exceeds
the limits.
"""

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from interrupted_run import DATASETS

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "single": ("--num_processes=1", "--gradient_accumulation_steps=4"),
    "ddp2": ("--num_processes=2", "--gradient_accumulation_steps=2"),
    "ddp4": ("--num_processes=4", "--gradient_accumulation_steps=1"),
    "fsdp2": ("--num_processes=2", "--gradient_accumulation_steps=2", "--fsdp_enable"),
    "fsdp4": ("--num_processes=4", "--gradient_accumulation_steps=1", "--fsdp_enable"),
}
ZERO_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    f"zero{stage}": (*LAYOUTS["ddp2"], f"--deepspeed_config=zero{stage}") for stage in (1, 2, 3)
}
"""Layouts that need DeepSpeed."""
STRAIGHT = "single"
LOSS_LIMIT, ADAPTER_LIMIT, OPTIMIZER_LIMIT = 1e-6, 2e-6, 1e-4

CONFIG: dict[str, Any] = {
    "model_flavour": "tiny",
    "output_dir": "output/run",
    "max_train_steps": 4,
    "train_batch_size": 1,
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "learning_rate": 1e-3,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "caption_dropout_probability": 0.25,
    "checkpoint_step_interval": 1000,
    "validation_disable": True,
    "max_workers": 1,
}
SIZES = ((64, 64), (64, 64), (96, 64), (64, 96), (64, 64))


@dataclass(frozen=True)
class Difference:
    """Relative differences between two runs: the largest of the losses, and the norm over all tensors of a file."""

    loss: float
    adapter: float
    optimizer: float

    @property
    def is_within(self) -> bool:
        return self.loss <= LOSS_LIMIT and self.adapter <= ADAPTER_LIMIT and self.optimizer <= OPTIMIZER_LIMIT

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, adapter {self.adapter:.1e}, optimizer {self.optimizer:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path)
    parser.add_argument("--pairs", metavar="FROM:TO,…", help="only these pairs")
    parser.add_argument(
        "--draw", metavar="N", type=int, help="only single with each other layout, both ways, and N random pairs"
    )
    parser.add_argument("--seed", type=int, default=16, help="seed of --draw")
    parser.add_argument("--steps", type=int, default=4, help="steps of the whole run; the first half in layout FROM")
    given = parser.parse_args()
    known = {**LAYOUTS, **ZERO_LAYOUTS}
    pairs = [(start, end) for start in known for end in known]
    if given.pairs is not None:
        pairs = [(start, end) for start, _, end in (pair.partition(":") for pair in given.pairs.split(","))]
        if unknown := {name for pair in pairs for name in pair} - set(known):
            parser.error(f"--pairs {', '.join(sorted(unknown))}: known are {', '.join(known)}")
    elif given.draw is not None:
        pairs = drawn_pairs(given.draw, given.seed)
    with tempfile.TemporaryDirectory(prefix="simpletuner-resume-") as temporary:
        folder = given.folder or Path(temporary)
        lay_out(folder)
        differences = matrix(folder, pairs, given.steps)
    worst = [pair for pair, difference in differences.items() if not difference.is_within]
    print(f"{len(differences) - len(worst)} of {len(differences)} pairs end within the limits")
    return 1 if worst else 0


def drawn_pairs(more: int, seed: int, beside: Sequence[str] = tuple(LAYOUTS)) -> list[tuple[str, str]]:
    """Pairs of the single process with each other layout of `beside`, both ways, and `more` of the other pairs."""
    others = [name for name in LAYOUTS if name != STRAIGHT]
    ends = [pair for name in others if name in beside for pair in ((STRAIGHT, name), (name, STRAIGHT))]
    rest = [(one, two) for one, two in itertools.product(others, repeat=2) if one != two]
    return ends + random.Random(seed).sample(rest, more)


def lay_out(folder: Path) -> None:
    """Prepare a working folder: configuration and a few images."""
    images = folder / "datasets" / "images"
    images.mkdir(parents=True)
    for index, (width, height) in enumerate(SIZES):
        across = Image.linear_gradient("L").rotate(90).resize((width, height))
        down = Image.linear_gradient("L").resize((width, height))
        Image.merge("RGB", (across, down, Image.new("L", (width, height), 50 * index))).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(f"a gradient, number {index}\n", encoding="utf-8")
    (folder / "config").mkdir()
    for name, value in (("config.json", CONFIG), ("multidatabackend.json", DATASETS)):
        (folder / "config" / name).write_text(json.dumps(value), encoding="utf-8")


def matrix(folder: Path, pairs: Sequence[tuple[str, str]], steps: int) -> dict[tuple[str, str], Difference]:
    """The difference of each pair's run from the uninterrupted one. `folder` is a prepared working folder."""
    straight = train(folder, "straight", STRAIGHT, steps)
    halves = {start: train(folder, f"half-{start}", start, steps // 2) for start in dict.fromkeys(a for a, _ in pairs)}
    differences = {}
    for start, end in pairs:
        name = f"{start}-{end}"
        shutil.copytree(halves[start], folder / "output" / name)
        found = differences[start, end] = difference(train(folder, name, end, steps), straight, steps)
        print(f"{start:>6} → {end:<6}  {found}{'' if found.is_within else '  BEYOND THE LIMITS'}", flush=True)
    return differences


def train(folder: Path, name: str, layout: str, steps: int, *more: str) -> Path:
    """Train the run `output/NAME` of a working folder in `layout` up to `steps`; returns its directory.

    Raises:
        RuntimeError: the command failed. The message has its output.
    """
    command = [sys.executable, "-P", "-m", "simpletuner", "train", f"--output_dir=output/{name}"]
    command += [f"--max_train_steps={steps}", *{**LAYOUTS, **ZERO_LAYOUTS}[layout], *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    return folder / "output" / name


def difference(run: Path, other: Path, steps: int) -> Difference:
    """The difference of the run directory `run` from `other` after `steps`."""
    checkpoint = Path("checkpoints") / f"step-{steps:06d}"
    return Difference(
        loss=max(abs(a - b) / abs(b) for a, b in zip(losses(run, steps), losses(other, steps), strict=True)),
        adapter=distance(*(each / checkpoint / "pytorch_lora_weights.safetensors" for each in (run, other))),
        optimizer=distance(*(each / checkpoint / "optimizer*.safetensors" for each in (run, other))),
    )


def losses(run: Path, steps: int) -> list[float]:
    """The loss of each step, from its last attempt."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {event["step"]: event["loss"] for event in events if event["type"] == "step"}
    return [found[step] for step in range(1, steps + 1)]


def distance(one: Path, other: Path) -> float:
    """‖one − other‖ / ‖other‖ over all tensors of two files. The end of a path may be a pattern, since ranks save
    separate files. Infinite if names, shapes or formats differ.
    """
    from safetensors.torch import load_file

    left, right = (
        {name: tensor for file in path.parent.glob(path.name) for name, tensor in load_file(file).items()}
        for path in (one, other)
    )
    if {name: (t.shape, t.dtype) for name, t in left.items()} != {n: (t.shape, t.dtype) for n, t in right.items()}:
        return float("inf")
    apart = sum(float((left[name].double() - tensor.double()).square().sum()) for name, tensor in right.items())
    norm = sum(float(tensor.double().square().sum()) for tensor in right.values())
    return (apart / norm) ** 0.5 if apart else 0.0


if __name__ == "__main__":
    sys.exit(main())
