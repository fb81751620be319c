"""Train the embedded model's autoencoder from scratch, on images of its scenes and on clutter."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save
from torch import Tensor

from simpletuner.base.draws import draw_seed
from simpletuner.base.files import write_atomic
from simpletuner.examples import world
from simpletuner.flux2 import tokens
from simpletuner.flux2.tiny.parts import VAE
from simpletuner.flux2.tiny.weights import draw, draw_uniform

STEPS = 2000
SMALL_SHARE = 0.4
"""Share of the steps that train at half the edge with twice the batch. At first the group norms hide an image's mean
color from an autoencoder; at that size it is learned in a quarter of the time.
"""

BATCH = 8
PEAK_RATE = 2e-3
GAINS = {"conv2": 0.5, "to_out": 0.5}
WARM_UP = 100
NOISE = 0.4
"""Largest noise on the latents, in standard deviations, so that the decoder tolerates errors of a transformer."""

EMA_DECAY = 0.995
SCALE_PENALTY = 0.003
STATISTICS_BATCHES = 32
LIVE, AVERAGE, FIRST, SECOND = "live/", "average/", "first/", "second/"


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the weights."""

    seed: int
    steps: int = STEPS
    pictures: int = 2400


def clutter(chance: random.Random) -> Image.Image:
    """An image of no scene: overlapping shapes of any color, size and tilt. The autoencoder needs such images to encode
    others than those of its scenes.
    """
    picture = world.background(_any_color(chance), chance)
    for _ in range(chance.randint(1, 6)):
        center = (chance.uniform(0, world.SIDE), chance.uniform(0, world.SIDE))
        mask = world.silhouette(chance.choice(world.SHAPES), center, chance.uniform(16, 110))
        mask = mask.rotate(chance.uniform(0, 360), Image.Resampling.BILINEAR)
        match chance.randrange(3):
            case 0:
                filling = Image.new("RGB", picture.size, _any_color(chance))
            case 1:
                filling = world.background(_any_color(chance), chance)
            case _:
                filling = _stripes(chance)
        picture.paste(filling, mask=mask)
    return picture


def _stripes(chance: random.Random) -> Image.Image:
    picture = Image.new("RGB", (world.SIDE, world.SIDE))
    pen = ImageDraw.Draw(picture)
    colors = [_any_color(chance) for _ in range(chance.randint(2, 3))]
    height = chance.randint(6, 20)
    for index, top in enumerate(range(0, world.SIDE, height)):
        pen.rectangle((0, top, world.SIDE, top + height - 1), colors[index % len(colors)])
    return picture.rotate(chance.choice((0, 90)))


def _any_color(chance: random.Random) -> world.Rgb:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def pictures(recipe: Recipe) -> UInt8[Tensor, "n 3 side side"]:
    """Training images: half scenes, half clutter."""
    scenes = world.training_scenes()
    drawn = []
    for index in range(recipe.pictures):
        chance = random.Random(f"{recipe.seed}/autoencoder/{index}")
        picture = clutter(chance) if index % 2 else world.draw_scene(chance.choice(scenes), chance)
        drawn.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    return rearrange(torch.stack(drawn), "n (h w c) -> n c h w", h=world.SIDE, w=world.SIDE)


def train(folder: Path, recipe: Recipe, say: Callable[[str], None], *, every: int = 100) -> dict[str, Tensor]:
    """Train the autoencoder; returns its tensors, fp32, with measured statistics. Resumes a killed call in `folder`.

    The loss is the L1 of the pixels and of their differences; latents are the posterior's mean plus noise instead of a
    sample.
    """
    from diffusers import AutoencoderKLFlux2  # seconds to import

    data = pictures(recipe)
    vae = AutoencoderKLFlux2.from_config(VAE).to(memory_format=torch.channels_last)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items() if not name.startswith("bn.")}
    start = draw("vae", shapes, GAINS, recipe.seed)
    # A group norm after a convolution without bias maps black, gray and white to the same.
    for name in ("encoder.conv_in.bias", "decoder.conv_in.bias"):
        start[name] = draw_uniform(shapes[name], 0.5, recipe.seed, "vae", name)
    vae.load_state_dict(start, strict=False)
    state = _State(vae, folder / "autoencoder-training.safetensors")
    first = state.load()
    if first:
        say(f"autoencoder: resuming from step {first} of {recipe.steps}")
    rates = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: _rate(step + first, recipe.steps))
    began, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        losses.append(_step(vae, state, data, recipe, step))
        rates.step()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            state.save(step + 1)
            seconds = (time.monotonic() - began) / len(losses)
            mean = sum(losses[-every:]) / len(losses[-every:])
            say(f"autoencoder: step {step + 1}, L1 {mean:.4f} of a range of 2, {seconds:.3f} s a step")
    state.use_average()
    with torch.no_grad():
        _measure_statistics(vae, data, recipe)
        _sheet(vae, data[:8]).save(folder / "autoencoder.png")
    return {name: tensor.detach().contiguous() for name, tensor in vae.state_dict().items()}


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / WARM_UP, 1) * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))


