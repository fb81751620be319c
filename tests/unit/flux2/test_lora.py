"""What learns, where, and that it changes nothing until it has learned something."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.base.errors import ConfigError
from simpletuner.config.flavours import DEV, KLEIN_9B, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.lora import PRESETS, Adapter, LoraLinear, attach, linears
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer

TINY = TransformerSpec(
    heads=6,
    head_dim=32,
    double_blocks=2,
    single_blocks=6,
    context_dim=192,
    guidance_embeds=True,
    axes=(8, 8, 8, 8),
)
D = TINY.hidden

DOUBLE = "transformer_blocks.*."
SINGLE = "single_transformer_blocks.*."
Q = [f"{DOUBLE}attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
OUT = [f"{DOUBLE}attn.to_out.0", f"{DOUBLE}attn.to_add_out"]
MLP = [f"{DOUBLE}{ff}.{name}" for ff in ("ff", "ff_context") for name in ("linear_in", "linear_out")]
IN, MERGED = f"{SINGLE}attn.to_qkv_mlp_proj", f"{SINGLE}attn.to_out"

# The frozen list: which Linears, and of the fused ones which rows or columns.
FROZEN = {
    "all": (Q + OUT + MLP, {IN: (0, 9 * D)}, {MERGED: (0, 4 * D)}),
    "attention": (Q + OUT, {IN: (0, 3 * D)}, {MERGED: (0, D)}),
    "mlp": (MLP, {IN: (3 * D, 9 * D)}, {MERGED: (D, 4 * D)}),
    "tiny": (Q, {IN: (0, 3 * D)}, {}),
}


@pytest.fixture
def transformer() -> Iterator[Flux2Transformer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Flux2Transformer(TINY).eval()


def velocity(transformer: Flux2Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
    """The velocity of two samples of 2×3 tokens with a context of 5."""
    generator = torch.Generator().manual_seed(1)
    out: Tensor = transformer(
        torch.randn(2, 6, 128, generator=generator).to(dtype),
        torch.randn(2, 5, transformer.spec.context_dim, generator=generator).to(dtype),
        torch.tensor([0.3, 0.9]),
        torch.tensor([1.0, 4.0]),
        image_ids(2, 3),
        context_ids(5),
    )
    return out


def learn(adapter: Adapter, size: float = 0.1) -> None:
    """Move every live number, as if trained."""
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_fresh_adapter_changes_no_bit(transformer: Flux2Transformer, preset: str, init: str) -> None:
    base = velocity(transformer)
    adapter = attach(transformer, LoraOptions(flux_lora_target=preset, lora_init_type=init, lora_dropout=0.5), seed=7)
    assert torch.equal(velocity(transformer.eval()), base)
    assert torch.equal(velocity(transformer.train()), base)
    with adapter.disabled():
        assert torch.equal(velocity(transformer), base)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_adapter_changes_no_bit_of_klein(preset: str) -> None:
    """klein-9b's shapes, narrower: no guidance embedder, three times as many single blocks as double ones."""
    klein = Flux2Transformer(replace(KLEIN_9B, heads=2, head_dim=32, axes=(8, 8, 8, 8), context_dim=96)).eval()
    base = velocity(klein)
    adapter = attach(klein, LoraOptions(flux_lora_target=preset, lora_dropout=0.5), seed=7)
    assert torch.equal(velocity(klein.train()), base)
    learn(adapter)
    assert not torch.equal(velocity(klein), base)
    with adapter.disabled():
        assert torch.equal(velocity(klein), base)


@pytest.mark.parametrize("preset", PRESETS)
def test_switched_off_it_is_the_base_bit_for_bit(transformer: Flux2Transformer, preset: str) -> None:
    base = velocity(transformer)
    adapter = attach(transformer, LoraOptions(flux_lora_target=preset), seed=7)
    learn(adapter)
    adapted = velocity(transformer)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(velocity(transformer), base)
    assert torch.equal(velocity(transformer), adapted)


