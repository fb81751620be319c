"""A saved LoRA explains itself, comes back as it was, and is refused where it does not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.base.errors import CheckpointError
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.export import attach_saved, read_lora, save_lora
from simpletuner.flux2.lora import PRESETS, Adapter, attach
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.runs.layout import LORA_NAME

SPEC = TransformerSpec(
    heads=2,
    head_dim=16,
    double_blocks=2,
    single_blocks=3,
    context_dim=24,
    guidance_embeds=True,
    axes=(4, 4, 4, 4),
)
Q = "transformer.transformer_blocks.0.attn.to_q"
WRONG_ALPHAS: list[object] = ["8", [8], {}, True, 0, -1, float("nan"), float("inf"), 10**400]
WRONG_RANKS: list[object] = ["8", None, [8], True, 0, -1, 1.5, 10**400]


def model() -> Flux2Transformer:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flux2Transformer(SPEC).eval()


@torch.no_grad()
def velocity(transformer: Flux2Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    out: Tensor = transformer(
        torch.randn(2, 6, 128, generator=generator),
        torch.randn(2, 5, SPEC.context_dim, generator=generator),
        torch.tensor([0.3, 0.9]),
        torch.tensor([1.0, 4.0]),
        image_ids(2, 3),
        context_ids(5),
    )
    return out


def trained(transformer: Flux2Transformer, *, seed: int = 2, **options: object) -> Adapter:
    adapter = attach(transformer, LoraOptions(**options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / LORA_NAME
    adapter = trained(model(), lora_rank=4, lora_alpha=6.5, flux_lora_target="tiny")
    save_lora(path, adapter, metadata={"base_model": "black-forest-labs/FLUX.2-dev", "run": "1f2e"})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    settings = json.loads(header.pop("lora_adapter_metadata"))
    assert header == {
        "format": "pt",
        "simpletuner.alpha": "6.5",
        "simpletuner.target": "tiny",
        "simpletuner.base_model": "black-forest-labs/FLUX.2-dev",
        "simpletuner.run": "1f2e",
    }
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 4
    assert settings["transformer.target_modules"] == list(adapter.layers)
    saved = read_lora(path)
    assert saved.metadata == {"base_model": "black-forest-labs/FLUX.2-dev", "run": "1f2e"}
    assert (saved.alpha, saved.target) == (6.5, "tiny")


def test_the_header_takes_no_other_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_dir"):
        save_lora(tmp_path / LORA_NAME, trained(model()), metadata={"output_dir": "/home/someone"})


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    adapter = trained(model(), flux_lora_target="attention")
    for name in ("first", "second"):
        save_lora(tmp_path / name, adapter, metadata={"run": "a", "step": "3", "licence": "b"})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_expanded_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = trained(model(), lora_rank=4, lora_alpha=6, flux_lora_target="mlp")
    save_lora(tmp_path / LORA_NAME, adapter, metadata={}, dtype=dtype)
    found = load_file(tmp_path / LORA_NAME)
    expected = adapter.expanded()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key].to(dtype)) for key in expected)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("target", PRESETS)
def test_a_file_comes_back_as_it_was(tmp_path: Path, target: str, alpha: float | None) -> None:
    first = model()
    adapter = trained(first, lora_rank=4, lora_alpha=alpha, flux_lora_target=target)
    save_lora(tmp_path / LORA_NAME, adapter, metadata={})

    second = model()
    again = attach_saved(second, read_lora(tmp_path))
    assert again.audit() == adapter.audit()
    assert again.alpha == adapter.alpha
    for name, tensor in adapter.state().items():
        # Folding a scale of 1.5 into B and taking it out again may cost the last bit.
        torch.testing.assert_close(again.state()[name], tensor, rtol=0 if alpha is None else 1e-6, atol=0)
    if alpha is None:
        assert torch.equal(velocity(second), velocity(first))
    assert_near(velocity(second), velocity(first))
    trainable = {name for name, parameter in second.named_parameters() if parameter.requires_grad}
    assert trainable == again.state().keys()


def test_several_files_add_up_by_their_strengths(tmp_path: Path) -> None:
    save_lora(tmp_path / "1", trained(model(), lora_rank=4, flux_lora_target="attention"), metadata={})
    save_lora(tmp_path / "2", trained(model(), seed=3, lora_rank=2, lora_alpha=3), metadata={})
    strengths = {"1": 0.5, "2": -1.5}

    merged = model()
    weights = merged.state_dict()
    for name, strength in strengths.items():
        tensors = load_file(tmp_path / name)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            weights[f"{layer}.weight"] += strength * tensors[f"transformer.{layer}.lora_B.weight"] @ tensors[key]
    adapted = model()
    adapters = [attach_saved(adapted, read_lora(tmp_path / n), strength=s) for n, s in strengths.items()]
    assert_near(velocity(adapted), velocity(merged))

    with adapters[0].disabled(), adapters[1].disabled():
        assert torch.equal(velocity(adapted), velocity(model()))
    alone = model()
    attach_saved(alone, read_lora(tmp_path / "1"), strength=0.5)
    with adapters[1].disabled():
        assert torch.equal(velocity(adapted), velocity(alone))


def foreign(path: Path, settings: dict[str, object] | None) -> dict[str, Tensor]:
    """A file as another program writes it: no fields of ours."""
    tensors = {
        f"{Q}.lora_A.weight": torch.ones(4, 32),
        f"{Q}.lora_B.weight": torch.ones(32, 4),
        "transformer.proj_out.lora_A.weight": torch.ones(2, 32),
        "transformer.proj_out.lora_B.weight": torch.ones(128, 2),
    }
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    save_file(tensors, path, metadata)
    return tensors


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        (None, [1.0, 1.0]),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {}}, [2.0, 4.0]),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_out": 1}}, [2.0, 0.5]),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, [4.0, 8 / 2**0.5]),
    ],
)
def test_other_programs_files_keep_their_alpha(
    tmp_path: Path, settings: dict[str, object] | None, scales: list[float]
) -> None:
    foreign(tmp_path / "other.safetensors", settings)
    saved = read_lora(tmp_path / "other.safetensors")
    assert [saved.layers[name].scale for name in ("transformer_blocks.0.attn.to_q", "proj_out")] == scales
    assert saved.target == "custom"
    adapter = attach_saved(model(), saved)
    assert adapter.layers["proj_out"].rank == 2

    # Saved again, it is one of ours: ranks differ, so PEFT is told about the odd one.
    save_lora(tmp_path / LORA_NAME, adapter, metadata={})
    with safe_open(tmp_path / LORA_NAME, framework="pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    odd = "proj_out" if written["transformer.r"] == 4 else "transformer_blocks.0.attn.to_q"
    assert written["transformer.rank_pattern"] == {odd: 2 if odd == "proj_out" else 4}
    assert written["transformer.alpha_pattern"] == written["transformer.rank_pattern"]
    again = read_lora(tmp_path)
    for name, layer in saved.layers.items():
        back = again.layers[name]
        torch.testing.assert_close(back.scale * back.b @ back.a, layer.scale * layer.b @ layer.a)


def test_a_folder_stands_for_the_lora_in_it(tmp_path: Path) -> None:
    save_lora(tmp_path / LORA_NAME, trained(model()), metadata={})
    assert read_lora(tmp_path).path == tmp_path / LORA_NAME


def without(key: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = foreign(path, None)
        del tensors[key]
        save_file(tensors, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no LoRA at"),
        (lambda path: path.write_bytes(b"\x10\0\0\0"), "cannot be read"),
        (lambda path: save_file({}, path), "has no layers"),
        (
            lambda path: save_file({"diffusion_model.img_in.lora_A.weight": torch.ones(1, 1)}, path),
            r"diffusion_model\.img_in without a matching lora_A and lora_B",
        ),
        (
            lambda path: save_file({f"{Q}.lora_A.weight": torch.ones(1, 1), f"{Q}.alpha": torch.ones(1)}, path),
            r"to_q without a matching lora_A and lora_B",
        ),
        (without(f"{Q}.lora_B.weight"), r"to_q without a matching lora_A and lora_B"),
        (lambda path: foreign(path, {"transformer.use_dora": True}), "trained with use_dora"),
    ],
)
def test_a_file_that_is_no_lora_of_ours_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "odd.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=message):
        read_lora(path)


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    save_lora(tmp_path / LORA_NAME, trained(model()), metadata={"base_model": "black-forest-labs/FLUX.2-dev"})
    saved = read_lora(tmp_path)
    wider = Flux2Transformer(TransformerSpec(**{**vars(SPEC), "heads": 3}))
    message = (
        r"30 of 30 layers, such as single_transformer_blocks\.0\.attn\.to_out, which is 32 × 128 in the file "
        r"and 48 × 192 in the model.*trained on, black-forest-labs/FLUX\.2-dev \(dev\)\. Give --model_flavour dev"
    )
    with pytest.raises(CheckpointError, match=message):
        attach_saved(wider, saved)
    shorter = Flux2Transformer(TransformerSpec(**{**vars(SPEC), "single_blocks": 2}))
    with pytest.raises(CheckpointError, match=r"2 of 30 layers, such as single_transformer_blocks\.2.*missing"):
        attach_saved(shorter, saved)


def test_weights_outside_a_presets_slice_are_not_lost_silently(tmp_path: Path) -> None:
    path = tmp_path / LORA_NAME
    save_lora(path, trained(model(), flux_lora_target="attention"), metadata={})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight"][0, -1] = 1
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match="outside the rows and columns"):
        attach_saved(model(), read_lora(path))


# --- headers and tensors of other programs, damaged in every way: an error with the file's name, in bounded time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"transformer.lora_alpha": alpha}, "lora_alpha = ") for alpha in WRONG_ALPHAS),
        *(({"transformer.alpha_pattern": {"proj_out": alpha}}, "alpha_pattern proj_out = ") for alpha in WRONG_ALPHAS),
        ({"transformer.alpha_pattern": {"proj_out": None}}, "alpha_pattern proj_out = None"),
        *(({"transformer.r": rank}, "the rank of r is ") for rank in WRONG_RANKS),
        *(({"transformer.rank_pattern": {"proj_out": rank}}, "the rank of proj_out is ") for rank in WRONG_RANKS),
        *(({f"transformer.{key}": 7}, f"{key} = 7 in its header") for key in ("alpha_pattern", "rank_pattern")),
        *(
            ({"transformer.alpha_pattern": {pattern: 1}}, "has the regular expression")
            for pattern in ("((a+)+)+$", "(.*a){30}", "proj_out|to_q", "blocks.[0-9].attn", "", "(")
        ),
    ],
)
def test_a_wrong_value_in_a_header_is_refused_by_name(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    foreign(tmp_path / "odd.safetensors", settings)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_lora(tmp_path / "odd.safetensors")
    assert "odd.safetensors" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000, "NaN"])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    tensors = foreign(tmp_path / "odd.safetensors", None)
    save_file(tensors, tmp_path / "odd.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"lora_adapter_metadata = .*expected a JSON object"):
        read_lora(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("alpha", "remedy"),
    [
        ("0", "save it again with another alpha, such as its rank"),
        ("-1.5", "A negative alpha subtracts a LoRA: save it again with an alpha of 1.5"),
        *(
            (text, "The file is damaged: use another copy")
            for text in ("nan", "inf", "-inf", "2e9", "", "four", "1e999")
        ),
    ],
)
def test_an_alpha_of_ours_that_makes_no_lora_is_refused(tmp_path: Path, alpha: str, remedy: str) -> None:
    tensors = foreign(tmp_path / "odd.safetensors", None)
    save_file(tensors, tmp_path / "odd.safetensors", {"simpletuner.alpha": alpha})
    with pytest.raises(CheckpointError, match=rf"simpletuner\.alpha = .*expected a number above 0.* {remedy}"):
        read_lora(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("pattern", ["proj_out", "^proj_out", "^proj_out$", "proj_out$"])
def test_names_in_alpha_pattern_match_as_in_peft(tmp_path: Path, pattern: str) -> None:
    settings = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 1, "out": 3}}
    foreign(tmp_path / "other.safetensors", settings)
    layers = read_lora(tmp_path / "other.safetensors").layers
    assert [layers[name].scale for name in ("transformer_blocks.0.attn.to_q", "proj_out")] == [2.0, 0.5]


def test_the_first_matching_pattern_decides_as_in_peft(tmp_path: Path) -> None:
    patterns = {"to_q": 4, "attn.to_q": 12, r"transformer_blocks\.0\.attn\.to_q": 20, "proj_out": 2}
    foreign(tmp_path / "other.safetensors", {"transformer.alpha_pattern": patterns})
    assert read_lora(tmp_path / "other.safetensors").layers["transformer_blocks.0.attn.to_q"].scale == 1.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)},
            "NaN or infinite values in 1 of 2 layers",
        ),
        ({f"{Q}.lora_B.weight": torch.full((32, 4), -torch.inf)}, "NaN or infinite values in 1 of 2 layers"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 32), f"{Q}.lora_B.weight": torch.ones(32, 0)}, "1 empty layers.*rank of"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 0)}, "1 empty layers"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 32)}, "to_q without a matching lora_A and lora_B"),
        ({f"{Q}.lora_A.weight": torch.ones(4)}, "to_q without a matching"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}, "as torch.int8: expected floating-point"),
    ],
)
def test_tensors_that_make_no_lora_are_refused(tmp_path: Path, changed: dict[str, Tensor], message: str) -> None:
    tensors = foreign(tmp_path / "odd.safetensors", None) | changed
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "odd.safetensors")


def test_an_unknown_target_in_a_header_is_a_custom_one(tmp_path: Path) -> None:
    tensors = foreign(tmp_path / "odd.safetensors", None)
    save_file(tensors, tmp_path / "odd.safetensors", {"simpletuner.alpha": "4", "simpletuner.target": "of tomorrow"})
    assert read_lora(tmp_path / "odd.safetensors").target == "custom"
