"""What a step keeps: the composition of traced blocks, held against whole models that really compute."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.tiers import others_slow
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flux2.activations import TransformerPass, sampling, saved_bytes, training
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import adapted_blocks
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute
from simpletuner.memory.trace import Ledger

SMALL = TransformerSpec(4, 16, 2, 3, 48, guidance_embeds=True, axes=(4, 4, 4, 4))
WIDE = TransformerSpec(8, 16, 3, 5, 48, guidance_embeds=True, axes=(4, 4, 4, 4))
TEXT = 130
"""Tokens. With those of a picture more than 256, above which attention on a CPU is the fused kernel's."""


def built(at: TransformerPass, options: LoraOptions | None, every: int | None) -> Flux2Transformer:
    torch.manual_seed(0)
    transformer = Flux2Transformer(at.spec).to(at.dtype)
    if options is None:
        unfreeze(transformer)
    else:
        attach(transformer, options, seed=0)
    if any(at.recomputed):
        recompute.install(transformer.blocks, every)
    return transformer.train()


def step(transformer: Flux2Transformer, at: TransformerPass, side: tuple[int, int]) -> tuple[int, int]:
    """(kept between the passes, most at a time) of a real forward and backward pass, weights and inputs left out."""
    for weight in transformer.parameters() if at.is_released else ():
        weight.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    latents = torch.randn(at.batch, 128, *side)
    context = torch.randn(at.batch, at.text_tokens, at.spec.context_dim, dtype=at.dtype)
    references = None
    if at.reference_tokens:
        references = References(
            torch.randn(at.batch, at.reference_tokens, 128),
            torch.zeros(at.batch, at.reference_tokens, 4, dtype=torch.int64),
        )
    sigma, condition = torch.rand(at.batch), Condition.at(TextContext.dense(context), 1.0, references)
    denoise = Denoiser(transformer, at.reference_attention)
    routes = draw_choices(at.routes, 0, 1, range(at.batch), at.image_tokens)
    ledger = Ledger([*transformer.parameters(), latents, context])
    with ledger:
        loss = (denoise(latents, sigma, condition, routes).float() - latents).square().mean()
        kept = ledger.live - loss.nbytes
        loss.backward()
    return kept, ledger.peak