def test_disabled_ends_with_its_block_even_after_an_error(transformer: Flux2Transformer) -> None:
    adapter = attach(transformer, LoraOptions(), seed=7)
    with pytest.raises(ZeroDivisionError), adapter.disabled(), adapter.disabled():
        raise ZeroDivisionError
    assert all(layer.is_enabled for layer in adapter.layers.values())
    with adapter.disabled():
        with adapter.disabled():
            pass
        assert not any(layer.is_enabled for layer in adapter.layers.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_frozen_list(transformer: Flux2Transformer, preset: str) -> None:
    whole, rows, columns = FROZEN[preset]
    modules = linears(transformer)
    expected = {}
    for kind in [*whole, *dict.fromkeys([*rows, *columns])]:
        count = TINY.double_blocks if kind.startswith(DOUBLE) else TINY.single_blocks
        linear = modules[kind.replace("*", "0")]
        live_rows = rows.get(kind, (0, linear.out_features))
        live_columns = columns.get(kind, (0, linear.in_features))
        expected[kind] = (count, live_rows, live_columns)

    adapter = attach(transformer, LoraOptions(flux_lora_target=preset, lora_rank=4), seed=7)
    audit = adapter.audit()
    found = {kind["name"]: (kind["layers"], kind["rows"], kind["columns"]) for kind in audit["kinds"]}
    assert found == expected
    assert list(adapter.layers) == [name for name in modules if name in adapter.layers]

    parameters = sum(n * 4 * (r[1] - r[0] + c[1] - c[0]) for n, r, c in expected.values())
    assert audit["parameters"] == adapter.parameter_count == parameters
    assert audit["bytes"] == 4 * parameters
    assert audit["layers"] == sum(n for n, _, _ in expected.values())
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize(
    ("targets", "modules", "millions"),
    [
        (None, 192, 100.66),
        (("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"), 128, 77.1),
        (("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"), 80, 53.5),
        (r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)", 32, 17.3),
    ],
)
def test_sizes_on_dev(targets: object, modules: int, millions: float) -> None:
    """Against the counts of docs/lora.md, made on the meta device."""
    with torch.device("meta"):
        transformer = Flux2Transformer(DEV)
    adapter = attach(transformer, LoraOptions(lora_rank=16, peft_lora_target_modules=targets), seed=0)
    assert len(adapter.layers) == modules
    digits = 2 if targets is None else 1
    assert round(adapter.parameter_count / 1e6, digits) == millions


@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_a_sliced_adapter_is_its_expanded_form(transformer: Flux2Transformer, preset: str) -> None:
    adapter = attach(transformer, LoraOptions(flux_lora_target=preset, lora_rank=4, lora_alpha=6), seed=7)
    learn(adapter)
    tensors = adapter.expanded()
    for kind, (rows, columns) in {
        "attn.to_qkv_mlp_proj": ((0, 3 * D) if preset == "attention" else (3 * D, 9 * D), (0, D)),
        "attn.to_out": ((0, D), (0, D) if preset == "attention" else (D, 4 * D)),
    }.items():
        name = f"single_transformer_blocks.1.{kind}"
        layer = adapter.layers[name]
        a, b = tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"]
        assert a.shape == (4, layer.in_features)
        assert b.shape == (layer.out_features, 4)
        assert torch.equal(a[:, slice(*columns)], layer.a)
        assert torch.equal(b[slice(*rows)], layer.b * 1.5)
        a[:, slice(*columns)] = 0
        b[slice(*rows)] = 0
        assert a.count_nonzero() == b.count_nonzero() == 0

        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(3), requires_grad=True)
        a, b = layer.expanded()
        base = layer.base(x)
        expected = base + F.linear(F.linear(x, a), b)
        out = layer(x)
        assert torch.equal(out[..., : rows[0]], base[..., : rows[0]])
        assert torch.equal(out[..., rows[1] :], base[..., rows[1] :])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)

        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (through_expanded,) = torch.autograd.grad((expected * weight).sum(), x)
        (through_slice,) = torch.autograd.grad((out * weight).sum(), x)
        torch.testing.assert_close(through_slice, through_expanded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_gradients_of_a_slice_are_those_of_the_whole(transformer: Flux2Transformer, preset: str) -> None:
    adapter = attach(transformer, LoraOptions(flux_lora_target=preset, lora_rank=4), seed=7)
    learn(adapter)
    for name in ("attn.to_qkv_mlp_proj", "attn.to_out"):
        layer = adapter.layers[f"single_transformer_blocks.0.{name}"]
        a, b = (tensor.requires_grad_() for tensor in layer.expanded())
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(3))
        weight = torch.randn(2, 3, layer.out_features, generator=torch.Generator().manual_seed(4))
        whole_a, whole_b = torch.autograd.grad((F.linear(F.linear(x, a), b) * weight).sum(), (a, b))
        live_a, live_b = torch.autograd.grad((layer(x) * weight).sum(), (layer.a, layer.b))
        torch.testing.assert_close(live_a, whole_a[:, layer.column_start : layer.column_stop])
        torch.testing.assert_close(live_b, whole_b[layer.row_start : layer.row_stop])


@pytest.mark.parametrize("preset", PRESETS)
def test_recomputed_blocks_give_the_same_gradients(transformer: Flux2Transformer, preset: str) -> None:
    adapter = attach(transformer, LoraOptions(flux_lora_target=preset, lora_dropout=0.2), seed=7)
    learn(adapter)
    transformer.train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        return list(torch.autograd.grad(velocity(transformer).square().mean(), adapter.parameters()))

    with torch.random.fork_rng():
        plain = gradients()
        for block in transformer.blocks:
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_adapters_are_fp32_on_a_bf16_base(transformer: Flux2Transformer) -> None:
    adapter = attach(transformer.bfloat16(), LoraOptions(flux_lora_target="attention"), seed=7)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    out = velocity(transformer, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}
    assert all(layer.b.grad is not None and layer.b.grad.any() for layer in adapter.layers.values())


