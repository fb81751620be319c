"""Compare training on two or more GPUs with one process: results, steps, memory, and recovery from a killed rank.

    python benchmarks/gpu/two_gpus.py [--ranks 2] [--model klein-4b] [--device cpu --tiny]

With fewer GPUs than ranks it says so and measures nothing. `--device cpu` trains on gloo instead of NCCL, anywhere.

- **Parity**, by `simpletuner train --example tiny-lora` in fp32: 8 steps of one process that accumulates two
  micro-batches for each rank, then of the ranks under DDP, then under FSDP2. Errors are ‖ranks − one process‖ /
  ‖one process‖ over the adapter. Limit: 1e-3. Sums in another order make 2e-7 on a CPU; but a GPU's kernels add in
  orders that change between runs, and Adam's first steps amplify small gradients.
- **Loopback**: the addresses on which the ranks listen meanwhile, from /proc/net/tcp and tcp6.
- **A killed rank**: SIGKILL of the last rank during training ends the command with an error that names it, and the same
  command resumes from the last checkpoint.
- **Steps** of `--model`, random weights in bf16, a LoRA on every Linear, one image of 1024² a rank: alone, DDP, FSDP2,
  with the memory of a rank.

It needs the program installed with all its dependencies.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measuring import Clock, free, parser, wait
from models import TINY_EDGE, spec_of, transformer
from results import report
from safetensors.torch import load_file
from training import Case, configured, random_batch

from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import attach
from simpletuner.memory import recompute
from simpletuner.memory.rendezvous import join
from simpletuner.memory.shard import Sharding, shard
from simpletuner.memory.world import World
from simpletuner.runs.ranks import RANKS_FOLDER
from simpletuner.train import optim
from simpletuner.train.step import Objective, Stepper

PARITY_BOUND = 1e-3
STEPS, MICRO_BATCHES = 8, 2
TIMEOUT_S = 60
WAIT_S = 240.0
"""Seconds that a run of the command may take to reach an observed point, or to end."""
ENGINES = ("one process", "DDP", "FSDP2")
LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as /proc/net/tcp and tcp6 write them on a little-endian machine."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--model", default="klein-4b", choices=["dev", "klein-9b", "klein-4b"])
    arguments.add_argument("--engine", choices=ENGINES, help="run as a rank that measures its steps (internal)")
    given = arguments.parse_args()
    clock = Clock(given.seconds)
    if given.engine is not None:
        measure_steps(given.model, given.engine, given.device, given.tiny, clock)
        return
    gpus = torch.cuda.device_count()
    if given.device.type == "cuda" and gpus < given.ranks:
        report("fact", name="several GPUs", value=f"skipped: {gpus} visible, {given.ranks} are needed")
        return
    with tempfile.TemporaryDirectory(prefix="simpletuner-two-gpus-") as folder:
        work = Workplace(Path(folder), given.device.type)
        work.parity(given.ranks)
        if clock.left > WAIT_S / 4:
            work.killed(given.ranks)
    for engine in ENGINES:
        if clock.left > 10:
            steps(engine, given.ranks, [*sys.argv[1:], f"--seconds={clock.left:.0f}"])


class Workplace:
    """A folder in which the real command trains the example."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.environ = {**os.environ, **hidden}

    def start(self, name: str, *flags: str) -> "subprocess.Popen[str]":
        """Start `simpletuner train` into `output/NAME`."""
        command = [sys.executable, "-P", "-m", "simpletuner", "train", "--example", "tiny-lora", "--validation_disable"]
        command += [f"--output_dir=output/{name}", "--mixed_precision=no", "--train_batch_size=1"]
        command += [
            f"--distributed_timeout_s={TIMEOUT_S}",
            "--lr_scheduler=constant",
            "--eval_steps_interval=1000000",
            *flags,
        ]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def parity(self, ranks: int) -> None:
        """Train the same in three ways, and compare."""
        accumulated = f"--gradient_accumulation_steps={MICRO_BATCHES}"
        ways = {
            "one process": ["--num_processes=1", f"--gradient_accumulation_steps={MICRO_BATCHES * ranks}"],
            "DDP": [f"--num_processes={ranks}", accumulated],
            "FSDP2": [f"--num_processes={ranks}", accumulated, "--fsdp_enable"],
        }
        for engine, flags in ways.items():
            process = self.start(engine, f"--max_train_steps={STEPS}", *flags)
            listening: set[str] = set()
            while process.poll() is None:
                listening |= {address for pid in ranks_of(process.pid) for address in listened(pid)}
                time.sleep(0.1)
            errors = process.communicate()[1]
            what = f"{ranks} ranks on {engine} against one process"
            if process.returncode:
                report("check", what=what, passed=False, note=errors[-500:])
            elif engine != "one process":
                error = distance(*(self.folder / "output" / each for each in (engine, "one process")))
                report("check", what=what, passed=error <= PARITY_BOUND, error=error, bound=PARITY_BOUND)
                passed = all(address.startswith(LOOPBACK) for address in listening)
                note = f"{len(listening)} sockets" if passed else ", ".join(sorted(listening))
                report("check", what=f"{engine} listens on loopback alone", passed=passed, note=note)

    def killed(self, ranks: int) -> None:
        """Kill the last rank of a run, and resume it."""
        flags = (f"--num_processes={ranks}", "--checkpoint_step_interval=4")
        process = self.start("killed", "--max_train_steps=100000", *flags)
        events = self.folder / "output" / "killed" / "events.jsonl"
        deadline = time.monotonic() + WAIT_S
        while process.poll() is None and last_step(events) < 6 and time.monotonic() < deadline:
            time.sleep(0.1)
        began = time.monotonic()
        for pid, environ in children(process.pid):
            if f"RANK={ranks - 1}" in environ:
                os.kill(pid, signal.SIGKILL)
        errors = process.communicate(timeout=TIMEOUT_S + WAIT_S)[1]
        took = time.monotonic() - began
        passed = process.returncode > 0 and took < TIMEOUT_S and f"rank {ranks - 1}" in errors
        report("check", what="a killed rank ends the run", passed=passed, note=f"{took:.1f} s: {errors.strip()[-200:]}")
        reached = last_step(events)
        again = self.start("killed", f"--max_train_steps={reached + 2}", *flags)
        errors = again.communicate()[1]
        passed = again.returncode == 0 and last_step(events) == reached + 2
        report("check", what="the run resumes from its checkpoint", passed=passed, note=errors.strip()[-200:])


