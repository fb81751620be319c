"""The positions that a denoiser keeps: the same bits, made once for each size, of use to every kind of pass."""

import pytest
import torch
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import CACHED_POSITIONS, Denoiser
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, unpack_latents
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute

SPEC = TransformerSpec(
    heads=1, head_dim=8, double_blocks=1, single_blocks=2, context_dim=8, guidance_embeds=True, axes=(2, 2, 2, 2)
)
LENGTH = 5


def model() -> Flux2Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flux2Transformer(SPEC).train()


def given(height: int, width: int) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 128, height, width, generator=generator)
    context = torch.randn(2, LENGTH, SPEC.context_dim, generator=generator)
    return latents, torch.tensor([0.3, 0.6]), Condition.at(TextContext.dense(context), 1.0)


def gradients(transformer: Flux2Transformer, velocity: Tensor) -> list[Tensor]:
    transformer.zero_grad()
    velocity.square().mean().backward()
    return [parameter.grad for parameter in transformer.parameters() if parameter.grad is not None]


def test_kept_positions_change_no_bit() -> None:
    transformer = model()
    denoise = Denoiser(transformer)
    for height, width in ((4, 6), (6, 4), (3, 8), (4, 6)):
        latents, sigma, condition = given(height, width)
        tokens = transformer(
            pack_latents(latents),
            condition.context.expanded(),
            sigma,
            condition.guidance,
            image_ids(height, width),
            context_ids(LENGTH),
        )
        expected = unpack_latents(tokens, height, width)
        found = denoise(latents, sigma, condition)
        assert torch.equal(found, expected)
        wanted = gradients(transformer, expected)
        assert all(torch.equal(*pair) for pair in zip(gradients(transformer, found), wanted, strict=True))


def test_positions_are_made_once_for_each_size_and_the_oldest_are_dropped() -> None:
    denoise = Denoiser(model())
    cpu, meta = torch.device("cpu"), torch.device("meta")
    first = denoise.positions(4, 6, LENGTH, cpu)
    assert denoise.positions(4, 6, LENGTH, cpu) is first
    for other in ((6, 4, LENGTH, cpu), (4, 6, LENGTH + 1, cpu), (4, 6, LENGTH, meta)):
        assert denoise.positions(*other) is not first
    assert denoise.positions(4, 6, LENGTH, meta).angles[0].is_meta
    for height in range(1, CACHED_POSITIONS + 1):
        denoise.positions(height, 1, LENGTH, cpu)
    assert denoise.positions(4, 6, LENGTH, cpu) is not first


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_was_made_while_sampling_serves_in_training(recomputes: bool) -> None:
    """A tensor made under inference_mode could not be saved for the backward pass."""
    found = []
    for sample in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        transformer = model()
        denoise = Denoiser(transformer)
        if recomputes:
            recompute.install(transformer.blocks)
        latents, sigma, condition = given(4, 6)
        with sample():
            denoise(latents, sigma, condition)
        routed = denoise.routed(draw_choices([Route(1, 2, 0.5)], 0, 1, [0, 1], 24))
        found.append(gradients(transformer, routed(latents, sigma, condition)))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
