"""Blocks against their plain composition, and what recompute of a block computes again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.tiers import others_slow
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.config.flavours import FLAVOURS, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.lora import LoraLinear, attach
from simpletuner.flux2.rotary import Rotary
from simpletuner.flux2.transformer import (
    DoubleBlock,
    Flux2Transformer,
    ReferenceAttention,
    SingleBlock,
    clipped,
    modulated,
)
from simpletuner.memory import offload, recompute
from simpletuner.memory.precision import quantizable_linears, quantized
from simpletuner.memory.trace import fuse_attention, on_meta_device

SPEC = TransformerSpec(4, 16, 2, 2, 48, guidance_embeds=True, axes=(4, 4, 4, 4))
TEXT, IMAGE = 5, 12
ALL = LoraOptions(lora_rank=4)


class PlainLora(LoraLinear):
    """The base product first."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        x = x[..., self.column_start : self.column_stop]
        if self.dropout > 0:
            x = F.dropout(x, self.dropout)
        delta = F.linear(F.linear(x, self.a.to(x.dtype)) * self.scale, self.b.to(x.dtype))
        rows = out[..., self.row_start : self.row_stop] + delta
        return torch.cat([out[..., : self.row_start], rows, out[..., self.row_stop :]], dim=-1)


class PlainDouble(DoubleBlock):
    """The image's stream to its end, then the text's; autograd saves what it will."""

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_modulation: Tensor,
        image_modulation: Tensor,
        angles: Rotary,
        references: ReferenceAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = text_modulation.chunk(6, dim=-1)
        text_in, image_in = (
            modulated(text, self.norm1_context, t_shift, t_scale),
            modulated(image, self.norm1, shift, scale),
        )
        text_out, image_out = self.attn(text_in, image_in, angles, references)
        image = image + gate * image_out
        image = image + ff_gate * self.ff(modulated(image, self.norm2, ff_shift, ff_scale))
        text = text + t_gate * text_out
        text = text + t_ff_gate * self.ff_context(modulated(text, self.norm2_context, t_ff_shift, t_ff_scale))
        return clipped(text), image


class PlainSingle(SingleBlock):
    def forward(
        self, x: Tensor, modulation: Tensor, angles: Rotary, references: ReferenceAttention | None = None
    ) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return clipped(x + gate * self.attn(modulated(x, self.norm, shift, scale), angles, references))


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    LoraLinear: PlainLora,
    DoubleBlock: PlainDouble,
    SingleBlock: PlainSingle,
}


def built(options: LoraOptions | None, dtype: torch.dtype = torch.float32, *, is_plain: bool) -> Flux2Transformer:
    torch.manual_seed(0)
    transformer = Flux2Transformer(SPEC).to(dtype).train()
    if options is not None:
        for name, parameter in attach(transformer, options, seed=0).named_parameters():
            if name.endswith(".b"):
                nn.init.normal_(parameter, std=0.1)
    for module in transformer.modules() if is_plain else ():
        module.__class__ = PLAIN.get(type(module), type(module))
    return transformer


def step(transformer: Flux2Transformer, scale: float = 1.0) -> list[Tensor]:
    """The answer, then all gradients, of a loss times `scale`."""
    dtype = transformer.dtype
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, IMAGE, SPEC.in_channels, generator=generator).to(dtype)
    text = torch.randn(2, TEXT, SPEC.context_dim, generator=generator).to(dtype)
    sigma, ids = torch.tensor([0.3, 0.8], dtype=dtype), torch.arange(4 * IMAGE).view(IMAGE, 4)
    torch.manual_seed(2)
    velocity = transformer(image, text, sigma, sigma, ids, ids[:TEXT])
    (scale * velocity.float().square().mean()).backward()
    return [velocity.detach(), *(each.grad for each in transformer.parameters() if each.grad is not None)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ALL, id="all"),
        pytest.param(LoraOptions(lora_rank=4, flux_lora_target="attention"), id="columns"),
        pytest.param(LoraOptions(lora_rank=4, flux_lora_target="tiny"), id="no-last"),
        pytest.param(LoraOptions(lora_rank=4, lora_dropout=0.3), id="dropout"),
        # Gates are functions of what is trained.
        pytest.param(LoraOptions(lora_rank=4, peft_lora_target_modules=("linear", "to_out", "linear_out")), id="gates"),
        pytest.param(None, id="full"),
    ],
)
def test_order_and_gates_change_no_bit(options: LoraOptions | None, dtype: torch.dtype, recomputed: bool) -> None:
    plain, ours = built(options, dtype, is_plain=True), built(options, dtype, is_plain=False)
    if recomputed:
        recompute.install(ours.blocks)
    expected, found = step(plain), step(ours)
    assert len(expected) > 8
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_streamed_and_recomputed_it_is_the_same() -> None:
    expected = step(built(ALL, is_plain=True))
    for per_group in (1, None):
        ours = built(ALL, is_plain=False)
        groups = offload.leaf_groups(ours.blocks) if per_group is None else offload.block_groups(ours.blocks)
        offload.install(ours, groups, device=torch.device("cpu"), ahead=True)
        recompute.install(ours.blocks)
        for _ in range(2):
            ours.zero_grad(set_to_none=True)
            assert all(torch.equal(a, b) for a, b in zip(expected, step(ours), strict=True))


