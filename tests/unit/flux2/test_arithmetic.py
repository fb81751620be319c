"""The arithmetic of a pass, against torch's own counter on the module itself: equal, not near."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiers import others_slow
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from simpletuner.config.flavours import FLAVOURS, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flow.choice import TokenChoice
from simpletuner.flux2.activations import TransformerPass
from simpletuner.flux2.arithmetic import (
    PassFlop,
    attached_adapters,
    planned_adapters,
    sampling_flop,
    training_flop,
)
from simpletuner.flux2.footprint import adapted_blocks
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer, ReferenceAttention
from simpletuner.memory import recompute

SPEC = TransformerSpec(2, 16, 2, 3, 48, guidance_embeds=True, axes=(4, 4, 4, 4))
BATCH, TEXT, IMAGE = 2, 24, 40

aten = torch.ops.aten
FUSED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
"""Attention as a CPU computes it, counted as torch counts the fused kernels of accelerators."""

EVERYTHING = LoraOptions(lora_rank=4, flux_lora_target="all")
TARGETS = {
    "all": EVERYTHING,
    "attention": LoraOptions(lora_rank=4, flux_lora_target="attention"),
    "mlp": LoraOptions(lora_rank=4, flux_lora_target="mlp"),
    "tiny": LoraOptions(lora_rank=4, flux_lora_target="tiny"),
    "one of the last block": LoraOptions(
        lora_rank=4, peft_lora_target_modules=("single_transformer_blocks.2.attn.to_out",)
    ),
    "a value": LoraOptions(lora_rank=4, peft_lora_target_modules=("transformer_blocks.0.attn.to_v",)),
    "the text's last": LoraOptions(
        lora_rank=4, peft_lora_target_modules=("transformer_blocks.0.ff_context.linear_out",)
    ),
    "the image's last": LoraOptions(lora_rank=4, peft_lora_target_modules=("transformer_blocks.1.ff.linear_out",)),
    "the ends": LoraOptions(lora_rank=4, peft_lora_target_modules=("x_embedder", "proj_out")),
    "modulation": LoraOptions(lora_rank=4, peft_lora_target_modules=("single_stream_modulation.linear",)),
    "time": LoraOptions(lora_rank=4, peft_lora_target_modules=("timestep_embedder.linear_1",)),
}


def passing(**changes: object) -> TransformerPass:
    plain = TransformerPass(SPEC, torch.float32, batch=BATCH, text_tokens=TEXT, image_tokens=IMAGE)
    return replace(plain, **changes)  # type: ignore[arg-type]


def transformer_of(options: LoraOptions | None, at: TransformerPass) -> Flux2Transformer:
    """With adapters, or, without options, all of it trainable; blocks recomputed as in `at`."""
    torch.manual_seed(0)
    transformer = Flux2Transformer(SPEC)
    if options is not None:
        attach(transformer, options, seed=0)
    if at.recomputed:
        again = [block for block, is_recomputed in zip(transformer.blocks, at.recomputed, strict=True) if is_recomputed]
        recompute.install(again)
    return transformer


def counted(transformer: Flux2Transformer, at: TransformerPass, device: str = "cpu", *, backward: bool = True) -> int:
    """What torch counts of a pass through the whole module."""
    transformer = transformer.to(device, at.dtype)
    kept = [route.keeps(at.image_tokens) + at.reference_tokens for route in at.routes]
    tokens = at.image_tokens + at.reference_tokens
    with torch.device(device):
        image = torch.randn(at.batch, tokens, SPEC.in_channels, dtype=at.dtype)
        text = torch.randn(at.batch, at.text_tokens, SPEC.context_dim, dtype=at.dtype)
        image_ids, text_ids = torch.zeros(tokens, 4).long(), torch.zeros(at.text_tokens, 4).long()
        choices = [
            TokenChoice(route.start, route.end, torch.arange(count).expand(at.batch, -1))
            for route, count in zip(at.routes, kept, strict=True)
        ]
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.set_grad_enabled(backward):
            references = ReferenceAttention(at.reference_tokens, is_isolated=at.reference_attention == "own")
            ones = torch.ones(at.batch)
            velocity = transformer(
                image, text, ones, ones, image_ids, text_ids, choices, None, references if at.reference_tokens else None
            )
            if backward:
                velocity.sum().backward()
    total = counter.get_total_flops()
    assert isinstance(total, int)
    return total


EVERY_OTHER = tuple(index % 2 == 0 for index in range(SPEC.blocks))
RECOMPUTED = [(), (True,) * SPEC.blocks, EVERY_OTHER]


@pytest.mark.parametrize("recomputed", others_slow(RECOMPUTED, EVERY_OTHER), ids=["kept", "recomputed", "partly"])
@pytest.mark.parametrize("name", TARGETS)
def test_hardware_flop_of_a_lora_is_what_torch_counts(name: str, recomputed: tuple[bool, ...]) -> None:
    at = passing(recomputed=recomputed)
    transformer = transformer_of(TARGETS[name], at)
    flop = training_flop(at, attached_adapters(transformer))
    assert flop.hardware == counted(transformer, at)


@pytest.mark.parametrize("recomputed", RECOMPUTED, ids=["kept", "recomputed", "partly"])
def test_hardware_flop_of_a_full_run_is_what_torch_counts(recomputed: tuple[bool, ...]) -> None:
    at = passing(recomputed=recomputed, is_full=True)
    assert training_flop(at).hardware == counted(transformer_of(None, at), at)


def test_what_fp16_clips_is_made_again() -> None:
    # More than 256 tokens: with fewer, attention on a CPU is plain products.
    at = passing(recomputed=(True,) * SPEC.blocks, dtype=torch.float16, text_tokens=230)
    transformer = transformer_of(EVERYTHING, at)
    adapters = attached_adapters(transformer)
    assert training_flop(at, adapters).hardware == counted(transformer, at)
    assert training_flop(at, adapters).hardware > training_flop(replace(at, dtype=torch.float32), adapters).hardware


@pytest.mark.parametrize("target", ["all", "attention", "tiny"])
def test_model_flop_of_a_lora_is_what_torch_counts_of_plain_attention(target: str) -> None:
    at = passing()  # on the meta device attention is its plain products; these targets want a gradient of all three
    transformer = transformer_of(TARGETS[target], at)
    assert training_flop(at, attached_adapters(transformer)).model == counted(transformer, at, "meta")


def test_model_flop_of_a_full_run_is_what_torch_counts_of_plain_attention() -> None:
    at = passing(is_full=True)
    assert training_flop(at).model == counted(transformer_of(None, at), at, "meta")


def test_recompute_is_no_model_flop() -> None:
    at, again = passing(is_full=True), passing(is_full=True, recomputed=(True,) * SPEC.blocks)
    assert training_flop(again).model == training_flop(at).model
    assert training_flop(again).hardware > training_flop(at).hardware


def test_routed_tokens_are_not_counted() -> None:
    at = passing(routes=(Route(1, 3, 0.5),), recomputed=(True,) * SPEC.blocks)
    transformer = transformer_of(EVERYTHING, at)
    adapters = attached_adapters(transformer)
    assert training_flop(at, adapters).hardware == counted(transformer, at)
    assert training_flop(passing(routes=(Route(1, 3, 1.0),)), adapters) == training_flop(passing(), adapters)


@pytest.mark.parametrize("routes", [(), (Route(1, 3, 0.5),)], ids=["whole", "routed"])
def test_a_pass_without_gradients_is_counted_once(routes: tuple[Route, ...]) -> None:
    at = passing(routes=routes, recomputed=(True,) * SPEC.blocks)
    transformer = transformer_of(EVERYTHING, at)
    expected = counted(transformer, replace(at, recomputed=()), backward=False)
    assert sampling_flop(at, attached_adapters(transformer)) == PassFlop(expected, expected)


@pytest.mark.parametrize("view", ["full", "own"])
def test_references_are_counted(view: str) -> None:
    at = passing(reference_tokens=13, reference_attention=view, recomputed=EVERY_OTHER, routes=(Route(1, 3, 0.5),))
    transformer = transformer_of(EVERYTHING, at)
    adapters = attached_adapters(transformer)
    assert training_flop(at, adapters).hardware == counted(transformer, at)
    at = replace(at, routes=(), recomputed=())
    assert sampling_flop(at, adapters).model == counted(transformer, at, backward=False)


@pytest.mark.parametrize(("view", "expected"), [("full", (2.136, 6.939)), ("own", (2.005, 6.416))])
def test_what_references_cost_at_the_proportions_of_dev(view: str, expected: tuple[float, float]) -> None:
    """Model FLOP of a step with one and with four references as large as the image, 1024x1024, over that without."""
    spec = FLAVOURS["dev"].transformer
    step = TransformerPass(spec, torch.bfloat16, 1, 512, 4096, adapted=adapted_blocks(spec, LoraOptions()), rank=16)
    own: tuple[TransformerPass, ...] = tuple(
        replace(step, reference_tokens=4096 * count, reference_attention=view)  # type: ignore[arg-type]
        for count in (1, 4)
    )
    found = [training_flop(each).model / training_flop(step).model for each in own]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("target", ["all", "attention", "mlp", "tiny"])
def test_planned_adapters_are_those_that_are_attached(target: str) -> None:
    options = TARGETS[target]
    at = passing(adapted=adapted_blocks(SPEC, options), rank=options.lora_rank)
    assert planned_adapters(at) == attached_adapters(transformer_of(options, at))


def test_it_grows_with_the_batch() -> None:
    assert training_flop(passing(batch=6)) == training_flop(passing(batch=2)) * 3


def test_a_step_of_dev_at_1024() -> None:
    spec = FLAVOURS["dev"].transformer
    adapted = adapted_blocks(spec, LoraOptions())
    step = TransformerPass(spec, torch.bfloat16, batch=1, text_tokens=512, image_tokens=4096, adapted=adapted, rank=16)
    recomputed = replace(step, recomputed=(True,) * spec.blocks)
    flop, compiled = training_flop(recomputed), training_flop(recomputed, is_compiled=True)
    assert (flop.model / 1e12, flop.hardware / 1e12) == pytest.approx((595.6, 819.3), abs=0.1)
    # Of a compiled block the last product is made again too.
    assert (compiled.model / 1e12, compiled.hardware / 1e12) == pytest.approx((595.6, 893.5), abs=0.1)
