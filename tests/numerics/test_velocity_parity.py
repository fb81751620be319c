"""The velocity against diffusers' transformer with the same weights."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from simpletuner.config.flavours import TINY, TINY_KLEIN, TransformerSpec
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents
from simpletuner.flux2.transformer import Flux2Transformer


def pair(spec: TransformerSpec, dtype: torch.dtype = torch.float32) -> tuple[Flux2Transformer, torch.nn.Module]:
    """Our transformer and diffusers', same weights, norms not at their initial ones."""
    from diffusers import Flux2Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = Flux2Transformer(spec)
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1, std=0.2)
    config = {key: value for key, value in transformer_to_diffusers(spec).items() if key != "_class_name"}
    theirs = Flux2Transformer2DModel(**config)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def draw(height: int, width: int, length: int, batch: int, spec: TransformerSpec = TINY) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    latents = torch.randn(batch, 128, height, width, generator=generator)
    return latents, torch.randn(batch, length, spec.context_dim, generator=generator)


def asked_of_diffusers(
    theirs: torch.nn.Module, latents: Tensor, sigma: Tensor, context: Tensor, guidance: Tensor | None
) -> Tensor:
    height, width = latents.shape[-2:]
    tokens: Tensor = theirs(
        hidden_states=pack_latents(latents),
        encoder_hidden_states=context,
        timestep=sigma,
        guidance=guidance,
        img_ids=image_ids(height, width),
        txt_ids=context_ids(context.shape[1]),
        return_dict=False,
    )[0]
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("spec", [TINY, TINY_KLEIN], ids=["dev", "klein"])
@pytest.mark.parametrize(("height", "width", "length"), [(1, 1, 1), (4, 4, 16), (3, 7, 24), (8, 2, 512)])
@torch.no_grad()
def test_velocity_in_fp32(spec: TransformerSpec, height: int, width: int, length: int) -> None:
    ours, theirs = pair(spec)
    latents, context = draw(height, width, length, 2, spec)
    for sigmas, scales in (
        ((0.0, 1.0), (1.0, 4.0)),
        ((0.3517, 0.9137), (2.5, 0.0)),
        ((0.5, 0.5), (4.0, 4.0)),
    ):
        sigma, guidance = torch.tensor(sigmas), torch.tensor(scales)
        expected = asked_of_diffusers(theirs, latents, sigma, context, guidance if spec.guidance_embeds else None)
        assert (
            relative(Denoiser(ours)(latents, sigma, Condition(TextContext.dense(context), guidance)), expected) <= 1e-5
        )


@torch.no_grad()
def test_velocity_in_bf16() -> None:
    """Both round at the same places. One step of bf16 at the largest numbers, 2^-7 of them, is left to kernels that sum
    in another order, and in the mean a seventh of what bf16 costs.
    """
    ours, theirs = pair(TINY, torch.bfloat16)
    exact, _ = pair(TINY)
    latents, context = draw(4, 6, 32, batch=2)
    # Numbers that bf16 holds, so that sigma · 1000 is the same on both sides.
    sigma, guidance = torch.tensor([0.25, 0.75]), torch.tensor([1.0, 4.0])
    found = Denoiser(ours)(latents, sigma, Condition(TextContext.dense(context), guidance))
    assert found.dtype == torch.bfloat16
    half = [tensor.bfloat16() for tensor in (latents, sigma, context, guidance)]
    expected = asked_of_diffusers(theirs, *half)
    reference = Denoiser(exact)(latents, sigma, Condition(TextContext.dense(context), guidance))
    assert relative(found, expected) <= 2**-7
    assert (found - expected).float().norm() <= (found - reference).float().norm() / 7
    assert relative(found, reference) <= 5e-2  # what bf16 costs over eight blocks, in both


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch() -> None:
    """1e-5: matrix products of another height may add in another order."""
    ours, _ = pair(TINY)
    latents, context = draw(3, 5, 12, batch=2)
    sigma, guidance = torch.tensor([0.2, 0.8]), torch.tensor([1.0, 4.0])
    both = Denoiser(ours)(latents, sigma, Condition(TextContext.dense(context), guidance))
    for index in range(2):
        one = slice(index, index + 1)
        alone = Denoiser(ours)(latents[one], sigma[one], Condition(TextContext.dense(context[one]), guidance[one]))
        assert relative(alone, both[one]) <= 1e-5