def children(pid: int) -> Iterator[tuple[int, set[str]]]:
    """The processes that `pid` started, with their environments."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                yield int(folder.name), set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue


def ranks_of(pid: int) -> list[int]:
    """The supervisor `pid` and the ranks that it started."""
    return [pid, *(child for child, _ in children(pid))]


def listened(pid: int) -> set[str]:
    """Addresses and ports, in hexadecimal, on which a process listens."""
    found = set()
    try:
        inodes = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                    found.add(fields[1])
    except OSError:  # it ended meanwhile
        pass
    return found


def last_step(events: Path) -> int:
    """The last optimizer step in a run's events; 0 before the first."""
    if not events.is_file():
        return 0
    whole = [line for line in events.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((event["step"] for event in map(json.loads, whole) if event["type"] == "step"), default=0)


def distance(run: Path, other: Path) -> float:
    """‖run − other‖ / ‖other‖ over the adapters of two runs."""
    one, two = (load_file(each / "pytorch_lora_weights.safetensors") for each in (run, other))
    left, right = (torch.cat([each[name].double().flatten() for name in two]) for each in (one, two))
    return float((left - right).norm() / right.norm())


def steps(engine: str, ranks: int, flags: list[str]) -> None:
    """Start the engine's ranks, which measure their steps; rank 0 reports."""
    size = 1 if engine == "one process" else ranks
    command = [sys.executable, __file__, *flags, f"--engine={engine}"]
    with tempfile.TemporaryDirectory(prefix="simpletuner-ranks-") as folder:
        own = {RANKS_FOLDER: folder, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        processes = [
            subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]
        codes = [process.wait() for process in processes]
    if any(codes):
        report("check", what=f"steps on {engine}", passed=False, note=f"exit codes {codes}")


def measure_steps(model: str, engine: str, device: torch.device, tiny: bool, clock: Clock) -> None:
    """Report seconds and memory of a step, as one rank of the engine."""
    world = join(os.environ, TIMEOUT_S)
    if device.type == "cpu":
        torch.set_num_threads(1)
        world = replace(world, device=device)
    case = Case(model=model)
    step = trained(case, engine, world, tiny)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(2):
        step()
    # Every rank takes as many steps as rank 0.
    count = world.broadcast_json(max(3, min(10, int(clock.left / 4 / timed_once(step, world)))))
    seconds = [timed_once(step, world) for _ in range(count)]
    memory = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    memories = world.gather_json(memory)
    if world.is_main:
        middle = sorted(seconds)[len(seconds) // 2]
        report(
            "step",
            model=f"{model}, tiny" if tiny else model,
            precision="bf16",
            residency=engine if world.is_alone else f"{engine}, {world.size} ranks",
            image=f"{TINY_EDGE if tiny else case.edge}²",
            batch=world.size,
            blocks="eager",
            variant="",
            seconds=middle,
            images_per_s=world.size / middle,
            allocated_bytes=memories[0] if memory is None else max(memories),
        )
    wait(world.device)
    free()


def timed_once(step: Callable[[], None], world: World) -> float:
    """Seconds of a step."""
    wait(world.device)
    began = time.perf_counter()
    step()
    wait(world.device)
    return time.perf_counter() - began


def trained(case: Case, engine: str, world: World, tiny: bool) -> Callable[[], None]:
    """A function that makes a step of the program, as one rank of the engine."""
    config = configured(case, 0, tiny)
    made = transformer(spec_of(case.model, tiny=tiny), case.precision, world.device)
    if engine == "FSDP2":
        shard(made, made.blocks, Sharding(world.device))
        free()
    adapter = attach(made, config, seed=0)
    recompute.install(made.blocks)
    made.train()
    stepper = Stepper(
        denoise=Denoiser(made),
        parameters=adapter.parameters(),
        optimizer=optim.build(adapter.parameters(), config),
        options=config,
        objective=Objective.of(config, config, 0),
        scaler=torch.amp.GradScaler(world.device.type, enabled=False),
        device=world.device,
        world=None if world.is_alone else world,
    )
    slots = range(world.rank * case.batch, (world.rank + 1) * case.batch)
    size = world.size * case.batch
    batch = replace(random_batch(case, made, tiny), slots=slots)
    whole = GlobalBatch(1, 0, (batch,), size, tuple(f"random/{slot}" for slot in range(size)))

    def step() -> None:
        stepper(whole, 1e-4)

    return step


if __name__ == "__main__":
    main()
