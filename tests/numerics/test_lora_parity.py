"""The adapter against PEFT on diffusers' transformer: gradients, and what diffusers makes of our files."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lora_dialects import DialectRow, DrawnAdapter, write_dialect
from torch import Tensor, nn

from simpletuner.base.quiet import quiet_import
from simpletuner.config.flavours import TINY, TINY_KLEIN, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.adapter_kinds import factors_of
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.dialects import AdapterFile
from simpletuner.flux2.export import attach_saved, read_lora, save_lora
from simpletuner.flux2.fixed import FixedLinear, attach_fixed, read_for_sampling
from simpletuner.flux2.lora import PRESETS, Adapter, attach
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.tokens import context_ids, image_ids, pack_latents
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.runs.layout import LORA_NAME

SMALL = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=2, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)


def model(spec: TransformerSpec = TINY) -> Flux2Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flux2Transformer(spec).eval()


def reference(spec: TransformerSpec = TINY) -> Any:
    from diffusers import Flux2Transformer2DModel

    config = {key: value for key, value in transformer_to_diffusers(spec).items() if key != "_class_name"}
    theirs = Flux2Transformer2DModel(**config)
    theirs.load_state_dict(model(spec).state_dict())
    return theirs.eval()


def pipeline(spec: TransformerSpec = TINY) -> Any:
    """A pipeline of nothing but the transformer: enough for its LoRA loader."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    kind = Flux2Pipeline if spec.guidance_embeds else Flux2KleinPipeline
    return kind(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=reference(spec))


