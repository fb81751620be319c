"""Adapter files of other programs: every dialect is recognized, read to the last number, or refused by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lora_dialects import MIXTURE, ROWS, draw_loha, draw_lokr, units, write_dialect
from tests.unit.flux2.test_export import velocity
from torch import Tensor

from simpletuner.base.errors import CheckpointError
from simpletuner.config.flavours import DEV, KLEIN_4B, TINY, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.dialects import AdapterFile, check_all_read, read_adapter
from simpletuner.flux2.export import attach_saved, read_lora, save_lora
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.lora import attach, linears
from simpletuner.flux2.lora_formats import write_adapter
from simpletuner.flux2.names import from_bfl, known_module, to_bfl
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=2, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
KLEIN = TransformerSpec(**{**vars(SPEC), "guidance_embeds": False})
KOHYA = "4 musubi-tuner"
COMFYUI = "2 ai-toolkit, diffusion-pipe"
DIALECTS = {
    "1 diffusers": "diffusers",
    "1b diffusers with alpha": "diffusers",
    COMFYUI: "comfyui",
    "2b OneTrainer for ComfyUI": "comfyui",
    "3 PEFT on BFL's model": "bfl",
    "3b PEFT on diffusers' model": "peft",
    KOHYA: "kohya",
    "5 mixed tools": "diffusion_model.<bfl>.lora_down",
    "5b mixed tools without alpha": "diffusion_model.<bfl>.lora_down",
    "6 OneTrainer original": "onetrainer-original",
    "7 DiffSynth": "diffsynth",
    "8 OneTrainer legacy": "onetrainer-legacy",
    "9 OneTrainer mixture": "onetrainer",
    "10 diffusers under ComfyUI's prefix": "diffusion_model.<diffusers>.lora_A",
    "11 LyCORIS": "lycoris",
    "12 old diffusers": "diffusers-old",
    "13 whole checkpoint's prefix": "model.diffusion_model.<bfl>.lora_A",
    "13b unet": "unet.<bfl>.lora_A",
    "13c lora_unet with diffusers' names": "lora_unet_<diffusers>.lora_down",
    "MUS converted": "comfyui",
    "lycoris with BFL's names": "lycoris-bfl",
    "no .weight": "comfyui",
    "_lora.up": "diffusers-old",
    "lora_linear_layer": "transformer.<diffusers>.lora_linear_layer.down",
}


def model(spec: TransformerSpec = SPEC) -> Flux2Transformer:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flux2Transformer(spec).eval()


def with_deltas(deltas: Mapping[str, Tensor], spec: TransformerSpec) -> Flux2Transformer:
    """The model with the deltas in its weights."""
    merged = model(spec)
    for name, linear in linears(merged).items():
        linear.get_parameter("weight").data.add_(deltas[name].float())
    return merged


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_holds(file: AdapterFile, deltas: Mapping[str, Tensor]) -> None:
    assert file.unread == {}
    assert file.modules.keys() == deltas.keys()
    for name, factors in file.modules.items():
        assert factors.shape == deltas[name].shape
        assert_near(factors.delta().double(), deltas[name])


# --- names


@pytest.mark.parametrize("spec", [TINY, DEV, KLEIN_4B], ids=["tiny", "dev", "klein-4b"])
def test_every_linear_is_known_by_every_spelling_of_both_its_names(spec: TransformerSpec) -> None:
    with torch.device("meta"):
        found = {name: (each.out_features, each.in_features) for name, each in linears(Flux2Transformer(spec)).items()}
    own = {name: unit for unit in units(spec) for name in unit.diffusers}
    assert found == {name: (unit.rows // len(unit.diffusers), unit.columns) for name, unit in own.items()}
    for name, unit in own.items():
        for spelled in (name, name.replace(".", "_")):
            assert known_module(spelled) == ("diffusers", name)
        for spelled in (unit.bfl, unit.bfl.replace(".", "_"), unit.bfl.replace("attn.", "attn_")):
            assert known_module(spelled) == ("bfl", unit.bfl)
        place, renamed = to_bfl(name), from_bfl(f"{unit.bfl}.weight")
        assert place is not None
        assert renamed is not None
        assert (place.name, place.part, place.parts) == (unit.bfl, unit.diffusers.index(name), len(unit.diffusers))
        assert renamed.names == tuple(f"{each}.weight" for each in unit.diffusers)
        assert place.swaps_halves == (name == "norm_out.linear")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "double_blocks",
        "double_blocks_0",
        "double_blocks.x.img_attn.qkv",
        "double_blocks.0.img_mod.lin",
        "single_blocks.0.modulation.lin",
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.norm1.linear",
        "blocks.0.self_attn.q",
        "down_blocks_0_attentions_0_to_q",
        "vector_in.in_layer",
    ],
)
def test_names_of_other_models_are_not_known(name: str) -> None:
    assert known_module(name) is None


# --- what is read


@pytest.mark.parametrize("row", ROWS)
def test_each_dialect_is_recognized_and_read_for_training(tmp_path: Path, row: str) -> None:
    path = tmp_path / "lora.safetensors"
    deltas = write_dialect(path, SPEC, row)
    file = read_adapter(path)
    assert (file.dialect, file.header_scaled, file.dialects) == (DIALECTS[row], frozenset(), ())
    assert_holds(file, deltas)
    layers = read_lora(path).layers
    assert layers.keys() == deltas.keys()
    for name, layer in layers.items():
        assert_near(layer.scale * layer.b.double() @ layer.a.double(), deltas[name])


def with_output_zero(path: Path) -> None:
    """Write the file at `path` again with every matrix that writes an output at zero."""
    outputs = tuple({row.sides[1] for row in ROWS.values()})
    save_file({key: tensor * (not key.endswith(outputs)) for key, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [(SPEC, tuple(ROWS)), (KLEIN, tuple(ROWS)), (SPEC, (KOHYA,))],
    ids=["dev, all", "klein, all", "dev, kohya"],
)
def test_a_foreign_lora_is_trained_further_with_its_effect(
    tmp_path: Path, spec: TransformerSpec, rows: tuple[str, ...]
) -> None:
    """And with none at all where its factors are zero."""
    path = tmp_path / "lora.safetensors"
    deltas = write_dialect(path, spec, *rows)
    adapted = model(spec)
    adapter = attach_saved(adapted, read_lora(path))
    assert adapter.layers.keys() == deltas.keys()
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    expected, bare = velocity(with_deltas(deltas, spec)), velocity(model(spec))
    assert_near(velocity(adapted), expected)
    assert (bare - expected).abs().max() > 0.01 * expected.abs().max()

    with_output_zero(path)
    adapted = model(spec)
    assert attach_saved(adapted, read_lora(path)).layers.keys() == deltas.keys()
    assert torch.equal(velocity(adapted), bare)


@pytest.mark.parametrize("rows", [MIXTURE, tuple(ROWS)], ids=["fal's", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dialects_ranks_and_types_are_mixed(tmp_path: Path, rows: tuple[str, ...], dtype: torch.dtype) -> None:
    path = tmp_path / "lora.safetensors"
    deltas = write_dialect(path, SPEC, *rows, ranks=(4, 1, 8), dtype=dtype)
    file = read_adapter(path)
    assert file.dialect == "mixed"
    assert set(file.dialects) == {DIALECTS[row] for row in rows}
    assert_holds(file, deltas)
    factors = file.modules.values()
    assert all(isinstance(each, LowRank) and each.a.dtype == each.b.dtype == dtype for each in factors)
    assert {each.rank for each in factors} == {1, 4, 8}
    for name, layer in read_lora(path).layers.items():
        assert layer.a.dtype == layer.b.dtype == torch.float32
        assert_near(layer.scale * layer.b.double() @ layer.a.double(), deltas[name])


def test_fp8_factors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    a, b = torch.randn(2, 32).to(torch.float8_e4m3fn), torch.randn(32, 2).to(torch.float8_e5m2)
    save_file({f"{HERE}.lora_A.weight": a, f"{HERE}.lora_B.weight": b}, path)
    (layer,) = read_lora(path).layers.values()
    assert torch.equal(layer.a, a.float())
    assert torch.equal(layer.b, b.float())


def test_an_alpha_of_the_rank_is_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_dialect(path, SPEC, KOHYA)
    tensors = load_file(path)
    ranks = {key.replace("lora_down.weight", "alpha"): len(tensor) for key, tensor in tensors.items() if "down" in key}
    save_file(tensors | {key: torch.tensor(float(rank)) for key, rank in ranks.items()}, path)
    with_alpha = read_lora(path).layers
    save_file({key: tensor for key, tensor in tensors.items() if key not in ranks}, path)
    without = read_lora(path).layers
    assert with_alpha.keys() == without.keys()
    for name, layer in without.items():
        assert layer.scale == with_alpha[name].scale == 1.0
        assert torch.equal(layer.a, with_alpha[name].a)
        assert torch.equal(layer.b, with_alpha[name].b)


@pytest.mark.parametrize("draw", [draw_loha, draw_lokr])
@pytest.mark.parametrize(
    ("row", "dialect"),
    [
        (COMFYUI, "comfyui"),
        (KOHYA, "kohya"),
        ("1 diffusers", "diffusers"),
        ("7 DiffSynth", "diffsynth"),
        ("11 LyCORIS", "lycoris"),
        ("lycoris with BFL's names", "lycoris-bfl"),
    ],
)
def test_loha_and_lokr_are_read_and_not_trained(tmp_path: Path, row: str, dialect: str, draw: Any) -> None:
    path = tmp_path / "adapter.safetensors"
    deltas = write_dialect(path, SPEC, row, draw=draw)
    file = read_adapter(path)
    assert file.dialect == dialect
    assert_holds(file, deltas)
    title = "LoHa" if draw is draw_loha else "LoKr"
    with pytest.raises(
        CheckpointError, match=rf"holds a {title}, for example in .*expected a LoRA.*sample --lora FILE"
    ):
        read_lora(path)


@pytest.mark.parametrize(("lora_format", "target"), [("comfyui", "attention"), ("bfl", "tiny"), ("kohya", "all")])
def test_our_own_file_in_another_format_goes_on_as_it_was(tmp_path: Path, lora_format: Any, target: str) -> None:
    own, converted = tmp_path / "own.safetensors", tmp_path / "converted.safetensors"
    adapter = attach(model(), LoraOptions(lora_rank=4, lora_alpha=6, flux_lora_target=target), seed=1)
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.b)
    save_lora(own, adapter, metadata={"base_model": "a model"})
    file = read_adapter(own)
    write_adapter(converted, dict(file.modules), lora_format, file.header)
    before, after = read_lora(own), read_lora(converted)
    assert (after.alpha, after.target, after.metadata) == (before.alpha, before.target, before.metadata)
    assert after.layers.keys() == before.layers.keys()
    for name, layer in before.layers.items():
        assert after.layers[name].scale == layer.scale
        assert torch.equal(after.layers[name].a, layer.a)
        assert torch.equal(after.layers[name].b, layer.b)


# --- what is not read

HERE = "diffusion_model.double_blocks.0.img_attn.proj"


def lora(stem: str = HERE, rows: int = 32) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": torch.ones(2, 32), f"{stem}.lora_B.weight": torch.ones(rows, 2)}


@pytest.mark.parametrize(
    ("also", "kind", "message"),
    [
        ({f"{HERE}.dora_scale": torch.ones(32, 1)}, "dora", r"holds DoRA in 3 keys.*LoRA, LoKr or LoHa.*ComfyUI"),
        ({f"{HERE}.lora_magnitude_vector": torch.ones(32)}, "dora", r"DoRA \(PEFT\).*diffusers and PEFT can apply it"),
        ({f"{HERE}.magnitude": torch.ones(32)}, "dora", r"DoRA \(ai-toolkit\).*ai-toolkit can apply it"),
        ({f"{HERE}.oft_R.weight": torch.ones(4, 28)}, "oft", r"OFT \(PEFT\).*PEFT and OneTrainer can apply it"),
        ({f"{HERE}.oft_blocks": torch.ones(4, 8, 8)}, "oft", r"OFT \(LyCORIS\).*ComfyUI and LyCORIS can apply it"),
        ({f"{HERE}.diff": torch.ones(32, 32)}, "diff", r"\(\.diff\) in 3 keys.*ComfyUI can apply it"),
    ],
)
def test_other_kinds_are_named_with_what_reads_them(
    tmp_path: Path, also: dict[str, Tensor], kind: str, message: str
) -> None:
    """Alone, and beside a LoRA of another layer."""
    path = tmp_path / "adapter.safetensors"
    save_file(lora() | also, path)
    file = read_adapter(path)
    assert file.modules == {}
    assert file.unread == dict.fromkeys(lora() | also, kind)
    assert file.dialect == "comfyui"
    save_file(lora() | also | lora("diffusion_model.double_blocks.1.img_attn.proj"), path)
    assert list(read_adapter(path).modules) == ["transformer_blocks.1.attn.to_out.0"]
    for read in (read_lora, lambda path: check_all_read(read_adapter(path))):
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_a_norms_patch_is_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"
    save_file(lora() | {key: torch.ones(16)}, path)
    file = read_adapter(path)
    assert list(file.modules) == ["transformer_blocks.0.attn.to_out.0"]
    assert file.unread == {key: "diff"}


def test_a_text_encoders_layers_are_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    stems = (
        "lora_te_model_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_3_mlp_fc1",
        "text_encoder.model.layers.0.mlp.up_proj",
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj",
        "base_model.model.model.layers.0.self_attn.q_proj",
    )
    others = {key: tensor for stem in stems for key, tensor in lora(stem).items()}
    save_file(lora() | others, path)
    file = read_adapter(path)
    assert file.unread == dict.fromkeys(others, "text encoder")
    check_all_read(file)
    saved = read_lora(path)
    assert list(saved.layers) == ["transformer_blocks.0.attn.to_out.0"]
    assert saved.unused == len(others)


ODD = "lora_unet_down_blocks_0_attentions_0_to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{ODD}.lora_down.weight": torch.ones(2, 8), f"{ODD}.lora_up.weight": torch.ones(8, 2)},
            rf"none of its 2 keys names a layer of FLUX\.2; they are those of a LoRA under lora_unet_, such as {ODD}",
        ),
        (lora("transformer.single_transformer_blocks.0.norm.linear"), r"2 keys.*a LoRA under transformer\., such as"),
        (lora("blocks.0.self_attn.q"), r"none of its 2 keys.*those of a LoRA, such as blocks\.0.*another model"),
        ({"blocks.0.q.lokr_w1": torch.ones(2, 2)}, r"none of its 1 keys.*those of a LoKr or LoHa, such as"),
        ({"double_blocks.0.img_attn.proj.weight": torch.ones(2, 2)}, r"1 keys.*one is double_blocks.*is not a LoRA"),
        (lora("lora_te_model_layers_0_self_attn_q_proj"), r"none of its 2 keys.*all are for a text encoder"),
        ({f"{HERE}.alpha": torch.ones(())}, r"none of its 1 keys"),
        (lora() | lora("blocks.0.self_attn.q"), r"has 2 unknown keys, such as blocks\.0\.self_attn\.q"),
        (lora() | {f"{HERE}.lora_B.bias": torch.ones(32)}, r"has 1 unknown keys, such as .*lora_B\.bias"),
        (
            lora() | lora("transformer.transformer_blocks.0.attn.to_out.0"),
            rf"to_out\.0 twice, as ({re.escape(HERE)}|transformer\.\S+) and as \S+: expected each Linear once",
        ),
        (lora("diffusion_model.double_blocks.0.img_attn.qkv", rows=32), r"qkv has 32 rows: expected equal parts"),
        (lora("diffusion_model.final_layer.adaLN_modulation.1", rows=33), r"adaLN_modulation\.1 has 33 rows"),
        (
            lora() | {f"{HERE}.lora_A.default.weight": torch.ones(2, 32)},
            r"the same matrix twice, as \S+ and as \S+: expected one adapter",
        ),
        (lora() | {f"{HERE}.lokr_w1": torch.ones(2, 2)}, r"img_attn\.proj has no lokr_w2"),
        (
            lora() | {f"{HERE}.lokr_w1": torch.ones(2, 2), f"{HERE}.lokr_w2": torch.ones(16, 16)},
            r"matrices of a LoRA together with those of another kind",
        ),
        (lora() | {f"{HERE}.alpha": torch.ones(2)}, r"proj\.alpha is 2: expected a single number"),
        *(
            (lora() | {f"{HERE}.alpha": torch.tensor(alpha)}, r"img_attn\.proj\.alpha = \S+: expected a number above 0")
            for alpha in (0.0, -4.0, torch.nan, torch.inf)
        ),
        (
            {f"{HERE}.lora_A.weight": torch.ones(2, 32), f"{ODD}.lora_up.weight": torch.ones(8, 2)},
            r"img_attn\.proj without a matching lora_A and lora_B",
        ),
        (
            {f"{HERE}.lora_A.weight": torch.ones(2, 32), "unet.img_in.lora_A.weight": torch.ones(2, 32)},
            r"2 layers, such as \S+, without a matching",
        ),
        ({key: tensor.to(torch.int8) for key, tensor in lora().items()}, r"2 problems(.|\n)*as torch\.int8"),
        ({key: tensor * torch.nan for key, tensor in lora().items()}, r"NaN or infinite values in 1 of 1 layers"),
    ],
)
def test_what_makes_no_lora_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora(path)
    assert all(str(path) in problem.found for problem in caught.value.problems)


@pytest.mark.parametrize("size", [0, 4, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.safetensors"
    write_dialect(path, SPEC, KOHYA)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        read_adapter(path)


def test_a_lora_of_another_size_is_refused(tmp_path: Path) -> None:
    write_dialect(tmp_path / "lora.safetensors", TransformerSpec(**{**vars(SPEC), "heads": 3}), KOHYA)
    found = len(linears(model()))
    with pytest.raises(CheckpointError, match=rf"does not fit this model: {found} of {found} layers, such as"):
        attach_saved(model(), read_lora(tmp_path / "lora.safetensors"))