def test_draws_belong_to_the_layer_and_the_seed() -> None:
    def drawn(target: str, seed: int = 7) -> dict[str, Tensor]:
        with torch.device("meta"):
            transformer = Flux2Transformer(TINY)
        transformer.to_empty(device="cpu")
        return attach(transformer, LoraOptions(flux_lora_target=target), seed=seed).state()

    everything, tiny = drawn("all"), drawn("tiny")
    assert all(torch.equal(tiny[name], everything[name]) for name in tiny if name.endswith(".a"))
    values = {tuple(tensor.flatten()[:4].tolist()) for name, tensor in everything.items() if name.endswith(".a")}
    assert len(values) == len(everything) // 2
    name = "transformer_blocks.0.attn.to_q.a"
    assert not torch.equal(drawn("tiny", seed=8)[name], tiny[name])


def test_initial_distributions(transformer: Flux2Transformer) -> None:
    options = LoraOptions(lora_rank=16, flux_lora_target="mlp")
    layers = attach(transformer, options, seed=7).layers
    for layer in layers.values():
        bound = 1 / math.sqrt(layer.column_stop - layer.column_start)
        assert 0.95 * bound < layer.a.abs().max() <= bound
        assert layer.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.b.any()
    with torch.random.fork_rng():
        fresh = Flux2Transformer(TINY)
    gaussian = attach(fresh, options.model_copy(update={"lora_init_type": "gaussian"}), seed=7)
    drawn = torch.cat([layer.a.flatten() for layer in gaussian.layers.values()])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.02)


def test_alpha_scales(transformer: Flux2Transformer) -> None:
    adapter = attach(transformer, LoraOptions(lora_rank=4, lora_alpha=8), seed=7)
    assert {layer.scale for layer in adapter.layers.values()} == {2.0}
    assert adapter.alpha == 8


def test_dropout_acts_in_training_only_and_follows_the_generator(transformer: Flux2Transformer) -> None:
    adapter = attach(transformer, LoraOptions(lora_dropout=0.5), seed=7)
    learn(adapter)
    still = velocity(transformer.eval())
    transformer.train()

    def dropped(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return velocity(transformer)

    assert not torch.equal(dropped(0), still)
    assert torch.equal(dropped(0), dropped(0))
    assert not torch.equal(dropped(0), dropped(1))
    assert torch.equal(velocity(transformer.eval()), still)


def test_two_adapters_on_one_layer_add_up() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = nn.Linear(8, 12, bias=False)
    first = LoraLinear(base, draw(2, 8), draw(12, 2), scale=0.5)
    both = LoraLinear(first, draw(3, 4), draw(6, 3), scale=2.0, column_start=4, row_start=3)
    x = draw(5, 8)
    delta = torch.zeros(12, 8)
    delta[3:9, 4:] = 2.0 * both.b @ both.a
    expected = x @ (base.weight + 0.5 * first.b @ first.a + delta).T
    torch.testing.assert_close(both(x), expected, rtol=1e-5, atol=1e-5)


def test_state_goes_back_exactly(transformer: Flux2Transformer) -> None:
    adapter = attach(transformer, LoraOptions(flux_lora_target="attention"), seed=7)
    learn(adapter)
    kept = {name: tensor.clone() for name, tensor in adapter.state().items()}
    learn(adapter)
    adapter.load(kept)
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapter.state().items())
    first = next(iter(kept))
    with pytest.raises(ValueError, match="1 names differ"):
        adapter.load({name: tensor for name, tensor in kept.items() if name != first})
    with pytest.raises(ValueError, match="is \\(1, 1\\), not"):
        adapter.load({**kept, first: torch.zeros(1, 1)})


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("to_q",), 2),
        (("transformer_blocks.1.attn.to_q", "norm_out.linear"), 2),
        (("attn.to_out",), 6),  # the double blocks' to_out is a list, not a Linear
        (r".*\.attn\.to_(q|k)", 4),
        (r"single_transformer_blocks\.[0-2]\..*", 6),
        (("proj_out",), 1),
    ],
)
def test_custom_targets(transformer: Flux2Transformer, targets: str | tuple[str, ...], count: int) -> None:
    base = velocity(transformer)
    adapter = attach(transformer, LoraOptions(peft_lora_target_modules=targets), seed=7)
    assert len(adapter.layers) == count
    assert adapter.target == "custom"
    assert torch.equal(velocity(transformer), base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_q", "to_w", "tu_k"), r'(?s)2 problems.*"to_w" matches no Linear.*"tu_k".*Did you mean to_k'),
        (("attn.to_qkv_mlp",), r"Did you mean attn\.to_qkv_mlp_proj"),
        (("q",), "Names look like"),
        (r"blocks\.\d+", "matches no Linear"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(
    transformer: Flux2Transformer, targets: str | tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(transformer, LoraOptions(peft_lora_target_modules=targets), seed=7)


def test_a_preset_entry_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"2 problems(?s:.*)attn\.to_out(?s:.*)attn\.to_qkv_mlp_proj"):
        attach(Flux2Transformer(TransformerSpec(**{**vars(TINY), "single_blocks": 0})), LoraOptions(), seed=7)
