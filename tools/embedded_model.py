"""Make the embedded model from scratch: its training images, its autoencoder, its transformer, and their scores.

    python tools/embedded_model.py WORK [--seed 0]

Takes about an hour on two CPU cores. Resumes after a kill. WORK gets:

    world/             images with captions, and images of scenes that are not trained on
    autoencoder.png    images above their reconstructions by the autoencoder
    base/              the model before its transformer is trained
    run/               the run of `simpletuner train` with `model_type: full`, its contact sheets and its checkpoints
    scores.json        scores for 400 held-out prompts; sheet.png shows some of the images
    log.txt            what was printed, with times

The weights that the flavour `tiny` ships were made by this tool (docs/log.md has the scores).
"""

import argparse
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import embedded_autoencoder
from embedded_exam import Candidate
from embedded_judge import Score, judge
from simpletuner.base.files import write_atomic, write_json
from simpletuner.config.options.model import ModelOptions
from simpletuner.data.sheet import contact_sheet
from simpletuner.examples import world
from simpletuner.flux2.tiny.make import write_untrained
from simpletuner.runs.layout import EMA_FOLDER, TRANSFORMER_NAME

PICTURES = 8400
"""Three images of every scene."""

HELD_OUT_PICTURES = 64
TOKENS = 64
"""Length of a context: the template and a caption take 42."""

STEPS = 6000
PROMPTS = 400
SHOWN = 8
ROWS, COLUMNS = 3, 6
"""Rows and columns of sheet.png, which shows the first prompts, right or wrong."""

Say = Callable[[str], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the transformer's training")
    parser.add_argument("--autoencoder-steps", type=int, default=embedded_autoencoder.STEPS)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="number of training images")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="number of held-out prompts to score")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    say = sayer(work / "log.txt")

    draw_world(work, arguments.seed, arguments.pictures, say)
    learn_to_see(work, embedded_autoencoder.Recipe(arguments.seed, arguments.autoencoder_steps), say)
    write_untrained(work / "base", arguments.seed, work / "learned")
    configure(work, arguments.seed, arguments.steps)
    began = time.monotonic()
    # -P: the folder `datasets` of a working folder must not be taken for the library of that name.
    train = [sys.executable, "-P", "-m", "simpletuner", "train", "--config", "config/config.json"]
    done = subprocess.run(train, cwd=work, check=False)
    if done.returncode:
        return done.returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    say(f"transformer: {time.monotonic() - began:.0f} s in this call, peak {peak:.2f} GiB")
    keep(work)
    examine(work, arguments.seed, arguments.prompts, say)
    return 0


def sayer(log: Path) -> Say:
    """A function that prints and logs a line with the time since the start of this call."""
    began = time.monotonic()

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:7.0f} s  {text}"
        print(line, flush=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return say


def draw_world(work: Path, seed: int, pictures: int, say: Say) -> None:
    for name, count, is_held_out in (("train", pictures, False), ("held-out", HELD_OUT_PICTURES, True)):
        folder = work / "world" / name
        if len(list(folder.glob("*.txt"))) < count:
            world.render_scenes(folder, count, seed, held_out=is_held_out)
            say(f"world: {count} pictures in {folder.relative_to(work)}")


def learn_to_see(work: Path, recipe: embedded_autoencoder.Recipe, say: Say) -> None:
    file = work / "learned" / "vae.safetensors"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, save(in_bf16(embedded_autoencoder.train(work, recipe, say))))


def in_bf16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they are shipped: in bf16, except the batch norm's statistics, which affect every latent."""
    return {name: t if name.startswith("bn.") else t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}


def configure(work: Path, seed: int, steps: int) -> None:
    """Write the configuration of the run, as a user would."""
    prompts = random.Random(seed).sample(world.held_out_scenes(), SHOWN)
    image_set: dict[str, Any] = {
        "type": "local",
        "caption_strategy": "textfile",
        "resolution": world.SIDE,
        "resolution_type": "pixel_area",
        "crop": True,
        "crop_aspect": "square",
        "crop_style": "center",
    }
    backends = [
        {"id": "world", "instance_data_dir": "world/train", "cache_dir_vae": "cache/vae/world", **image_set},
        {
            "id": "held-out",
            "dataset_type": "eval",
            "instance_data_dir": "world/held-out",
            "cache_dir_vae": "cache/vae/held-out",
            **image_set,
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    config = {
        "model_type": "full",
        "model_family": "flux2",
        "model_flavour": "tiny",
        "pretrained_model_name_or_path": "base",
        "output_dir": "run",
        "data_backend_config": "config/multidatabackend.json",
        "seed": seed,
        "mixed_precision": "bf16",
        "tokenizer_max_length": TOKENS,
        "gradient_checkpointing": False,
        "train_batch_size": 32,
        "vae_batch_size": 16,
        "text_encoder_batch_size": 32,
        "max_train_steps": steps,
        "optimizer": "muon",
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "max_grad_norm": 1.0,
        "use_ema": True,
        "ema_decay": 0.998,
        "ema_validation": "ema_only",
        "flow_schedule_shift": 5.0,
        "flow_sigmoid_scale": 1.25,
        "caption_dropout_probability": 0.05,
        "flux_guidance_mode": "random-range",
        "flux_guidance_min": 1.0,
        "flux_guidance_max": 4.0,
        "checkpoint_step_interval": 500,
        "checkpoints_total_limit": 2,
        "eval_dataset_id": "held-out",
        "eval_steps_interval": 500,
        "validation_step_interval": 500,
        "validation_resolution": f"{world.SIDE}x{world.SIDE}",
        "user_prompt_library": "config/user_prompt_library.json",
        "disable_benchmark": True,
    }
    folder = work / "config"
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "multidatabackend.json", backends)
    write_json(folder / "user_prompt_library.json", {f"prompt_{i}": scene.caption for i, scene in enumerate(prompts)})


def keep(work: Path) -> None:
    """Copy the run's final average beside the autoencoder, in the form that is shipped."""
    trained = load_file(work / "run" / EMA_FOLDER / TRANSFORMER_NAME)
    write_atomic(work / "learned" / "transformer.safetensors", save(in_bf16(trained)))


def examine(work: Path, seed: int, prompts: int, say: Say) -> None:
    """Generate images for held-out prompts with the shipped files, as `simpletuner sample` would, and judge them."""
    folder = write_untrained(work / "model", seed, work / "learned")
    scenes = random.Random(seed).sample(world.held_out_scenes(), prompts)
    began = time.monotonic()
    candidate = Candidate.load(
        ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(folder), tokenizer_max_length=TOKENS)
    )
    pictures = candidate.draw([scene.caption for scene in scenes], seed)
    say(f"{prompts} prompts drawn in {time.monotonic() - began:.0f} s")
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    score = Score.of(verdicts)
    shares = {name: {"share": share.value, "error": share.error} for name, share in score.shares.items()}
    write_json(work / "scores.json", {"seed": seed, "prompts": prompts, "shares": shares})
    for line in str(score).splitlines():
        say(line)
    rows = [slice(start, start + COLUMNS) for start in range(0, ROWS * COLUMNS, COLUMNS)]
    captions = [[verdict.wanted.caption for verdict in verdicts[row]] for row in rows]
    sheet = contact_sheet([pictures[row] for row in rows], [""] * ROWS, [""] * COLUMNS, captions=captions)
    sheet.save(work / "sheet.png")


if __name__ == "__main__":
    sys.exit(main())
