"""Measure how `preservation` trades learning a subject against preserving other images, on the example tiny-lora.

    python tools/embedded_preservation.py FOLDER                           all ways and weights, five seeds each
    python tools/embedded_preservation.py FOLDER class=1 set=1 none=0      these ways and weights

A way is `none`, `class` or `blank` (the values of `preservation`), or `set`: the example's images of known shapes as a
regularization dataset. FOLDER gets the runs and `grades.jsonl`. Runs that are graded there are not trained again, so
several processes may share the work, each with other seeds.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import simpletuner.examples
from embedded_exam import Candidate, examine
from embedded_judge import mean_and_error
from simpletuner.config.options.model import ModelOptions
from simpletuner.examples.pictures import materialize
from simpletuner.flux2.export import attach_saved, read_lora

EXAMPLE = Path(simpletuner.examples.__file__).parent / "tiny-lora"
WAYS = ("none=0", "class=0.5", "class=2", "set=1")
TRIGGER, CLASS = "zorblat flag", "yellow star"


@dataclass(frozen=True)
class Run:
    """One training of the example."""

    way: str
    weight: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.way}-{self.weight:g}-{self.seed}"

    def train(self, folder: Path, steps: int) -> Path:
        """Train it in `folder`, which has the example's images. Returns the run's folder."""
        config = json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8"))
        sets = json.loads((EXAMPLE / "multidatabackend.json").read_text(encoding="utf-8"))
        sets = [one for one in sets if one.get("dataset_type") != "eval"]
        for one in sets:
            is_prior = one["id"] == "prior"
            if is_prior and self.way == "set":
                one |= {"is_regularisation_data": True, "loss_weight": self.weight}
        for key in ("eval_dataset_id", "eval_steps_interval"):
            del config[key]
        config |= {
            "mixed_precision": "no",
            "max_train_steps": steps,
            "checkpoint_step_interval": 0,
            "validation_disable": True,
            "seed": self.seed,
            "output_dir": f"output/{self.name}",
            "data_backend_config": f"config/{self.name}-data.json",
        }
        if self.way in ("class", "blank"):
            config |= {"preservation": self.way, "preservation_weight": self.weight}
        if self.way == "class":
            config |= {"preservation_trigger": TRIGGER, "preservation_class": CLASS}
        (folder / "config").mkdir(exist_ok=True)
        for name, value in ((self.name, config), (f"{self.name}-data", sets)):
            (folder / "config" / f"{name}.json").write_text(json.dumps(value, indent=2), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "simpletuner", "train", f"--config=config/{self.name}.json"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return folder / "output" / self.name


@dataclass(frozen=True)
class Grade:
    """Results of one run. Shares are between 0 and 1."""

    way: str
    weight: float
    seed: int
    flags: float
    shapes: float
    drift: float


def grade(run: Run, folder: Path, pictures: int) -> Grade:
    """Judge the images that the LoRA in a run's `folder` generates."""
    candidate = Candidate.load(ModelOptions(model_flavour="tiny"))
    base = candidate.drift_latents()
    attach_saved(candidate.transformer, read_lora(folder))
    grades = examine(candidate, pictures, base=base)
    assert grades.drift is not None
    return Grade(run.way, run.weight, run.seed, grades.flags.value, grades.prior, grades.drift)


def table(grades: Iterable[Grade]) -> str:
    """Mean over the seeds of each way and weight, with its standard error."""
    groups: dict[tuple[str, float], list[Grade]] = {}
    for each in grades:
        groups.setdefault((each.way, each.weight), []).append(each)
    lines = ["| way | weight | seeds | flags | other shapes | drift |", "|---|---|---|---|---|---|"]
    for (way, weight), group in groups.items():
        cells = [
            mean_and_error([100 * each.flags for each in group], 1),
            mean_and_error([100 * each.shapes for each in group], 1),
            mean_and_error([each.drift for each in group], 3),
        ]
        lines.append(f"| {way} | {weight:g} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def graded(folder: Path) -> Mapping[str, Grade]:
    """The grades in `folder`, by the name of the run."""
    path = folder / "grades.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    grades = [Grade(**json.loads(line)) for line in lines]
    return {Run(each.way, each.weight, each.seed).name: each for each in grades}


def main(arguments: Sequence[str]) -> int:
    """Train and judge the missing runs, then print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/embedded_preservation.py", description="Train the example with preservation, and judge it."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", nargs="*", default=WAYS, metavar="WAY=WEIGHT", help=f"({' '.join(WAYS)})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--steps", type=int, default=800, help="steps of each training (800)")
    parser.add_argument(
        "--pictures", type=int, default=50, help="prompts for flags (50); three times as many for shapes"
    )
    given = parser.parse_args(arguments)
    folder = given.folder
    materialize("tiny-lora", folder / "datasets" / "tiny-lora")
    pairs = [text.split("=") for text in given.ways]
    for run in [Run(way, float(weight), seed) for seed in given.seeds for way, weight in pairs]:
        if run.name in graded(folder):
            continue
        result = grade(run, run.train(folder, given.steps), given.pictures)
        with (folder / "grades.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(asdict(result))}\n")
    print(table(graded(folder).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