def _step(vae: Any, state: "_State", data: Tensor, recipe: Recipe, step: int) -> float:
    """Make one step; returns the L1 loss."""
    chance = torch.Generator().manual_seed(draw_seed(recipe.seed, "noise", "autoencoder", step))
    is_small = step < SMALL_SHARE * recipe.steps
    batch = 2 * BATCH if is_small else BATCH
    pixels = data[torch.randint(len(data), (batch,), generator=chance)].float() / 127.5 - 1
    if is_small:
        pixels = F.avg_pool2d(pixels, 2)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        latents = tokens.patchify(vae.encode(pixels).latent_dist.mode()).float()
        mean, deviation = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
        # Grows with the steps: at first noise would hide everything.
        level = NOISE * min(1, step / (SMALL_SHARE * recipe.steps)) * torch.rand(batch, 1, 1, 1, generator=chance)
        noisy = latents + deviation * level * torch.randn(latents.shape, generator=chance)
        shown = vae.decode(tokens.unpatchify(noisy)).sample.float()
    error = shown - pixels
    l1 = error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    # Keeps every channel near mean 0 and deviation 1, so that normalization does not amplify one without content.
    scale = deviation.log().square().mean() + (mean / deviation).square().mean()
    (l1 + edges + SCALE_PENALTY * scale).backward()
    state.step(step)
    return float(l1)


class _State:
    """Parameters, their average and the optimizer, saved to disk at intervals."""

    def __init__(self, vae: Any, file: Path) -> None:
        self.file = file
        self.parameters = dict(vae.named_parameters())
        self.average = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, step: int) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(EMA_DECAY, (step + 1) / (step + 10))
        live = [tensor.detach() for tensor in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - keep)

    def save(self, step: int) -> None:
        moments = {name: self.optimizer.state[tensor] for name, tensor in self.parameters.items()}
        tensors = {LIVE + name: tensor.detach().contiguous() for name, tensor in self.parameters.items()}
        tensors |= {AVERAGE + name: tensor.contiguous() for name, tensor in self.average.items()}
        tensors |= {FIRST + name: state["exp_avg"].contiguous() for name, state in moments.items()}
        tensors |= {SECOND + name: state["exp_avg_sq"].contiguous() for name, state in moments.items()}
        write_atomic(self.file, save(tensors | {"step": torch.tensor(step)}))

    def load(self) -> int:
        """Load the saved state; returns the step to resume from."""
        if not self.file.exists():
            return 0
        tensors = load_file(self.file)
        step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[LIVE + name])
            self.average[name].copy_(tensors[AVERAGE + name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter).copy_(tensors[FIRST + name]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[SECOND + name]),
            }
        return step

    def use_average(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.average[name])


def _measure_statistics(vae: Any, data: Tensor, recipe: Recipe) -> None:
    """Measure the batch norm's mean and variance over scenes, because the transformer is to generate these."""
    scenes = data[::2]
    chosen = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(recipe.seed))
    batches = [scenes[part].float() / 127.5 - 1 for part in chosen[: STATISTICS_BATCHES * BATCH].split(BATCH)]
    latents = torch.cat([tokens.patchify(vae.encode(batch).latent_dist.mode()) for batch in batches])
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))
    vae.bn.num_batches_tracked.fill_(1)


def _sheet(vae: Any, data: UInt8[Tensor, "n 3 h w"]) -> Image.Image:
    """Write images above their reconstructions."""
    pixels = data.float() / 127.5 - 1
    shown: Float[Tensor, "n 3 h w"] = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    rows = torch.stack([pixels, shown])
    levels = rearrange((rows + 1) * 127.5, "rows n c h w -> (rows h) (n w) c").round().to(torch.uint8)
    return Image.fromarray(levels.numpy())