def test_in_fp16_answer_and_gradients_are_nearer_than_in_bf16() -> None:
    scale = 2.0**12
    exact = step(built(ALL, is_plain=False), scale)

    def errors(dtype: torch.dtype) -> list[float]:
        found = step(built(ALL, dtype, is_plain=False), scale)
        assert found[0].dtype == dtype
        assert all(gradient.dtype == torch.float32 for gradient in found[1:])
        return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    half, brain = errors(torch.float16), errors(torch.bfloat16)
    assert half[0] < brain[0] / 3
    assert sum(half) < sum(brain) / 3
    assert max(half) < 0.02


def test_the_residual_stream_stays_in_the_range_of_fp16() -> None:
    """Beyond it no gradient passes, as `clip` has it."""
    with torch.no_grad():
        block = SingleBlock(SPEC).half().requires_grad_(False)
        block.attn.to_out.weight.fill_(1.0)
    recompute.install([block])
    x = torch.full((1, 2, SPEC.hidden), 60_000.0, dtype=torch.float16, requires_grad=True)
    modulation = torch.tensor([1.0, 0.0, 6e4]).repeat_interleave(SPEC.hidden).half()[None, None]
    with torch.no_grad():
        block.attn.to_qkv_mlp_proj.weight.fill_(1.0)
    angles = torch.ones(2, SPEC.head_dim // 2), torch.zeros(2, SPEC.head_dim // 2)
    out = block(x, modulation, angles)
    assert (out == 65504).all()
    out.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


DEV = FLAVOURS["dev"].transformer


def flop(kind: type[SingleBlock | DoubleBlock], options: LoraOptions | None, *, recomputed: bool) -> int:
    """Of the products of a block of dev at 1024 x 1024, forwards and backwards, attention left out."""
    tokens = {SingleBlock: [4096 + 512], DoubleBlock: [512, 4096]}[kind]
    with on_meta_device(torch.bfloat16):
        model = Flux2Transformer(replace(DEV, double_blocks=1, single_blocks=1)).requires_grad_(options is None)
        if options is not None:
            with torch.device("cpu"):
                attach(model, options, seed=0)
        block = model.to("meta").blocks[kind is SingleBlock]
        fuse_attention(block)
        if recomputed:
            recompute.install([block])
        streams = [torch.empty(1, count, DEV.hidden, requires_grad=True) for count in tokens]
        sets = [3] if kind is SingleBlock else [6, 6]
        modulations = [torch.empty(1, 1, n * DEV.hidden, requires_grad=options is None) for n in sets]
        angles = torch.empty(2, sum(tokens), DEV.head_dim // 2, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            out = block.train()(*streams, *modulations, tuple(angles))
            outputs = list(out) if isinstance(out, tuple) else [out]
            torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        # Whole passes are 4.536 and 4.540; the last products are 1.392 and 0.928.
        pytest.param(SingleBlock, LoraOptions(lora_rank=16), 3.145, id="single"),
        pytest.param(DoubleBlock, LoraOptions(lora_rank=16), 3.612, id="double"),
        pytest.param(SingleBlock, LoraOptions(lora_rank=16, flux_lora_target="tiny"), 3.132, id="single-no-last"),
        # The gate's gradient needs what the last product gives.
        pytest.param(SingleBlock, None, 4.523, id="full"),
    ],
)
def test_recompute_stops_before_the_last_product(
    kind: type[SingleBlock | DoubleBlock], options: LoraOptions | None, expected: float
) -> None:
    again = flop(kind, options, recomputed=True) - flop(kind, options, recomputed=False)
    assert again / 1e12 == pytest.approx(expected, abs=0.003)


def quantized_base(precision: str) -> Flux2Transformer:
    torch.manual_seed(0)
    transformer = Flux2Transformer(SPEC).train()
    for name, linear in quantizable_linears(transformer, ("transformer_blocks.", "single_"), precision).items():
        transformer.set_submodule(name, quantized(linear, precision))
    for name, parameter in attach(transformer, ALL, seed=0).named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.1)
    return transformer


@pytest.mark.parametrize("precision", others_slow(["int8-quanto", "int4-quanto", "nf4-bnb"], "int8-quanto"))
def test_over_a_quantized_base_it_stops_there_too(precision: str) -> None:
    gradients, counts = [], []
    for recomputed in (False, True):
        transformer = quantized_base(precision)
        if recomputed:
            recompute.install(transformer.blocks)
        with FlopCounterMode(display=False) as counter:
            gradients.append(step(transformer))
        counts.append(counter.get_total_flops())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    forward = 0
    for block in transformer.blocks:
        is_single = isinstance(block, SingleBlock)
        streams = [torch.randn(2, n, SPEC.hidden) for n in ([TEXT + IMAGE] if is_single else [TEXT, IMAGE])]
        modulations = [torch.randn(2, 1, n * SPEC.hidden) for n in ([3] if is_single else [6, 6])]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(*streams, *modulations, tuple(torch.randn(2, TEXT + IMAGE, SPEC.head_dim // 2)))
        forward += counter.get_total_flops()
        # Of all tokens, from attention and feed-forward; of the image's, from the feed-forward.
        inputs = SPEC.mlp_hidden + (SPEC.hidden if is_single else 0)
        forward -= 2 * 2 * streams[-1].shape[1] * inputs * SPEC.hidden
    assert counts[1] - counts[0] == forward