def described(
    spec: TransformerSpec,
    side: tuple[int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    options: LoraOptions | None = None,
    every: int | None = None,
    recomputes: bool = False,
    is_released: bool = False,
) -> TransformerPass:
    return TransformerPass(
        spec,
        dtype,
        batch,
        TEXT,
        side[0] * side[1],
        is_full=options is None,
        is_released=is_released,
        adapted=() if options is None else adapted_blocks(spec, options),
        rank=0 if options is None else options.lora_rank,
        dropout=0.0 if options is None else options.lora_dropout,
        recomputed=tuple(recomputes and (every is None or (i + 1) % every != 0) for i in range(spec.blocks)),
    )


LORA = LoraOptions(lora_rank=4)
CASES = [
    (SMALL, (12, 12), {"options": LORA}),
    (SMALL, (12, 12), {"options": LORA, "recomputes": True}),
    (SMALL, (16, 10), {"options": LORA, "batch": 3}),
    (SMALL, (16, 10), {"options": LORA, "batch": 3, "recomputes": True}),
    (WIDE, (12, 12), {"options": LORA, "recomputes": True, "every": 2}),
    (WIDE, (12, 12), {"options": LORA, "recomputes": True, "every": 3, "dtype": torch.bfloat16}),
    (WIDE, (12, 12), {"options": LORA, "dtype": torch.bfloat16}),
    (WIDE, (12, 12), {"options": LORA, "dtype": torch.float16}),
    (WIDE, (12, 12), {"options": LORA, "dtype": torch.float16, "recomputes": True}),
    (SMALL, (12, 12), {"options": LoraOptions(lora_rank=8, flux_lora_target="attention")}),
    (SMALL, (12, 12), {"options": LoraOptions(lora_rank=8, flux_lora_target="mlp", lora_dropout=0.1)}),
    (SMALL, (12, 12), {"options": LoraOptions(lora_rank=8, flux_lora_target="tiny"), "recomputes": True}),
    (
        SMALL,
        (12, 12),
        {"options": LoraOptions(lora_rank=2, peft_lora_target_modules=("single_transformer_blocks.1.attn.to_out",))},
    ),
    (SMALL, (12, 12), {}),
    (WIDE, (12, 12), {"recomputes": True, "dtype": torch.bfloat16}),
    (WIDE, (12, 12), {"recomputes": True, "dtype": torch.bfloat16, "is_released": True}),
]


def shared_bytes(at: TransformerPass) -> int:
    """What is there from the first block to the last and belongs to none, at most: tokens and context as they come in,
    their embeddings, the time's vector and the modulations, tables of positions.
    """
    tokens = at.batch * (at.text_tokens + at.image_tokens)
    inputs = at.batch * (at.text_tokens * at.spec.context_dim + 2 * at.image_tokens * 128) * 4
    vectors = 48 * at.batch * at.spec.hidden * at.dtype.itemsize + 8 * at.batch * 256 * 4
    tables = (at.text_tokens + at.image_tokens) * (4 * 8 + at.spec.head_dim * 4)
    return inputs + vectors + tables + tokens * at.spec.hidden * at.dtype.itemsize


@pytest.mark.parametrize(
    ("spec", "side", "keys"),
    [case if index % 5 == 0 else pytest.param(*case, marks=pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_the_sum_of_blocks_is_what_a_real_step_holds(
    spec: TransformerSpec, side: tuple[int, int], keys: dict[str, object]
) -> None:
    at = described(spec, side, **keys)  # type: ignore[arg-type]
    transformer = built(at, keys.get("options"), keys.get("every"))  # type: ignore[arg-type]
    kept, peak = step(transformer, at, side)
    assert saved_bytes(at) <= kept <= saved_bytes(at) + shared_bytes(at)
    worst = training(at)
    # A trace holds the gradient that comes into a block to the end; in fp16 `clipped` replaces it.
    held = at.batch * (at.text_tokens + at.image_tokens) * spec.hidden * 2 if at.dtype == torch.float16 else 0
    assert worst.total - worst.gradients // 50 - held <= peak <= worst.total + shared_bytes(at)


@pytest.mark.parametrize(("spec", "side", "keys"), [case for case in CASES if "recomputes" not in case[2]])
def test_the_blocks_keep_exactly_what_autograd_saves_in_them(
    spec: TransformerSpec, side: tuple[int, int], keys: dict[str, object]
) -> None:
    """Counted by autograd's own hooks, tensor by tensor, with nothing but the blocks in between."""
    at = described(spec, side, **keys)  # type: ignore[arg-type]
    transformer = built(at, keys.get("options"), None)  # type: ignore[arg-type]
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def stream(tokens: int) -> Tensor:
        return torch.randn(at.batch, tokens, spec.hidden, dtype=at.dtype, requires_grad=at.is_full)

    image, text = stream(at.image_tokens), stream(at.text_tokens)
    half = (at.text_tokens + at.image_tokens, spec.head_dim // 2)
    shared = [
        *(torch.randn(at.batch, 1, n * spec.hidden, dtype=at.dtype, requires_grad=at.is_full) for n in (6, 6, 3)),
        *(torch.randn(half) for _ in range(2)),
    ]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for block in transformer.transformer_blocks:
            text, image = block(text, image, *shared[:2], tuple(shared[3:]))
        joint = torch.cat([text, image], dim=1)
        for block in transformer.single_transformer_blocks:
            joint = block(joint, shared[2], tuple(shared[3:]))
    known = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *shared)}
    counted = sum(t.untyped_storage().nbytes() for at_, t in saved.items() if at_ not in known)
    # Of each normed token, mean and deviation: in 16 bits a CPU keeps them in two bytes each, an accelerator in four.
    norms = 2 * spec.double_blocks + spec.single_blocks if at.dtype.itemsize == 2 else 0
    assert 0 <= blocks_keep(at) - counted <= 4 * norms * at.batch * (at.text_tokens + at.image_tokens)


def blocks_keep(at: TransformerPass) -> int:
    """`saved_bytes` without the last layers, which are those of a model without blocks."""
    none = replace(at.spec, double_blocks=0, single_blocks=0)
    return saved_bytes(at) - saved_bytes(replace(at, spec=none, adapted=(), recomputed=()))


@pytest.mark.parametrize("recomputes", others_slow([False, True], True))
def test_routes_leave_out_what_goes_around(recomputes: bool) -> None:
    at = described(WIDE, (16, 16), options=LORA, recomputes=recomputes)
    routed = replace(at, routes=(Route(2, 5, 0.5),))
    assert training(routed).total < training(at).total
    transformer = built(at, LORA, None)
    kept, peak = step(transformer, routed, (16, 16))
    assert saved_bytes(routed) <= kept <= saved_bytes(routed) + 2 * shared_bytes(at)
    assert training(routed).total == pytest.approx(peak, rel=0.08)


@pytest.mark.parametrize(("view", "recomputes"), [pytest.param("full", True, marks=pytest.mark.slow), ("own", False)])
def test_references_are_in_the_sum(view: str, recomputes: bool) -> None:
    alone = described(WIDE, (12, 12), options=LORA, recomputes=recomputes, batch=2)
    at = replace(alone, reference_tokens=160, reference_attention=view)  # type: ignore[arg-type]
    kept, peak = step(built(at, LORA, None), at, (12, 12))
    beside = (
        shared_bytes(replace(at, image_tokens=at.image_tokens + at.reference_tokens)) * at.batch
    )  # a table of positions each
    assert saved_bytes(alone) < saved_bytes(at) <= kept <= saved_bytes(at) + beside
    assert training(at).total <= peak <= training(at).total + beside


def test_more_recomputing_keeps_less_and_offloading_keeps_it_elsewhere() -> None:
    def kept(**keys: object) -> int:
        return training(described(WIDE, (12, 12), options=LORA, **keys)).total  # type: ignore[arg-type]

    assert kept() > kept(recomputes=True, every=2) > kept(recomputes=True, every=4) > kept(recomputes=True)
    at = described(WIDE, (12, 12), options=LORA, recomputes=True)
    here, there = training(at), training(at, offloaded=True)
    assert there.total < here.total
    assert there.host_inputs >= here.saved - there.saved
    assert here.host_inputs == 0


def test_accumulated_gradients_are_there_from_the_start() -> None:
    at = described(WIDE, (12, 12), recomputes=True)
    weights = sum(parameter.nbytes for block in Flux2Transformer(WIDE).blocks for parameter in block.parameters())
    assert training(at, accumulated=True).gradients > weights
    assert training(at, accumulated=True).total > training(at).total


@pytest.mark.parametrize("batch", [1, 2])
def test_a_pass_without_gradients(batch: int) -> None:
    at = described(WIDE, (12, 12), options=LORA, batch=batch)
    transformer = built(at, LORA, None)
    latents, context = torch.randn(batch, 128, 12, 12), torch.randn(batch, TEXT, WIDE.context_dim)
    ledger = Ledger([*transformer.parameters(), latents, context])
    with torch.no_grad(), ledger:
        Denoiser(transformer)(latents, torch.rand(batch), Condition.at(TextContext.dense(context), 1.0))
    adapters: Sequence[Tensor] = [p for p in transformer.parameters() if p.requires_grad]
    casts = max(adapter.nbytes for adapter in adapters)
    assert sampling(at) <= ledger.peak <= sampling(at) + shared_bytes(at) + 3 * at.batch * 274 * 128 * 4 + casts
