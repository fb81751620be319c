"""Drawing with a model that is only a formula: the right answer is known."""

import pytest
import torch
from torch import Tensor

from simpletuner.flow.condition import Condition, Denoise, TextContext
from simpletuner.flow.sigma import schedule
from simpletuner.flux2.generate import generate, initial_noise, sample_latents, to_image


def conditions(*contexts: float, guidance: float = 4.0) -> Condition:
    """One sample for each number, whose context is that number."""
    return Condition.at(TextContext.dense(torch.tensor(contexts).reshape(-1, 1, 1)), guidance)


def toward(target: float) -> Denoise:
    """The exact velocity field of a data set with one point: Euler reaches it in any number of steps."""

    def denoise(latents: Tensor, sigma: Tensor, _condition: Condition) -> Tensor:
        return (latents - target) / sigma

    return denoise


def test_noise_belongs_to_the_seed_and_size() -> None:
    noise = initial_noise(5, width=64, height=32)
    assert noise.shape == (1, 128, 2, 4)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, initial_noise(5, width=64, height=32))
    assert not torch.equal(noise, initial_noise(6, width=64, height=32))
    # torch's CPU generator is the same everywhere: these numbers must not change between releases of ours.
    assert noise.flatten()[:3].tolist() == pytest.approx([1.84233, 0.51889, -1.71192], abs=1e-5)
    with pytest.raises(ValueError, match="60 × 32"):
        initial_noise(5, width=60, height=32)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_it_follows_the_field_to_its_end(steps: int) -> None:
    latents = sample_latents(toward(0.25), initial_noise(0, width=32, height=48), conditions(0.0), steps=steps)
    torch.testing.assert_close(latents, torch.full((1, 128, 3, 2), 0.25), rtol=0, atol=1e-5)


def test_what_the_model_is_asked() -> None:
    asked = []

    def denoise(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        asked.append((latents.dtype, sigma, condition.context.expanded(), condition.guidance))
        return torch.zeros_like(latents, dtype=torch.bfloat16)

    context = torch.arange(6.0).reshape(1, 2, 3)
    steps: list[int] = []
    noise = initial_noise(0, width=32, height=32)
    latents = sample_latents(
        denoise, noise, Condition.at(TextContext.dense(context), 2.5), steps=4, report=steps.append
    )
    assert torch.equal(latents, noise)
    assert latents.dtype == torch.float32
    assert [float(sigma) for _, sigma, _, _ in asked] == pytest.approx(schedule(4, 4)[:-1])
    assert all(dtype == torch.float32 and float(g) == 2.5 for dtype, _, _, g in asked)
    assert all(torch.equal(given, context) for _, _, given, _ in asked)
    assert steps == [1, 2, 3, 4]


def test_real_guidance_goes_past_the_negative() -> None:
    batches = []

    def denoise(latents: Tensor, _sigma: Tensor, condition: Condition) -> Tensor:
        batches.append(len(latents))
        return condition.context.expanded()[..., None] * torch.ones_like(latents)

    noise = initial_noise(0, width=16, height=16)
    positive, negative = conditions(2.0), conditions(0.5)

    def drawn(real: float, negative: Condition | None, both_at_once: bool = False) -> Tensor:
        return sample_latents(
            denoise, noise, positive, steps=2, real_guidance=real, negative=negative, both_at_once=both_at_once
        )

    # From sigma 1 to 0 a constant velocity is subtracted once.
    torch.testing.assert_close(drawn(3.0, negative), noise - (0.5 + 3 * (2.0 - 0.5)))
    assert torch.equal(drawn(3.0, negative, both_at_once=True), drawn(3.0, negative))
    assert batches == [1] * 4 + [2] * 2 + [1] * 4
    assert torch.equal(drawn(1.0, negative), drawn(1.0, None))
    with pytest.raises(ValueError, match="negative"):
        drawn(2.0, None)


def test_a_picture_depends_on_its_own_context_only() -> None:
    def denoise(latents: Tensor, _sigma: Tensor, condition: Condition) -> Tensor:
        return latents * condition.context.expanded().mean()

    def decode(latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(16, 2).repeat_interleave(16, 3).clamp(-1, 1)

    contexts = (0.1, 0.7, 0.4)
    told: list[tuple[int, int]] = []
    size = {"width": 32, "height": 16, "steps": 3, "seed": 9}
    all_three = generate(denoise, decode, conditions(*contexts), **size, report=lambda *done: told.append(done))
    assert [image.size for image in all_three] == [(32, 16)] * 3
    assert told == [(step, 9) for step in range(1, 10)]
    for context, image in zip(contexts, all_three, strict=True):
        (alone,) = generate(denoise, decode, conditions(context), **size)
        assert alone.tobytes() == image.tobytes()
    assert all_three[0].tobytes() != all_three[1].tobytes()


def test_no_gradient_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    latents = sample_latents(
        lambda x, *_: x * weight,
        initial_noise(0, width=16, height=16),
        conditions(0.0),
        steps=2,
    )
    assert not latents.requires_grad


def test_pixels_become_levels_by_rounding() -> None:
    values = torch.tensor([-1.5, -1.0, -1 + 2.9 / 255, 0.0, 1.0, 2.0])
    image = to_image(values.expand(3, 1, 6))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 1, 128, 255, 255]
