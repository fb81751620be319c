"""Measure whether a LoRA learns an edit that text cannot specify: the color of a shape, which only a reference shows.

    python tools/embedded_edit.py FOLDER               train with references and without, and evaluate both
    python tools/embedded_edit.py FOLDER --steps 50    the number of steps of each training

FOLDER gets the images, both runs and their logs; existing runs are resumed. The three rows of FOLDER/edit.jpg show
references, the images generated with them, and the images generated without.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from embedded_exam import BATCH, Candidate
from embedded_judge import Share, judge, mean_and_error
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.cache.latents import Encode, encode_crop
from simpletuner.data.references import reference_crops
from simpletuner.examples.world import COLORS, SHAPES, SIDE, Scene, draw_scene, held_out_scenes, training_scenes
from simpletuner.flow.condition import Condition, References
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.export import attach_saved, read_lora
from simpletuner.flux2.generate import initial_noise, sample_latents, to_image
from simpletuner.flux2.load import load_autoencoder
from simpletuner.flux2.source import locate
from simpletuner.flux2.tokens import reference_tokens
from simpletuner.train.timesteps import Timesteps

TRAINED = 320
SHOWN = 8
"""Largest number of pairs in `edit.jpg`."""
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the training density of sigma at which the held-out loss is measured: the middles of five equal parts.
"""

SHIFT = 5.0

CONFIG = {
    "model_flavour": "tiny",
    "mixed_precision": "no",
    "lora_rank": 32,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "train_batch_size": 8,
    "flow_schedule_shift": SHIFT,
    "caption_dropout_probability": 0.0,
    "gradient_checkpointing": False,
    "validation_disable": True,
    "checkpoint_step_interval": 1000,
    "vae_dtype": "fp32",
    "vae_batch_size": 8,
}
"""The settings of the example tiny-lora, but in fp32."""

_SCHEDULE = Timesteps.of(ScheduleOptions(flow_schedule_shift=SHIFT))
SIGMAS = tuple(_SCHEDULE.sigma(level, tokens=64) for level in LEVELS)


@dataclass(frozen=True)
class Pair:
    """The scene to generate, and the image that shows its color: another shape on another background."""

    scene: Scene
    shown: Scene

    @property
    def caption(self) -> str:
        """The scene's caption without its color."""
        return self.scene.caption.replace(f" {self.scene.color} {self.scene.shape}", f" {self.scene.shape}")


def pairs(scenes: Sequence[Scene], count: int, chance: random.Random) -> list[Pair]:
    """`count` of `scenes`, each with a reference."""
    found = []
    for scene in chance.sample(scenes, count):
        shape = chance.choice([each for each in SHAPES if each != scene.shape])
        background = chance.choice([each for each in COLORS if each not in (scene.color, scene.background)])
        found.append(Pair(scene, Scene("large", scene.color, shape, background, "middle")))
    return found


