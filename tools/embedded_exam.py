"""Count how many prompts that were not trained on the embedded model gets right, alone and with a LoRA.

python tools/embedded_exam.py                   the base model
python tools/embedded_exam.py RUN_OR_LORA       the base model, and the base model with the LoRA
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from embedded_judge import FLAG_SHARE, Score, Share, flag_share, judge
from simpletuner.base.errors import UserError
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.model import ModelOptions
from simpletuner.examples.pictures import held_out_flags
from simpletuner.examples.world import SIDE, held_out_scenes
from simpletuner.flow.condition import Condition, Denoise, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.export import attach_saved, read_lora
from simpletuner.flux2.generate import Decode, initial_noise, sample_latents, to_image
from simpletuner.flux2.load import load_autoencoder, load_text_encoder, load_transformer
from simpletuner.flux2.source import locate
from simpletuner.flux2.text import TextEncoder
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.train.drift import DRIFT_STEPS, drift_of

BATCH = 25
"""Images per batch: on a CPU a batch takes a third of the time of its images one by one."""


DRIFT_PROMPTS = tuple(scene.caption for scene in random.Random(0).sample(held_out_scenes(), 8))
"""Prompts of known scenes, whose images training on flags should not change."""

SHAPES = 3
"""Prompts for shapes per prompt for a flag. Training costs few of the shapes, so a small number would not show the
loss.
"""


@dataclass(frozen=True)
class Candidate:
    """The parts of a model that generates images, resident on the CPU."""

    transformer: Flux2Transformer
    decode: Decode
    text_encoder: TextEncoder

    @classmethod
    def load(cls, options: ModelOptions, dtype: torch.dtype = torch.float32) -> "Candidate":
        """Load the model that `options` name, as `dtype`.

        Raises:
            AccessError: it does not exist, or is not a FLUX.2.
        """
        source = locate(options, report=lambda text: None)
        encoder = load_text_encoder(source, dtype, "cpu", fix_regex=False)
        decode = load_autoencoder(source, torch.float32, "cpu").decode
        return cls(load_transformer(source, dtype, "cpu"), decode, encoder)

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """The context of each prompt."""
        batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        encoded = [context for batch in self.text_encoder.encode_batches(batches) for context in batch]
        return TextContext.stacked(encoded)

    def draw(self, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
        """An image for each prompt, 128x128, with the flavour's steps and guidance; image i starts from the noise of
        `seed` + i.
        """
        return draw(Denoiser(self.transformer), self.decode, self.encode(prompts), seed)

    def drift_latents(self, seed: int = 0) -> list[Tensor]:
        """The final latents of each of `DRIFT_PROMPTS`, for `drift_of` to compare with another model's."""
        condition = Condition.at(self.encode(DRIFT_PROMPTS), FLAVOURS["tiny"].guidance)
        noise = torch.cat([initial_noise(seed + index, width=SIDE, height=SIDE) for index in range(len(DRIFT_PROMPTS))])
        return [*sample_latents(Denoiser(self.transformer), noise, condition, steps=DRIFT_STEPS)]


@torch.no_grad()
def draw(denoise: Denoise, decode: Decode, contexts: TextContext, seed: int) -> list[Image.Image]:
    """An image for each context; image i starts from the noise of `seed` + i. The transformer is in eval mode."""
    flavour = FLAVOURS["tiny"]
    pictures = []
    condition = Condition.at(contexts, flavour.guidance)
    for part in torch.arange(len(contexts.index)).split(BATCH):
        noise = torch.cat([initial_noise(seed + int(i), width=SIDE, height=SIDE) for i in part])
        latents = sample_latents(denoise, noise, condition.select(part), steps=flavour.steps)
        pictures += [to_image(pixels) for pixels in decode(latents)]
    return pictures


@dataclass(frozen=True)
class Grades:
    """Results for prompts of scenes that were not trained on."""

    flags: Share
    """Prompts for a flag whose image has one."""
    shapes: Score
    """Scores of the prompts for known shapes."""
    drift: float | None = None
    """Drift of the images of `DRIFT_PROMPTS` from the base model's: `simpletuner.train.drift.drift_of`, mean over the
    prompts. None for the base model itself.
    """

    @property
    def prior(self) -> float:
        """The share of images with the right shape in the right color."""
        return self.shapes.shares["color and shape"].value

    def __str__(self) -> str:
        drift = "" if self.drift is None else f"\ndrift             {self.drift:.3f}"
        return f"zorblat flags     {self.flags}\n{self.shapes}{drift}"


def examine(candidate: Candidate, pictures: int, seed: int = 0, base: Sequence[Tensor] | None = None) -> Grades:
    """Generate images for `pictures` flags, at most the 50 that were not trained on, and for `SHAPES` times as many
    shapes. The drift is from `base`, the base model's `drift_latents`.
    """
    chance = random.Random(seed)
    flags = held_out_flags()
    flags = chance.sample(flags, min(pictures, len(flags)))
    scenes = chance.sample(held_out_scenes(), SHAPES * pictures)
    drawn = candidate.draw([*(flag.caption for flag in flags), *(scene.caption for scene in scenes)], seed)
    shown = sum(flag_share(image) >= FLAG_SHARE for image in drawn[: len(flags)])
    verdicts = [judge(image, scene) for image, scene in zip(drawn[len(flags) :], scenes, strict=True)]
    drift = None
    if base is not None:
        pairs = zip(candidate.drift_latents(seed), base, strict=True)
        drift = sum(drift_of(latents, before) for latents, before in pairs) / len(DRIFT_PROMPTS)
    return Grades(Share(shown, len(flags)), Score.of(verdicts), drift)


def main(arguments: Sequence[str]) -> int:
    """Print the grades. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/embedded_exam.py", description="Judge what the embedded model draws."
    )
    parser.add_argument("lora", nargs="?", type=Path, help="a LoRA file, or the folder of a run")
    parser.add_argument(
        "--pictures", type=int, default=50, help="prompts for flags (50); three times as many for shapes"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        saved = None if given.lora is None else read_lora(given.lora)
        candidate = Candidate.load(ModelOptions(model_flavour="tiny"))
        print(f"Base model, right of what was asked for:\n{examine(candidate, given.pictures, given.seed)}", flush=True)
        if saved is not None:
            base = candidate.drift_latents(given.seed)
            attach_saved(candidate.transformer, saved)
            print(f"With {given.lora}:\n{examine(candidate, given.pictures, given.seed, base)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