def trained(transformer: Flux2Transformer, *, seed: int = 2, **options: object) -> Adapter:
    adapter = attach(transformer, LoraOptions(**options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def inputs(spec: TransformerSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 128, 3, 4, generator=generator),
        torch.tensor([0.3, 0.9]),
        torch.randn(2, 9, spec.context_dim, generator=generator),
        torch.tensor([1.0, 4.0]),
    )


def velocity(transformer: Flux2Transformer) -> Tensor:
    """As tokens."""
    latents, sigma, context, guidance = inputs(transformer.spec)
    return pack_latents(Denoiser(transformer)(latents, sigma, Condition(TextContext.dense(context), guidance)))


def reference_velocity(theirs: Any, spec: TransformerSpec = TINY) -> Tensor:
    latents, sigma, context, guidance = inputs(spec)
    out: Tensor = theirs(
        hidden_states=pack_latents(latents),
        encoder_hidden_states=context,
        timestep=sigma,
        guidance=guidance if spec.guidance_embeds else None,
        img_ids=image_ids(*latents.shape[-2:]),
        txt_ids=context_ids(context.shape[1]),
        return_dict=False,
    )[0]
    return out


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("alpha", "spec"), [(4.0, TINY), pytest.param(6.0, TINY, marks=pytest.mark.slow), (6.0, TINY_KLEIN)]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_equal_pefts(preset: str, alpha: float, spec: TransformerSpec) -> None:
    """With the expanded tensors in PEFT; of its gradients, those of the live rows and columns are ours."""
    from peft import LoraConfig

    ours, theirs = model(spec), reference(spec)
    adapter = trained(ours, lora_rank=4, lora_alpha=alpha, flux_lora_target=preset)
    theirs.requires_grad_(False)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=list(adapter.layers)))
    pairs = {}
    for name, layer in adapter.layers.items():
        peft = theirs.get_submodule(name)
        theirs_a, theirs_b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
        a, b = layer.expanded()
        theirs_a.data.copy_(a)
        theirs_b.data.copy_(b / layer.scale)
        pairs[name] = (theirs_a, theirs_b)
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {id(p) for ab in pairs.values() for p in ab}

    target = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(5))
    found, expected = velocity(ours), reference_velocity(theirs, spec)
    assert_near(found, expected)
    (found - target).square().mean().backward()
    (expected - target).square().mean().backward()
    for name, layer in adapter.layers.items():
        theirs_a, theirs_b = pairs[name]
        assert_near(layer.a.grad, theirs_a.grad[:, layer.column_start : layer.column_stop])
        assert_near(layer.b.grad, theirs_b.grad[layer.row_start : layer.row_stop])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What diffusers' loader says: a missing or unexpected key is only a warning there. What libraries say of this
    machine while they are imported is said before.
    """
    with quiet_import():
        import peft.tuners.lora  # noqa: F401
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")
    return caplog


@pytest.mark.parametrize(
    ("alpha", "spec"), [(4.0, TINY), pytest.param(6.0, TINY, marks=pytest.mark.slow), (6.0, TINY_KLEIN)]
)
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_an_exported_file_loads_in_diffusers(
    tmp_path: Path, said: pytest.LogCaptureFixture, preset: str, alpha: float, spec: TransformerSpec
) -> None:
    ours = model(spec)
    adapter = trained(ours, lora_rank=4, lora_alpha=alpha, flux_lora_target=preset)
    save_lora(tmp_path / LORA_NAME, adapter, metadata={"run": "1f2e", "licence": "non-commercial"})

    pipe = pipeline(spec)
    pipe.load_lora_weights(tmp_path, adapter_name="ours")
    assert said.records == []
    taken = {name: parameter for name, parameter in pipe.transformer.named_parameters() if ".lora_" in name}
    saved = adapter.expanded()
    assert len(taken) == len(saved)
    for name, parameter in taken.items():
        assert torch.equal(parameter, saved[f"transformer.{name.replace('.ours.', '.')}"])
    assert_near(reference_velocity(pipe.transformer, spec), velocity(ours))
    assert (reference_velocity(reference(spec), spec) - velocity(ours)).abs().max() > 1e-2


@torch.no_grad()
def test_custom_layers_outside_the_blocks_load_in_diffusers(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """norm_out among them, whose halves other formats swap."""
    ours = model()
    targets = (
        "norm_out.linear",
        "proj_out",
        "x_embedder",
        "context_embedder",
        "single_stream_modulation.linear",
        "timestep_embedder.linear_1",
    )
    save_lora(tmp_path / LORA_NAME, trained(ours, peft_lora_target_modules=targets), metadata={})
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path)
    assert said.records == []
    assert_near(reference_velocity(pipe.transformer), velocity(ours))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters are what is wanted
@torch.no_grad()
def test_two_files_with_strengths_add_up_as_in_diffusers(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    save_lora(tmp_path / "first.safetensors", trained(model(), flux_lora_target="attention"), metadata={})
    second = trained(model(), seed=3, lora_rank=4, lora_alpha=2)
    save_lora(tmp_path / "second.safetensors", second, metadata={}, dtype=torch.bfloat16)
    strengths = {"first": 0.7, "second": 1.3}
    ours, pipe = model(), pipeline()
    for name, strength in strengths.items():
        attach_saved(ours, read_lora(tmp_path / f"{name}.safetensors"), strength=strength)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(strengths), list(strengths.values()))
    assert said.records == []
    assert_near(reference_velocity(pipe.transformer), velocity(ours))


@torch.no_grad()
def test_a_file_that_diffusers_saved_means_the_same_here(tmp_path: Path) -> None:
    """With alpha other than the rank, which only the header tells."""
    from diffusers import Flux2Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    theirs = reference()
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "attn.to_qkv_mlp_proj"], alpha_pattern={"to_q": 6})
    theirs.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    Flux2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        **_collate_lora_metadata({"transformer": theirs}),
    )
    ours = model()
    attach_saved(ours, read_lora(tmp_path))
    assert_near(velocity(ours), reference_velocity(theirs))


@pytest.mark.parametrize(
    ("row", "blocks_only"),
    [
        ("1 diffusers", False),
        ("2 ai-toolkit, diffusion-pipe", True),
        ("3 PEFT on BFL's model", True),
        ("4 musubi-tuner", True),
        ("12 old diffusers", False),
    ],
)
@torch.no_grad()
def test_other_programs_files_mean_the_same_in_diffusers(
    tmp_path: Path, said: pytest.LogCaptureFixture, row: str, blocks_only: bool
) -> None:
    """Of BFL's names the blocks alone: diffusers takes the halves of the last modulation the wrong way round."""
    path = tmp_path / LORA_NAME
    write_dialect(path, SMALL, row, blocks_only=blocks_only)
    pipe = pipeline(SMALL)
    pipe.load_lora_weights(tmp_path)
    assert said.records == []
    ours = model(SMALL)
    attach_saved(ours, read_lora(path))
    expected = reference_velocity(pipe.transformer, SMALL)
    assert_near(velocity(ours), expected)
    assert (velocity(model(SMALL)) - expected).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def test_a_rank_stabilized_lora_means_the_same_here(tmp_path: Path) -> None:
    from diffusers import Flux2Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    theirs = reference(SMALL)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "attn.to_qkv_mlp_proj"]))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    Flux2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        **_collate_lora_metadata({"transformer": theirs}),
    )
    saved = read_lora(tmp_path)
    assert {layer.scale for layer in saved.layers.values()} == {3.0}
    ours = model(SMALL)
    attach_saved(ours, saved)
    assert_near(velocity(ours), reference_velocity(theirs, SMALL))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHaConfig", {"r": 4, "alpha": 2}),
        ("LoKrConfig", {"r": 4, "alpha": 2}),
        ("LoKrConfig", {"r": 2, "alpha": 8, "decompose_both": True}),
        ("LoKrConfig", {"r": 64, "alpha": 64, "decompose_factor": 6}),
    ],
)
@torch.no_grad()
def test_lokr_and_loha_factors_act_as_in_peft(kind: str, options: dict[str, Any]) -> None:
    import peft

    config = getattr(peft, kind)(target_modules=["0"], init_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(nn.Sequential(nn.Linear(48, 72, bias=False)), config)
        x = torch.randn(5, 48)
    base = nn.Linear(48, 72, bias=False)
    base.weight.copy_(theirs.base_model.model[0].base_layer.weight)
    tensors = {key.rpartition(".")[2]: value for key, value in peft.get_peft_model_state_dict(theirs).items()}
    factors = factors_of(tensors, float(config.alpha))
    assert factors is not None
    expected = theirs(x)
    assert (expected - base(x)).abs().max() > 1e-3
    assert_near(FixedLinear(base, factors)(x), expected)


def draw_square_lokr(
    row: DialectRow, rows: int, columns: int, rank: int, alpha: float, generator: torch.Generator
) -> DrawnAdapter:
    """A LoKr with w1 whole, in the sizes that diffusers looks for: of every size the two divisors with the least sum,
    of which w1 has the smaller.
    """
    smaller = [max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0) for size in (rows, columns)]
    shapes = {
        ".lokr_w1": (smaller[0], smaller[1]),
        ".lokr_w2_a": (rows // smaller[0], rank),
        ".lokr_w2_b": (rank, columns // smaller[1]),
    }
    w1, w2_a, w2_b = (0.3 * torch.randn(shape, generator=generator) for shape in shapes.values())
    delta = torch.kron(w1.double(), w2_a.double() @ w2_b.double())
    return dict(zip(shapes, (w1, w2_a, w2_b), strict=True)), delta * (alpha / rank if row.has_alpha else 1.0)


@torch.no_grad()
def test_a_lokr_of_fused_layers_means_what_it_does_in_diffusers(tmp_path: Path) -> None:
    """In ComfyUI's keys with alpha, of all blocks. Outside them diffusers exchanges no halves of norm_out."""
    row = "2b OneTrainer for ComfyUI"
    # Of a higher rank diffusers takes w2 to be whole.
    write_dialect(tmp_path / LORA_NAME, SMALL, row, draw=draw_square_lokr, ranks=(2,), blocks_only=True)
    ours, pipe = model(SMALL), pipeline(SMALL)
    file = read_for_sampling(tmp_path / LORA_NAME)
    assert isinstance(file, AdapterFile)
    attach_fixed(ours, file)
    pipe.load_lora_weights(tmp_path)
    assert_near(reference_velocity(pipe.transformer, SMALL), velocity(ours))
    assert (velocity(model(SMALL)) - velocity(ours)).abs().max() > 1e-2
