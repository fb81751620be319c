"""For the benchmarks: runs on the images of the example tiny-lora that only train, without validation."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import simpletuner.examples
from simpletuner.examples.pictures import materialize

EXAMPLE = Path(simpletuner.examples.__file__).parent / "tiny-lora"
NOTHING_BESIDE = {"validation_disable": True, "checkpoint_step_interval": 0, "lr_scheduler": "constant"}
BESIDES = ("eval_dataset_id", "eval_steps_interval")


def lay_out(work: Path) -> None:
    """Write the example's images and configuration into `work`, without its held-out dataset."""
    materialize("tiny-lora", work / "datasets" / "tiny-lora")
    config = json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in BESIDES} | NOTHING_BESIDE
    entries = json.loads((EXAMPLE / "multidatabackend.json").read_text(encoding="utf-8"))
    sets = [entry for entry in entries if entry.get("dataset_type") != "eval"]
    (work / "config").mkdir()
    for name, value in (("config.json", config), ("multidatabackend.json", sets)):
        (work / "config" / name).write_text(json.dumps(value), encoding="utf-8")


def flags(name: str, steps: int) -> list[str]:
    """The arguments of `simpletuner train` for the run `output/NAME` in a folder that `lay_out` prepared."""
    return ["--output_dir", f"output/{name}", "--max_train_steps", str(steps)]


def train(work: Path, name: str, *more: str, steps: int) -> Path:
    """Run `simpletuner train` in the folder `work`, with `more` flags; returns the run directory."""
    command = [sys.executable, "-P", "-m", "simpletuner", "train", *flags(name, steps), *more]
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return work / "output" / name


def peak_gib() -> float:
    """The largest peak of resident memory of any child process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
