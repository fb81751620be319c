"""Sample images from noise and a prompt's context. Independent of files and options, so that training can call it."""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from simpletuner.flow.condition import Condition, Denoise
from simpletuner.flow.sampler import StepsDone, euler
from simpletuner.flow.sigma import schedule
from simpletuner.flux2.activations import TransformerPass, sampling
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.free import free_memory_bytes

Decode = Callable[[Float[Tensor, "b 128 h w"]], Float[Tensor, "b 3 H W"]]
"""Latents -> pixels in [-1, 1]."""


def initial_noise(seed: int, *, width: int, height: int) -> Float[Tensor, "1 128 h w"]:
    """The initial noise of an image of `width` × `height` pixels: fp32, always drawn on the CPU."""
    if width % PIXELS_PER_TOKEN or height % PIXELS_PER_TOKEN:
        raise ValueError(f"{width} × {height} pixels: both must be multiples of {PIXELS_PER_TOKEN}")
    shape = (1, 128, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fits_both_predictions(
    transformer: Flux2Transformer, text: int, size: tuple[int, int], device: torch.device, references: int = 0
) -> bool:
    """Whether `device` has memory for both predictions of real guidance in one pass.

    Each prediction has `text` and `references` tokens; `size` is (width, height) in pixels. False on a CPU: there, one
    pass for both differs in the last bits (docs/log.md), so results would depend on free memory.
    """
    if device.type == "cpu":
        return False
    image = (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)
    both = TransformerPass(
        transformer.spec, transformer.dtype, batch=2, text_tokens=text, image_tokens=image + references
    )
    return sampling(both) <= free_memory_bytes(device)


@torch.no_grad()
def sample_latents(
    denoise: Denoise,
    noise: Float[Tensor, "b 128 h w"],
    condition: Condition,
    *,
    steps: int,
    real_guidance: float = 1.0,
    negative: Condition | None = None,
    both_at_once: bool = False,
    report: StepsDone = lambda _: None,
) -> Float[Tensor, "b 128 h w"]:
    """Sample latents by `steps` Euler steps along FLUX.2's schedule. The state stays fp32.

    Args:
        real_guidance: with any value but 1, each step predicts twice, and the velocity is
            negative + real_guidance · (positive − negative).
        both_at_once: compute both predictions in one pass with twice the batch; else one after the other.
        report: called with the number of completed steps.
    """
    if real_guidance != 1.0 and negative is None:
        raise ValueError("real_guidance needs a negative condition")

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if real_guidance == 1.0 or negative is None:
            return denoise(x, sigma, condition)
        if both_at_once:
            pair = Condition.stacked([negative, condition])
            negative_velocity, positive_velocity = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), pair).chunk(2)
        else:
            positive_velocity, negative_velocity = denoise(x, sigma, condition), denoise(x, sigma, negative)
        return negative_velocity + real_guidance * (positive_velocity - negative_velocity)

    sigmas = torch.tensor(schedule(steps, noise.shape[-2] * noise.shape[-1]), dtype=torch.float64, device=noise.device)
    return euler(velocity, noise, repeat(sigmas, "points -> points b", b=len(noise)), report)


def to_image(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """Convert pixels in [-1, 1] to an 8-bit image."""
    levels = (pixels.float().clamp(-1, 1) / 2 + 0.5).mul(255).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "c h w -> h w c").cpu().numpy())


@torch.no_grad()
def generate(
    denoise: Denoise,
    decode: Decode,
    condition: Condition,
    *,
    width: int,
    height: int,
    steps: int,
    seed: int,
    real_guidance: float = 1.0,
    negative: Condition | None = None,
    both_at_once: bool = False,
    report: Callable[[int, int], None] = lambda *_: None,
) -> list[Image.Image]:
    """Sample one image for each sample of `condition`, all from the same noise.

    Images are sampled one after the other: each depends only on its condition and `seed`, and memory only on the size.
    Runs on the device of `condition`. The caller must put the transformer into eval mode.

    Args:
        width, height: pixels, multiples of 16.
        negative: condition of one sample, with the guidance of `condition`.
        both_at_once: as in `sample_latents`; it doubles the memory.
        report: called with (completed steps, total steps), over all images.
    """
    device = condition.guidance.device
    noise = initial_noise(seed, width=width, height=height).to(device)
    count = len(condition.guidance)
    images = []
    for index in range(count):
        latents = sample_latents(
            denoise,
            noise,
            condition.select(torch.tensor([index], device=device)),
            steps=steps,
            real_guidance=real_guidance,
            negative=negative,
            both_at_once=both_at_once,
            report=lambda step, before=index * steps: report(before + step, count * steps),  # type: ignore[misc]
        )
        images.append(to_image(decode(latents)[0]))
    return images
