"""Kill training at random moments, start the same command again, and compare the result with an undisturbed run.

    python benchmarks/faults.py --kills 100 --seed 1 [--out faults.jsonl] [--setup NAME] [--jobs 2]

A kill is SIGKILL. Half of the kills come just before a file operation (`fault_process.py`), spread evenly over the
folders and files that a run writes; the others after a random time, so that they hit computation, imports and
half-written files. A third of the runs have been killed once before. Each kill appends one JSON line to `--out`. Kills
that have a line there are not repeated, so this command may be interrupted too.

The restarted run must end with exit code 0, the same bytes in every file (`VARYING` names the exceptions), the same
loss of every step, the same events about images and checkpoints, and no file that an undisturbed run does not have.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.runs.events import read_events

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"

COMMON: dict[str, Any] = {
    "model_flavour": "tiny",
    "output_dir": "output/run",
    "max_train_steps": 4,
    "train_batch_size": 1,
    "mixed_precision": "bf16",
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "checkpoint_step_interval": 1,
    "checkpoints_total_limit": 2,
    "caption_dropout_probability": 0.25,
    "validation_resolution": "32x32",
    "validation_step_interval": 2,
    "validation_num_inference_steps": 2,
    "num_eval_images": 1,
    "vae_batch_size": 2,
    "text_encoder_batch_size": 2,
    "write_batch_size": 2,
    "max_workers": 1,
}
LORA: dict[str, Any] = {"lora_rank": 4}
AVERAGE: dict[str, Any] = {"use_ema": True, "ema_decay": 0.5}
SETUPS: dict[str, dict[str, Any]] = {
    "AdamW, EMA": LORA | AVERAGE,
    "8-bit AdamW, int8 base": LORA
    | {"optimizer": "adamw8bit", "base_model_precision": "int8-quanto", "base_model_cache_dir": "cache/base"},
    "full, EMA": AVERAGE | {"model_type": "full", "learning_rate": 1e-4, "mixed_precision": "no"},
    "offload": LORA
    | {
        "enable_group_offload": True,
        "group_offload_use_stream": True,
        "group_offload_to_disk_path": "cache/blocks",
        "activation_offload": True,
    },
    "schedule-free": LORA | {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant"},
}
PROMPTS = {"one": "a soft gradient", "two": "a hard edge"}

VARYING = ("events.jsonl", "run.log", "lock")
"""Files that differ because they record attempts."""
STAMPED = ("verified.json", "scan-")
"""Lists of files that were read, with time stamps. They only save work, so a run may have or lack them."""
TIMEOUT_S = 300
DRAWS = 10
"""Number of random moments that are tried before a run that always ends earlier is given up."""


@dataclass(frozen=True)
class Undisturbed:
    """File operations and results of a run without interruption."""

    folder: Path
    operations: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Differences between a restarted run and the undisturbed one; all fields are empty if they are equal."""

    different: list[str]
    missing: list[str]
    left_behind: list[str]

    @property
    def is_equal(self) -> bool:
        return not (self.different or self.missing or self.left_behind)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    parser.add_argument("--setup", choices=SETUPS, action="append", help="only this setup; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    setups = options.setup or list(SETUPS)
    done = read_lines(options.out, options.seed)
    wanted = [(number, setups[number % len(setups)]) for number in range(options.kills) if number not in done]
    with tempfile.TemporaryDirectory(prefix="simpletuner-faults-") as scratch, ThreadPoolExecutor(options.jobs) as pool:
        used = list(dict.fromkeys(setup for _, setup in wanted))
        undisturbed = dict(zip(used, pool.map(lambda setup: run_undisturbed(Path(scratch), setup), used), strict=True))
        lines = pool.map(
            lambda each: kill_once(Path(scratch), undisturbed[each[1]], each[1], options.seed, each[0]), wanted
        )
        with options.out.open("a", encoding="utf-8") as out:
            for line in lines:
                out.write(json.dumps(line) + "\n")
                out.flush()
                print(json.dumps(line) if not line["is_equal"] else f"{line['kill']}: {line['moment']}", flush=True)
                done[line["kill"]] = line
    return summarize(list(done.values()))


def read_lines(path: Path, seed: int) -> dict[int, dict[str, Any]]:
    """The finished kills of `seed`, by number. A kill whose line was interrupted is repeated."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["seed"] == seed:
            lines[line["kill"]] = line
    return lines


def lay_out(work: Path, setup: str) -> None:
    """Prepare a working folder: four training images of two shapes, one held-out image, and the configuration of
    `setup`.
    """
    for folder, count in (("images", 4), ("held-out", 1)):
        (work / "datasets" / folder).mkdir(parents=True)
        for index in range(count):
            gradient = Image.linear_gradient("L")
            size = ((64, 64), (96, 64))[index % 2]
            bands = (gradient.rotate(90).resize(size), gradient.resize(size), Image.new("L", size, 50 * index))
            path = work / "datasets" / folder / f"image-{index}.png"
            Image.merge("RGB", bands).save(path)
            path.with_suffix(".txt").write_text(f"a soft gradient, number {index}\n", encoding="utf-8")
    image_set = {
        "type": "local",
        "caption_strategy": "textfile",
        "resolution": 64,
        "resolution_type": "pixel_area",
        "crop": True,
        "crop_aspect": "preserve",
        "crop_style": "center",
    }
    datasets = [
        image_set | {"id": "images", "instance_data_dir": "datasets/images", "cache_dir_vae": "cache/vae"},
        image_set
        | {
            "id": "held-out",
            "dataset_type": "eval",
            "instance_data_dir": "datasets/held-out",
            "cache_dir_vae": "cache/held-out",
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    (work / "config").mkdir()
    documents = {
        "config": COMMON | SETUPS[setup],
        "multidatabackend": datasets,
        "user_prompt_library": PROMPTS,
    }
    for name, content in documents.items():
        (work / "config" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def train(work: Path, *wrapper: str, kill_after_s: float | None = None) -> tuple[int, str]:
    """Run `simpletuner train` in `work`, or `fault_process.py` with `wrapper`. Returns the exit code and the output."""
    command = ["-m", "simpletuner", "train"] if not wrapper else [str(HERE / "fault_process.py"), *wrapper, "--"]
    environ = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        cwd=work,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        told, _ = process.communicate(timeout=TIMEOUT_S if kill_after_s is None else kill_after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        if kill_after_s is None:
            return 124, told
    return process.returncode, told


def run_undisturbed(scratch: Path, setup: str) -> Undisturbed:
    """Train `setup` once, with its file operations listed."""
    folder = scratch / f"undisturbed-{list(SETUPS).index(setup)}"
    lay_out(folder, setup)
    record = scratch / f"{folder.name}.txt"
    began = time.monotonic()
    code, told = train(folder, "list", str(record))
    if code != 0:
        raise SystemExit(f"{setup}: the undisturbed run ended with {code}\n{told}")
    seconds = time.monotonic() - began
    return Undisturbed(folder, tuple(record.read_text(encoding="utf-8").splitlines()), seconds)


def group_of(operation: str) -> str:
    """The part of a run to which an operation belongs: its folder, or its name if it lies in the run's own folder."""
    path = operation.partition(" ")[2].removeprefix("output/run/")
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "cache" else parts[0]


def draw_kill(undisturbed: Undisturbed, draws: random.Random) -> int | float:
    """The number of the file operation before which a process is killed, or the seconds after which it is."""
    if draws.random() < 0.5:
        return draws.uniform(0, undisturbed.seconds)
    groups: dict[str, list[int]] = defaultdict(list)
    for number, operation in enumerate(undisturbed.operations):
        groups[group_of(operation)].append(number)
    return draws.choice(groups[draws.choice(sorted(groups))])


def kill(work: Path, moment: float, record: Path) -> str | None:
    """Train in `work` until `moment`. Returns what was happening, or None if the run ended before."""
    if isinstance(moment, int):
        code, told = train(work, "kill", str(record), str(moment))
        recorded = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        happening = recorded[-1] if recorded else None
    else:
        code, told = train(work, kill_after_s=moment)
        happening = f"after {moment:.1f} s, in {last_phase(work)}"
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        return f"not killed, exit code {code}: {told[-2000:]}"
    return happening


def last_phase(work: Path) -> str:
    """The last phase that began and did not end."""
    open_phases = ["start-up"]
    for event in read_events(work / "output" / "run" / "events.jsonl"):
        if event["type"] == "run":
            continue
        if event["type"] == "phase" and event["state"] == "begin":
            open_phases.append(event["phase"])
        elif event["type"] == "phase" and len(open_phases) > 1:
            open_phases.pop()
    return open_phases[-1]


def kill_once(scratch: Path, undisturbed: Undisturbed, setup: str, seed: int, number: int) -> dict[str, Any]:
    """Kill one run, restart it until it ends by itself, and compare."""
    draws = random.Random(f"{seed} {number}")
    work, record = scratch / f"kill-{number}", scratch / f"kill-{number}.txt"
    began = time.monotonic()
    earlier = moment = None
    for _ in range(DRAWS):  # a moment may come after the end, since no two runs take the same time
        shutil.rmtree(work, ignore_errors=True)
        record.unlink(missing_ok=True)
        lay_out(work, setup)
        earlier = kill(work, draw_kill(undisturbed, draws), record) if draws.random() < 1 / 3 else None
        moment = kill(work, draw_kill(undisturbed, draws), record)
        if moment is not None:
            break
    code, told = train(work)
    outcome = compare(undisturbed.folder, work) if code == 0 else Outcome([f"exit code {code}: {told[-2000:]}"], [], [])
    if moment is not None and moment.startswith("not killed"):
        outcome.different.append(moment)
    line = {
        "kill": number,
        "seed": seed,
        "setup": setup,
        "earlier": earlier,
        "moment": moment or "the run ended first",
        "is_equal": outcome.is_equal,
        **vars(outcome),
        "seconds": round(time.monotonic() - began, 1),
    }
    if outcome.is_equal:
        shutil.rmtree(work)
        record.unlink(missing_ok=True)
    return line


def compare(expected: Path, found: Path) -> Outcome:
    """Compare two working folders after a run: files, losses, and the events about images and checkpoints."""
    theirs, ours = files_below(expected), files_below(found)
    different = [
        name
        for name in sorted(theirs.keys() & ours.keys())
        if not Path(name).name.startswith(VARYING) and content_of(theirs[name]) != content_of(ours[name])
    ]
    for what, value in told_by_events(expected).items():
        if told_by_events(found)[what] != value:
            different.append(f"events: {what}")
    return Outcome(different, sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys()))


