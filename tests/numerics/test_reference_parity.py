"""The velocity with references against diffusers' transformer, which gets the same tokens and ids, one sample at a
time; what `own` sees against a mask of blocks.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.numerics.test_velocity_parity import draw, pair, relative
from torch import Tensor

from simpletuner.config.flavours import TINY, TINY_KLEIN, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents, reference_tokens, unpack_latents
from simpletuner.flux2.transformer import Flux2Transformer, plain_attention
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute

SIZES: dict[str, Sequence[Sequence[tuple[int, int]]]] = {
    "none": [[], []],
    "one": [[(4, 3)], [(3, 4)]],
    "one of two samples": [[(2, 5)], []],
    "three shapes": [[(4, 4), (2, 7), (5, 3)], [(3, 3)]],
    "three of one sample": [[], [(4, 4), (2, 7), (5, 3)]],
}
"""(height, width) of the references of each of two samples, in tokens."""


def images_of(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(128, height, width, generator=generator) for height, width in sizes]


def batched(samples: Sequence[Sequence[Tensor]]) -> References | None:
    each = [reference_tokens(images) if images else None for images in samples]
    return References.stacked(each, [1] * len(each))


def condition_of(context: Tensor, references: References | None) -> Condition:
    return Condition(TextContext.dense(context), torch.tensor([1.0, 4.0])[: len(context)], references)


def of_diffusers(
    theirs: torch.nn.Module, latents: Tensor, sigma: Tensor, context: Tensor, guidance: Tensor, images: Sequence[Tensor]
) -> Tensor:
    """The velocity of one sample: its own tokens, ids at t = 10, 20, 30, no padding."""
    height, width = latents.shape[-2:]
    ids = [image_ids(height, width)]
    for index, image in enumerate(images):
        ids.append(image_ids(*image.shape[1:]) + torch.tensor([10 + 10 * index, 0, 0, 0]))
    tokens: Tensor = theirs(
        hidden_states=torch.cat([pack_latents(latents), *(pack_latents(image[None]) for image in images)], dim=1),
        encoder_hidden_states=context,
        timestep=sigma,
        guidance=guidance,
        img_ids=torch.cat(ids),
        txt_ids=context_ids(context.shape[1]),
        return_dict=False,
    )[0]
    return unpack_latents(tokens[:, : height * width], height, width)


@pytest.mark.parametrize("spec", [TINY, TINY_KLEIN], ids=["dev", "klein"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_velocity_in_fp32(spec: TransformerSpec, sizes: Sequence[Sequence[tuple[int, int]]]) -> None:
    ours, theirs = pair(spec)
    latents, context = draw(4, 6, 24, 2, spec)
    sigma, samples = torch.tensor([0.3517, 0.9137]), [images_of(each) for each in sizes]
    condition = condition_of(context, batched(samples))
    found = Denoiser(ours)(latents, sigma, condition)
    for index, images in enumerate(samples):
        one = slice(index, index + 1)
        guidance = condition.guidance[one] if spec.guidance_embeds else None
        expected = of_diffusers(theirs, latents[one], sigma[one], context[one], guidance, images)
        assert relative(found[one], expected) <= 1e-5


@torch.no_grad()
def test_order_is_that_of_the_ids_and_not_of_the_tokens() -> None:
    ours, _ = pair(TINY)
    latents, context = draw(4, 4, 8, 1)
    references = batched([images_of([(4, 4), (2, 7)])])
    assert references is not None
    sigma, swap = torch.tensor([0.5]), torch.cat([torch.arange(16, 30), torch.arange(16)])
    found = Denoiser(ours)(latents, sigma, condition_of(context, references))
    moved = References(references.tokens[:, swap], references.ids[:, swap])
    assert relative(Denoiser(ours)(latents, sigma, condition_of(context, moved)), found) <= 1e-5
    exchanged = batched([images_of([(4, 4), (2, 7)])[::-1]])
    assert relative(Denoiser(ours)(latents, sigma, condition_of(context, exchanged)), found) > 1e-3


@torch.no_grad()
def test_zero_tokens_are_not_the_same_as_none() -> None:
    ours, _ = pair(TINY)
    latents, context = draw(4, 4, 8, 1)
    zeros = batched([[torch.zeros(128, 4, 4)]])
    sigma = torch.tensor([0.5])
    without = Denoiser(ours)(latents, sigma, condition_of(context, None))
    assert relative(Denoiser(ours)(latents, sigma, condition_of(context, zeros)), without) > 1e-3


def block_masked(transformer: Flux2Transformer, mask: Tensor, *inputs: object) -> Tensor:
    """The velocity with a mask of (queries, keys) in place of what the references see."""
    with pytest.MonkeyPatch.context() as patch:

        def masked(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
            return kernel(query, key, value, mask)

        kernel = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", masked)
        velocity: Tensor = Denoiser(transformer)(*inputs)
    return velocity


@pytest.mark.parametrize("sizes", [SIZES[name] for name in list(SIZES)[1:]], ids=list(SIZES)[1:])
@torch.no_grad()
def test_own_against_a_mask_of_blocks(sizes: Sequence[Sequence[tuple[int, int]]]) -> None:
    ours, _ = pair(TINY)
    latents, context = draw(4, 6, 12, 2)
    references = batched([images_of(each) for each in sizes])
    assert references is not None
    sigma, condition = torch.tensor([0.3, 0.8]), condition_of(context, references)
    others, padding = 12 + 24, references.tokens.shape[1]
    mask = F.pad(references.token_mask, (others, 0), value=True)[:, None].repeat(1, others + padding, 1)
    mask[:, others:, :others] = False
    mask[:, others:, others:] |= ~references.token_mask.any(1)[:, None, None]
    found = Denoiser(ours, "own")(latents, sigma, condition)
    assert relative(found, block_masked(ours, mask[:, None], latents, sigma, condition)) <= 1e-5
    assert relative(found, Denoiser(ours)(latents, sigma, condition)) > 1e-4


@torch.no_grad()
def test_own_without_references_changes_no_bit() -> None:
    ours, _ = pair(TINY)
    latents, context = draw(4, 6, 12, 2)
    sigma, condition = torch.tensor([0.3, 0.8]), condition_of(context, None)
    assert torch.equal(Denoiser(ours, "own")(latents, sigma, condition), Denoiser(ours)(latents, sigma, condition))


@pytest.mark.parametrize("attention", ["full", "own"])
def test_padding_has_no_say_and_gets_no_gradient(attention: str) -> None:
    ours, _ = pair(TINY)
    latents, context = draw(4, 4, 8, 2)
    references = batched([images_of([(4, 4)]), []])
    assert references is not None
    assert references.is_token is not None
    sigma = torch.tensor([0.3, 0.8])
    tokens = torch.where(references.is_token[..., None], references.tokens, 7.0).requires_grad_()
    denoise = Denoiser(ours, attention)  # type: ignore[arg-type]
    found = denoise(latents, sigma, condition_of(context, replace(references, tokens=tokens)))
    assert torch.equal(found, denoise(latents, sigma, condition_of(context, references)))
    found.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0].abs().sum() > 0
    assert tokens.grad[1].abs().max() == 0


def test_the_loss_sees_the_tokens_of_the_target_alone() -> None:
    """Of the velocity that the flow gets, references are no part: the loss is the mean over the target's numbers."""
    ours, _ = pair(TINY)
    latents, context = draw(4, 6, 8, 2)
    condition = condition_of(context, batched([images_of([(4, 4), (3, 5)]), images_of([(2, 2)])]))
    sigma, noise = torch.tensor([0.3, 0.8]), torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    velocity = Denoiser(ours)(latents + sigma.view(2, 1, 1, 1) * (noise - latents), sigma, condition)
    assert velocity.shape == latents.shape
    expected = (velocity - (noise - latents)).square().mean((1, 2, 3))
    found = flow_loss(Denoiser(ours), latents, condition, sigma=sigma, noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["full", "own"])
