"""Compare the training results of two commits, bit for bit: a refactoring must change none of them.

    python tools/compare_commits.py BEFORE AFTER [--only NAME ...]

Checks out both commits into temporary git worktrees and runs the same short trainings of the embedded models with
each, through `simpletuner train`, with the interpreter and the packages of this process. A case passes if both runs
wrote equal bytes in every weight file, optimizer state and image, and equal numbers in every step and validation
event. The caches are compared at the end. Prints one line per case and exits with 1 if any case differs.

The header of a weight file counts too: it holds a hash of the configuration. If only headers differ, the line says so;
that is right only if the configuration record was changed on purpose.

Runs on one thread. Both sides get the same environment and use no network.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).parents[1]

CONFIG: dict[str, Any] = {
    "model_flavour": "tiny",
    "max_train_steps": 3,
    "train_batch_size": 2,
    "mixed_precision": "bf16",
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "lora_rank": 4,
    "checkpoint_step_interval": 3,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 3,
    "eval_steps_interval": 2,
    "num_eval_images": 2,
    "max_workers": 1,
}
IMAGES: dict[str, Any] = {
    "id": "images",
    "type": "local",
    "instance_data_dir": "datasets/images",
    "caption_strategy": "textfile",
    "resolution": 64,
    "resolution_type": "pixel_area",
    "crop": True,
    "crop_aspect": "preserve",
    "cache_dir_vae": "cache/vae",
}
DATASETS: list[dict[str, Any]] = [
    IMAGES,
    IMAGES | {"id": "held-out", "dataset_type": "eval", "cache_dir_vae": "cache/held-out"},
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
]
PROMPTS = {"one": "a gradient", "two": "a soft gradient, number 1"}
SIZES = ((64, 64), (160, 96), (64, 64), (160, 96))
"""Width and height of the training images: two buckets."""

ROUTES = json.dumps({"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]})
CASES: dict[str, list[str]] = {
    "example": [
        "--example=tiny-lora", "--max_train_steps=3", "--lora_rank=4", "--train_batch_size=2", "--lr_warmup_steps=1",
        "--validation_resolution=64x64", "--validation_num_inference_steps=2", "--validation_step_interval=3",
        "--eval_steps_interval=2", "--num_eval_images=2", "--checkpoint_step_interval=2",
    ],
    "quantized": [
        "--base_model_precision=int8-quanto", "--text_encoder_1_precision=int8-quanto", "--enable_group_offload",
        "--group_offload_use_stream", "--group_offload_text_encoder", "--group_offload_vae", "--activation_offload",
        "--text_encoder_mode=streamed",
    ],
    "tread": [f"--tread_config={ROUTES}"],
    "rollout": ["--scheduled_sampling_max_step_offset=100", "--scheduled_sampling_sampler=heun", "--loss_type=huber"],
    "lora-dropout": ["--lora_dropout=0.3", "--gradient_checkpointing=false", "--mixed_precision=no"],
    "random-guidance": ["--flux_guidance_mode=random-range", "--timestep_strata"],
    "caption-dropout": ["--caption_dropout_probability=0.5", "--max_train_steps=4", "--validation_guidance_real=2"],
    "accumulation": ["--gradient_accumulation_steps=2", "--mixed_precision=no", "--vae_dtype=fp32"],
    "full-ema": [
        "--model_type=full", "--learning_rate=1e-4", "--use_ema", "--ema_decay=0.5", "--ema_validation=comparison",
    ],
    "klein": ["--model_flavour=tiny-klein", "--caption_dropout_probability=0.5", "--text_encoder_mode=streamed"],
}  # fmt: skip
"""Arguments of `simpletuner train` for each case, on top of `CONFIG` (the example has its own configuration)."""

STEP_FIELDS = ("step", "loss", "lr", "grad_norm", "rollout_calls")
VALIDATION_FIELDS = ("step", "loss", "loss_by_sigma", "ema_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="a commit, a tag or a branch")
    parser.add_argument("after", metavar="AFTER", help="the commit to compare with BEFORE")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    arguments = parser.parse_args()

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpletuner-compare-")))
        sides = []
        for name, commit in (("before", arguments.before), ("after", arguments.after)):
            checkout = stack.enter_context(checked_out(commit, folder / f"{name}-commit"))
            sides.append((checkout / "src", laid_out(folder / name)))
        differing = 0
        for case in arguments.only:
            began = time.monotonic()
            differences = compare_case(case, *sides)
            differing += bool(differences)
            print(f"{case:<16} {verdict(differences)}  ({time.monotonic() - began:.0f} s)", flush=True)
        (_, before), (_, after) = sides
        differences = compare_files(before / "cache", after / "cache", "**/*.safetensors")
        differing += bool(differences)
        print(f"{'caches':<16} {verdict(differences)}")
    checks = len(arguments.only) + 1
    print(f"{checks - differing} of {checks} equal: {arguments.before} and {arguments.after}")
    return 1 if differing else 0


def verdict(differences: list[str]) -> str:
    if not differences:
        return "equal"
    more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
    return f"DIFFERENT: {'; '.join(differences[:3])}{more}"


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A context with a worktree of `commit` in `folder`."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def laid_out(work: Path) -> Path:
    """Prepare a working folder with images, captions and configuration, as a user has one."""
    images = work / "datasets" / "images"
    images.mkdir(parents=True)
    (work / "config").mkdir()
    for index, size in enumerate(SIZES):
        gradient = Image.linear_gradient("L")
        bands = (gradient.rotate(90).resize(size), gradient.resize(size), Image.new("L", size, 60 * index))
        Image.merge("RGB", bands).save(images / f"image-{index}.png")
        caption = " ".join(["a soft gradient", *["with more words"] * index])
        (images / f"image-{index}.txt").write_text(caption, encoding="utf-8")
    config = CONFIG | {"eval_dataset_id": "held-out"}
    contents = {"config": config, "multidatabackend": DATASETS, "user_prompt_library": PROMPTS}
    for name, content in contents.items():
        (work / "config" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return work


def compare_case(case: str, before: tuple[Path, Path], after: tuple[Path, Path]) -> list[str]:
    """Train the case with both sides, each a source folder and a working folder. Returns the differences."""
    ends = []
    for name, (source, work) in (("BEFORE", before), ("AFTER", after)):
        done = train(source, work, [*CASES[case], f"--output_dir=output/{case}"])
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            ends.append(f"{name} exits with {done.returncode}: {last}")
    if ends:
        return ends
    old, new = (work / "output" / case for _, work in (before, after))
    differences = []
    for kind, fields in (("step", STEP_FIELDS), ("validation", VALIDATION_FIELDS)):
        differences += compare_events(kind, read_events(old, kind, fields), read_events(new, kind, fields))
    for pattern in ("**/*.safetensors", "**/*.png"):
        differences += compare_files(old, new, pattern)
    return differences


def train(source: Path, work: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `simpletuner train FLAGS` of the code in `source` in the folder `work`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment |= {"MKL_CBWR": "AUTO,STRICT", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONPATH": str(source), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-P", "-m", "simpletuner", "train", *flags]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)


def read_events(run: Path, kind: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The compared fields of each event of this type. A NaN becomes a string, so that it equals itself."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line, parse_constant=str) for line in lines]
    return [{field: event[field] for field in fields} for event in events if event["type"] == kind]


def compare_events(kind: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    if not before or len(before) != len(after):
        return [f"{len(before)} and {len(after)} {kind} events"]
    return [
        f"{kind} {old['step']}: {field} {old[field]} and {new[field]}"
        for old, new in zip(before, after, strict=True)
        for field in old
        if old[field] != new[field]
    ]


def compare_files(before: Path, after: Path, pattern: str) -> list[str]:
    """Compare the files below two folders byte for byte; at least one must exist."""
    found = [{path.relative_to(root): path for path in root.glob(pattern)} for root in (before, after)]
    if not found[0]:
        return [f"no {pattern} in {before.name}"]
    differences = [f"{name} is on one side only" for name in sorted(found[0].keys() ^ found[1].keys())]
    for name in sorted(found[0].keys() & found[1].keys()):
        contents = [files[name].read_bytes() for files in found]
        if contents[0] != contents[1]:
            how = weight_difference(*contents) if name.suffix == ".safetensors" else "differs"
            differences.append(f"{name} {how}")
    return differences


def weight_difference(before: bytes, after: bytes) -> str:
    """Whether two different safetensors files differ in their tensors or only in their headers."""
    (old, old_data), (new, new_data) = split_header(before), split_header(after)
    notes = [header.pop("__metadata__", {}) for header in (old, new)]
    if old != new:
        return "has other tensors"
    if old_data != new_data:
        return "differs in values"
    keys = sorted(key for key in notes[0].keys() | notes[1].keys() if notes[0].get(key) != notes[1].get(key))
    return f"differs only in its header: {', '.join(keys) or 'layout'}"


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and the bytes of its tensors."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header, content[8 + size :]


if __name__ == "__main__":
    sys.exit(main())