def render(folder: Path, chosen: Sequence[Pair], seed: str) -> None:
    """Draw images with captions into `folder`/after, and their references into `folder`/before."""
    for part in ("after", "before"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index, pair in enumerate(chosen):
        chance = random.Random(f"{seed}/{index}")
        draw_scene(pair.scene, chance).save(folder / "after" / f"{index:03d}.png")
        draw_scene(pair.shown, chance).save(folder / "before" / f"{index:03d}.png")
        (folder / "after" / f"{index:03d}.txt").write_text(f"{pair.caption}\n", encoding="utf-8")


def train(folder: Path, name: str, steps: int, *, has_references: bool) -> Path:
    """Train a LoRA on the pairs in `folder`/train; returns the run's folder."""
    images = {
        "id": "after",
        "instance_data_dir": "train/after",
        "caption_strategy": "textfile",
        "resolution": SIDE,
        "cache_dir_vae": "cache/after",
    }
    before = {
        "id": "before",
        "dataset_type": "conditioning",
        "conditioning_type": "reference_loose",
        "instance_data_dir": "train/before",
        "cache_dir_vae": "cache/before",
    }
    text = {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"}
    listed = [images | {"conditioning_data": "before"}, before, text] if has_references else [images, text]
    (folder / f"{name}-data.json").write_text(json.dumps(listed, indent=2))
    config = CONFIG | {"max_train_steps": steps, "output_dir": name, "data_backend_config": f"{name}-data.json"}
    (folder / f"{name}.json").write_text(json.dumps(config, indent=2))
    command = [sys.executable, "-P", "-m", "simpletuner", "train", f"--config={name}.json"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / name


@dataclass(frozen=True)
class EditGrades:
    """Results on the held-out pairs."""

    colors: Share
    """Images whose shape has the reference's color."""
    everything: Share
    losses: Float[Tensor, "sigmas pairs"]
    """Flow-matching loss of each pair at each sigma of `SIGMAS`, with the same noise for every model."""


@torch.no_grad()
def grade(folder: Path, chosen: Sequence[Pair], run: Path, *, has_references: bool) -> EditGrades:
    """Generate the held-out pairs with a run's LoRA, and measure their loss."""
    options = ModelOptions(model_flavour="tiny")
    candidate = Candidate.load(options)
    attach_saved(candidate.transformer, read_lora(run))
    denoise = Denoiser(candidate.transformer.eval())
    encode = load_autoencoder(locate(options, report=lambda text: None), torch.float32, "cpu").encode
    latents = {part: encoded(folder / "held-out" / part, len(chosen), encode) for part in ("after", "before")}
    contexts = candidate.encode([pair.caption for pair in chosen])
    references = None
    if has_references:
        references = References.stacked([reference_tokens([each]) for each in latents["before"]], [1] * len(chosen))
    condition = replace(Condition.at(contexts, FLAVOURS["tiny"].guidance), references=references)
    training = replace(condition, guidance=torch.ones(len(chosen)))  # as it was trained
    clean = torch.stack(latents["after"])
    drawn: list[Image.Image] = []
    losses = []
    for part in torch.arange(len(chosen)).split(BATCH):
        noise = torch.cat([initial_noise(int(index), width=SIDE, height=SIDE) for index in part])
        final = sample_latents(denoise, noise, condition.select(part), steps=FLAVOURS["tiny"].steps)
        drawn += [to_image(pixels) for pixels in candidate.decode(final)]
        each = [
            flow_loss(denoise, clean[part], training.select(part), sigma=torch.full((len(part),), sigma), noise=noise)
            for sigma in SIGMAS
        ]
        losses.append(torch.stack(each))
    verdicts = [judge(image, pair.scene) for image, pair in zip(drawn, chosen, strict=True)]
    for index, image in enumerate(drawn):
        image.save(run / f"held-out-{index:03d}.png")
    right = {name: sum(verdict.right[name] for verdict in verdicts) for name in ("color", "everything")}
    return EditGrades(
        Share(right["color"], len(verdicts)), Share(right["everything"], len(verdicts)), torch.cat(losses, dim=1)
    )


def encoded(folder: Path, count: int, encode: Encode) -> list[Float[Tensor, "128 h w"]]:
    """The latents of the first `count` images in `folder`, by name; an earlier run may have left more images."""
    crops = reference_crops(str(path) for path in sorted(folder.glob("*.png"))[:count])
    return [encode_crop(crop, encode) for crop in crops.values()]


def sheet(folder: Path, count: int) -> Image.Image:
    """Three rows for the first `count` held-out pairs: references, images generated with them, images generated
    without.
    """
    gap = 4
    image = Image.new("RGB", (count * (SIDE + gap) - gap, 3 * (SIDE + gap) - gap), "white")
    for index in range(count):
        rows = (
            folder / "held-out" / "before" / f"{index:03d}.png",
            folder / "with" / f"held-out-{index:03d}.png",
            folder / "without" / f"held-out-{index:03d}.png",
        )
        for row, path in enumerate(rows):
            with Image.open(path) as drawn:
                image.paste(drawn, (index * (SIDE + gap), row * (SIDE + gap)))
    return image


def main(arguments: Sequence[str]) -> int:
    """Print what was learned with references and without. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/embedded_edit.py", description="Train and judge an edit that text cannot give."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800, help="steps of each training (800)")
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs to evaluate (100)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    most = len(held_out_scenes())
    if not 2 <= given.pairs <= most:  # one has no standard error
        parser.error(f"--pairs must be from 2 to {most}")
    folder = given.folder
    chance = random.Random(given.seed)
    render(folder / "train", pairs(training_scenes(), TRAINED, chance), f"{given.seed}/train")
    held_out = pairs(held_out_scenes(), given.pairs, chance)
    render(folder / "held-out", held_out, f"{given.seed}/held-out")
    grades: Mapping[str, EditGrades] = {
        name: grade(
            folder,
            held_out,
            train(folder, name, given.steps, has_references=name == "with"),
            has_references=name == "with",
        )
        for name in ("with", "without")
    }
    sheet(folder, min(given.pairs, SHOWN)).save(folder / "edit.jpg", quality=90)
    for name, found in grades.items():
        print(
            f"{name:<8} references: color {found.colors}, everything {found.everything}, "
            f"held-out loss {found.losses.mean():.4f}"
        )
    gains = grades["without"].losses - grades["with"].losses
    print(f"loss without less loss with: {mean_and_error(gains.mean(0).tolist(), 4)}")
    for sigma, by_pair in zip(SIGMAS, gains, strict=True):
        print(f"  at sigma {sigma:.3f}: {mean_and_error(by_pair.tolist(), 4)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