def test_routes_keep_all_references(attention: str) -> None:
    """In its blocks are the text, half of the target and all references. Recomputed blocks have the same gradients."""
    ours, _ = pair(TINY)
    latents, context = draw(4, 4, 8, 2)
    condition = condition_of(context, batched([images_of([(4, 4), (3, 5)]), images_of([(2, 2)])]))
    sigma = torch.tensor([0.3, 0.8])
    choices = draw_choices([Route(1, 5, 0.5)], 0, 1, range(2), 16)
    lengths: list[int] = []
    ours.single_transformer_blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    adapter = attach(ours.requires_grad_(False), LoraOptions(lora_rank=2), seed=0)
    found = []
    for recomputes in (False, True):
        if recomputes:
            recompute.install(ours.blocks)
        denoise = Denoiser(ours, attention)  # type: ignore[arg-type]
        denoise.routed(choices)(latents, sigma, condition).square().sum().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    assert lengths == [8 + 8 + 31] * 2
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_both_branches_of_guidance_have_the_references() -> None:
    _, context = draw(4, 4, 8, 1)
    with_references = condition_of(context, batched([images_of([(4, 4)])]))
    both = Condition.stacked([with_references, with_references])
    assert both.references is not None
    assert with_references.references is not None
    assert both.references.is_token is None
    assert torch.equal(both.references.tokens[1], with_references.references.tokens[0])
    mixed = Condition.stacked([with_references, condition_of(context, None)])
    assert mixed.references is not None
    assert mixed.references.token_mask.sum(1).tolist() == [16, 0]
    assert Condition.stacked([condition_of(context, None)]).references is None
    assert mixed.select(torch.tensor([1])).references is not None


def test_plain_attention_with_a_mask_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 1, 7, generator=generator) > 0.3
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(plain_attention(query, key, value, mask), expected)