def content_of(path: Path) -> bytes:
    """The bytes of a file; those of `finished.json` without the modification times that it lists."""
    content = path.read_bytes()
    if path.name == "finished.json":
        content = re.sub(rb'"mtime_ns": \d+', b"", content)
    return content


def files_below(folder: Path) -> dict[str, Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(STAMPED))
    return {str(path.relative_to(folder)): path for path in files}


def told_by_events(work: Path) -> dict[str, Any]:
    """Losses, held-out losses and images by step, each from its last attempt, and the steps that were saved."""
    losses, held_out, images, saved, ids = {}, {}, {}, set(), []
    for event in read_events(work / "output" / "run" / "events.jsonl"):
        ids.append(event["id"])
        if event["type"] == "step":
            losses[event["step"]] = event["loss"]
        elif event["type"] == "checkpoint" and event["state"] == "saved":
            saved.add(event["step"])
        elif event["type"] == "validation":
            if event["loss"] is not None:
                held_out[event["step"]] = event["loss"]
            if event["sheet"] is not None:
                images[event["step"]] = [event["sheet"], *(picture["path"] for picture in event["pictures"])]
    ids_without_gaps = ids == list(range(1, len(ids) + 1))
    return {"losses": losses, "held-out losses": held_out, "images": images, "saved": saved, "ids": ids_without_gaps}


def summarize(lines: Sequence[dict[str, Any]]) -> int:
    """Print how many kills of each setup ended equal. Returns 0 if all did."""
    killed = [line for line in lines if line["moment"] != "the run ended first"]
    equal = Counter(line["setup"] for line in killed if line["is_equal"])
    for setup, count in Counter(line["setup"] for line in killed).items():
        print(f"{setup}: {count} kills, {equal[setup]} equal to an undisturbed run")
    failed = [line["kill"] for line in lines if not line["is_equal"]]
    print(f"{len(killed)} kills in all, {len(lines) - len(killed)} runs ended first; not equal: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
