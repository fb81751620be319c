"""What inspection says of adapters of every dialect, of models and of other files, against what they were made of."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import comfyui
from tests.gguf_files import write_gguf
from tests.lora_dialects import MIXTURE, ROWS, draw_loha, draw_lokr, units, write_dialect
from torch import Tensor

from simpletuner.base.errors import AccessError, CheckpointError
from simpletuner.config.flavours import TINY, TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flux2.export import save_lora
from simpletuner.flux2.factors import Hadamard, Kronecker, LowRank
from simpletuner.flux2.inspection import AdapterReport, FileReport, delta_norm, inspect_files
from simpletuner.flux2.loaders import ADAPTER_LOADERS, LoaderVerdict
from simpletuner.flux2.lora import PRESETS, attach
from simpletuner.flux2.origin import base_model_of, training_of
from simpletuner.flux2.transformer import Flux2Transformer

SMALL = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
COMFY = comfyui.ComfyModel(SMALL.hidden, SMALL.double_blocks, SMALL.single_blocks, SMALL.context_dim, guidance=True)
LINEARS = sum(len(unit.diffusers) for unit in units(TINY))


def inspected(path: Path) -> FileReport:
    (report,) = inspect_files(path)
    return report


def adapter_in(path: Path) -> AdapterReport:
    adapter = inspected(path).adapter
    assert adapter is not None
    return adapter


def block_norms(deltas: Mapping[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, delta in deltas.items():
        words = name.split(".")
        block = ".".join(words[:2]) if words[0].endswith("transformer_blocks") else name
        squares[block] = squares.get(block, 0.0) + float(delta.double().square().sum())
    return {name: math.sqrt(square) for name, square in squares.items()}


@pytest.mark.parametrize(
    "factors",
    [
        LowRank(torch.randn(3, 7), torch.randn(6, 3), 0.5),
        LowRank(torch.randn(3, 7), torch.zeros(6, 3)),
        Kronecker(torch.randn(3, 2), torch.randn(4, 5), -2.0),
        Kronecker(torch.randn(3, 2), torch.randn(4, 5), 1.0, ((6, 12), (0, 2))),
        Hadamard(torch.randn(3, 7), torch.randn(600, 3), torch.randn(3, 7), torch.randn(600, 3), 0.25),
    ],
)
def test_the_norm_of_factors_is_that_of_the_dense_delta(factors: Any) -> None:
    assert delta_norm(factors) == pytest.approx(float(factors.delta().double().norm()), rel=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_every_dialect_is_recognized_and_measured(tmp_path: Path, row: str) -> None:
    deltas = write_dialect(tmp_path / "a.safetensors", TINY, row, ranks=(4, 8))
    found = adapter_in(tmp_path / "a.safetensors")
    assert (found.modules, found.kinds, found.fits, found.unread) == (LINEARS, {"LoRA": LINEARS}, ["tiny"], {})
    assert set(found.ranks) == {4, 8}
    assert found.target == "custom"
    assert set(found.alphas) == ({2, 4, 6, 8, 12} if ROWS[row].has_alpha else {4, 8})
    assert found.norms == pytest.approx(block_norms(deltas), rel=1e-5)


COMFYUI_FILES = {
    **{row: (row,) for row in ROWS},
    "fal's mixture": MIXTURE,
    "all mixed": tuple(ROWS),
    "kohya's spellings mixed": ("4 musubi-tuner", "5 mixed tools"),
    "both programs' names under one prefix": ("2 ai-toolkit, diffusion-pipe", "10 diffusers under ComfyUI's prefix"),
}


@pytest.mark.parametrize("blocks_only", [False, True])
@pytest.mark.parametrize("rows", COMFYUI_FILES.values(), ids=list(COMFYUI_FILES))
def test_comfyui_drops_what_is_said_and_nothing_else(tmp_path: Path, rows: Sequence[str], blocks_only: bool) -> None:
    path = tmp_path / "a.safetensors"
    deltas = write_dialect(path, SMALL, *rows, blocks_only=blocks_only)
    verdict = adapter_in(path).loaders["ComfyUI"]
    loaded = comfyui.load(load_file(path), COMFY)
    assert verdict.wrong == ()
    targets, expected = comfyui.diffusers_targets(COMFY), {}
    for name, delta in deltas.items():
        if not verdict.refusal and name not in verdict.dropped:
            target = targets[name]
            whole = expected.setdefault(target.weight, torch.zeros(COMFY.shapes()[target.weight], dtype=torch.float64))
            whole[target.start : target.start + target.rows] = torch.cat(
                delta.chunk(2)[::-1] if target.swaps_halves else [delta]
            )
    assert loaded.terms.keys() == expected.keys()
    for name, delta in expected.items():
        total = sum((up @ down * scale for up, down, scale in loaded.terms[name]), torch.zeros(()))
        torch.testing.assert_close(total, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_diffusers_drops_what_is_said_and_nothing_else(tmp_path: Path) -> None:
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    from simpletuner.flux2.spec import transformer_to_diffusers

    config = {name: value for name, value in transformer_to_diffusers(SMALL).items() if name != "_class_name"}
    transformer = Flux2Transformer2DModel(**config)
    wrong: dict[str, object] = {}
    for blocks_only in (False, True):
        for row in ROWS.keys() - {"_lora.up"}:  # of which the verdict says nothing
            path = tmp_path / "a.safetensors"
            deltas = write_dialect(path, SMALL, row, blocks_only=blocks_only)
            verdict = adapter_in(path).loaders["diffusers"]
            pipeline = Flux2Pipeline(None, None, None, None, transformer)
            try:
                pipeline.load_lora_weights(str(path))
            except Exception as error:  # noqa: BLE001  whatever it raises, the file is refused
                loaded: dict[str, Tensor] = {}
                fault = f"{type(error).__name__}: {str(error)[:80]}"
            else:
                fault = ""
                loaded = {
                    name: layer.lora_B["default_0"].weight.double()
                    @ layer.lora_A["default_0"].weight.double()
                    * layer.scaling["default_0"]
                    for name, layer in transformer.named_modules()
                    if "default_0" in getattr(layer, "lora_A", {})
                }
            pipeline.unload_lora_weights()
            right = {
                name
                for name, delta in deltas.items()
                if name in loaded and torch.allclose(loaded[name], delta, rtol=1e-4, atol=1e-5)
            }
            said = set() if verdict.refusal else deltas.keys() - {*verdict.dropped, *verdict.wrong}
            if right != said or loaded.keys() & set(verdict.dropped):
                wrong[f"{row}, {'blocks' if blocks_only else 'all'}"] = fault, verdict.refusal, right ^ said
    assert wrong == {}


def test_comfyui_gets_an_alpha_in_the_header_wrong(tmp_path: Path) -> None:
    """Of Linears that have one as a key too, and of those that it drops, nothing else is said."""
    path = tmp_path / "a.safetensors"
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    deltas = write_dialect(path, SMALL, "1 diffusers", header=header)
    verdicts = adapter_in(path).loaders
    assert set(verdicts["ComfyUI"].wrong) == deltas.keys() - verdicts["ComfyUI"].dropped
    assert len(verdicts["ComfyUI"].dropped) == 7
    assert verdicts["diffusers"] == LoaderVerdict()
    write_dialect(path, SMALL, "1 diffusers", "1b diffusers with alpha", blocks_only=True, header=header)
    with_alpha = {key.removeprefix("transformer.").removesuffix(".alpha") for key in load_file(path) if "alpha" in key}
    block_names = {name for name in deltas if "_blocks." in name}
    assert set(adapter_in(path).loaders["ComfyUI"].wrong) == block_names - with_alpha
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}
    write_dialect(path, SMALL, "1 diffusers", blocks_only=True, header=header)
    assert adapter_in(path).loaders["ComfyUI"] == LoaderVerdict()


BFL_PATCH = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff"
BESIDE: dict[tuple[str, str], bool] = {
    ("1 diffusers", "transformer.transformer_blocks.0.attn.norm_q.diff"): True,
    ("1 diffusers", "text_encoder.layers.0.self_attn.q_proj.lora_A.weight"): False,
    ("1 diffusers", "lora_te1_layers_0_self_attn_q_proj.lora_down.weight"): True,
    ("1 diffusers", "other"): True,
    ("2 ai-toolkit, diffusion-pipe", BFL_PATCH): True,
    ("2 ai-toolkit, diffusion-pipe", "text_encoder.layers.0.self_attn.q_proj.lora_A.weight"): True,
    ("3 PEFT on BFL's model", BFL_PATCH): True,
    ("4 musubi-tuner", "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff"): False,
    ("4 musubi-tuner", "lora_te1_layers_0_self_attn_q_proj.lora_down.weight"): False,
    ("12 old diffusers", BFL_PATCH): True,
}
"""A dialect, a key beside a LoRA in it, and whether diffusers then loads nothing."""


@pytest.mark.parametrize(("row", "key"), BESIDE)
def test_diffusers_loads_no_file_with_certain_other_keys(tmp_path: Path, row: str, key: str) -> None:
    path = tmp_path / "a.safetensors"
    write_dialect(path, SMALL, row, blocks_only=True, also={key: torch.ones(16)})
    verdicts = adapter_in(path).loaders
    assert (key in verdicts["diffusers"].refusal) == BESIDE[row, key]
    assert (verdicts["diffusers"] == LoaderVerdict()) != BESIDE[row, key]
    assert verdicts["ComfyUI"].refusal == (
        "" if row != "3 PEFT on BFL's model" else "it recognizes none of the file's names"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("row", "key"), BESIDE)
def test_diffusers_does_so(tmp_path: Path, row: str, key: str) -> None:
    """`BESIDE` is what the library does."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    from simpletuner.flux2.spec import transformer_to_diffusers

    config = {name: value for name, value in transformer_to_diffusers(SMALL).items() if name != "_class_name"}
    transformer = Flux2Transformer2DModel(**config)
    path = tmp_path / "a.safetensors"
    write_dialect(path, SMALL, row, blocks_only=True, also={key: torch.ones(16)})
    with contextlib.suppress(ValueError):
        Flux2Pipeline(None, None, None, None, transformer).load_lora_weights(str(path))
    is_loaded = any(name.endswith("lora_A.default_0") for name, _ in transformer.named_modules())
    assert is_loaded != BESIDE[row, key]


@pytest.mark.parametrize(("draw", "kind"), [(draw_lokr, "LoKr"), (draw_loha, "LoHa")])
def test_other_kinds_are_named_and_measured(tmp_path: Path, draw: Any, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    deltas = write_dialect(path, TINY, "2b OneTrainer for ComfyUI", draw=draw)
    found = adapter_in(path)
    assert found.kinds == {kind: LINEARS}
    assert found.ranks == {4: LINEARS}
    assert found.norms == pytest.approx(block_norms(deltas), rel=1e-5)
    assert bool(found.loaders["diffusers"].refusal) == (kind == "LoHa")
    assert found.loaders["ComfyUI"].refusal == ""
    assert inspected(path).what == f"{kind} for FLUX.2 tiny"


def test_a_mixed_file_and_what_is_not_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    also = {
        "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(192),
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2),
        "other": torch.ones(1),
    }
    write_dialect(path, TINY, *MIXTURE, also=also)
    found = adapter_in(path)
    assert found.dialect == "mixed: bfl, comfyui, diffusers"
    assert set(found.unread) == {"dora", "text encoder", "unknown"}
    diffusers = found.loaders["diffusers"]
    assert "mixes several layouts" in diffusers.unknown
    assert replace(diffusers, unknown="") == LoaderVerdict(), "and nothing else is said"


@pytest.mark.parametrize("suffix", ["oft_R.weight", "oft_blocks", "diff"])
def test_a_kind_that_is_not_read_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"diffusion_model.double_blocks.0.img_attn.qkv.{suffix}": torch.ones(2, 2)}, path)
    report = inspected(path)
    assert report.what.endswith("this program cannot read it")
    assert report.adapter is not None
    assert (report.adapter.modules, report.adapter.loaders) == (0, {})


@pytest.mark.parametrize("target", PRESETS)
def test_our_own_file_has_its_preset_and_its_header(tmp_path: Path, target: str) -> None:
    torch.manual_seed(0)
    transformer = Flux2Transformer(TINY)
    adapter = attach(transformer, LoraOptions(lora_rank=4, lora_alpha=8.0, flux_lora_target=target), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    path = tmp_path / "a.safetensors"
    fields = {
        "base_model": "black-forest-labs/FLUX.2-klein-base-4B",
        "step": "30",
        "version": "0.9",
        "comment": "a\x1b[2J",
    }
    save_lora(path, adapter, metadata=fields)
    report = inspected(path)
    assert report.adapter is not None
    assert report.adapter.target == target
    assert report.adapter.loaders == dict.fromkeys(ADAPTER_LOADERS, LoaderVerdict())
    assert report.base_model == "klein-4b"
    assert report.training["program"] == "simpletuner 0.9"
    assert report.training["comment"] == "a [2J"  # no escape sequence reaches a terminal
    assert (report.training["step"], report.training["alpha"], report.training["target"]) == ("30", "8.0", target)


@pytest.mark.parametrize(
    ("field", "text", "base"),
    [
        ("simpletuner.base_model", "my-flux2-person.safetensors", "my-flux2-person.safetensors"),
        ("simpletuner.base_model", "FLUX.2-klein-4B", "FLUX.2-klein-4B"),
        ("simpletuner.base_model", "black-forest-labs/FLUX.2-klein-4B", "klein-4b-distilled"),
        ("simpletuner.base_model", "tiny-1", "tiny"),
        ("ss_sd_model_name", "my-flux2-person.safetensors", "my-flux2-person.safetensors"),
        ("ss_sd_model_name", "black-forest-labs/FLUX.2-dev", "dev"),
        ("ss_base_model_version", "flux2_klein_4b", "klein-4b"),
    ],
)
def test_the_name_of_a_file_or_folder_tells_no_flavour(field: str, text: str, base: str) -> None:
    assert base_model_of({field: text}) == base


def test_a_text_that_looks_like_a_number_stays() -> None:
    header = {
        "modelspec.title": "1.10",
        "modelspec.trigger_phrase": "1e3",
        "ss_learning_rate": "1e-4",
        "software": '{"name": "ai-toolkit", "version": 1.10}',
        "ss_epoch": "03",
    }
    expected = {"title": "1.10", "trigger words": "1e3", "learning rate": "1e-4", "epoch": "03"}
    assert training_of(header) == {"program": "ai-toolkit 1.10"} | expected
    assert training_of({"name": '"007"'}) == {"title": "007"}


HEADERS: dict[str, tuple[dict[str, str], str | None, dict[str, str]]] = {
    "ai-toolkit": (
        {
            "software": json.dumps({"name": "ai-toolkit", "version": "0.7.1"}),
            "training_info": json.dumps({"step": 2000, "epoch": 8}),
            "name": "mine",
            "ss_base_model_version": "flux2_klein_9b",
        },
        "klein-9b",
        {"program": "ai-toolkit 0.7.1", "step": "2000", "epoch": "8", "title": "mine"},
    ),
    "musubi": (
        {
            "ss_network_module": "networks.lora_flux_2",
            "ss_network_dim": "16",
            "ss_network_alpha": "8",
            "ss_steps": "100",
            "ss_seed": "None",
            "modelspec.architecture": "Flux.2-dev",
        },
        "dev",
        {"program": "a trainer of kohya's family (networks.lora_flux_2)", "rank": "16", "alpha": "8", "step": "100"},
    ),
    "OneTrainer": (
        {"ot_branch": "master", "ot_revision": "0123456789", "ot_config": json.dumps({"lora_rank": 32})},
        None,
        {"program": "OneTrainer 01234567", "rank": "32"},
    ),
    "damaged": ({"software": "{", "training_info": "[1]", "ot_config": "7"}, None, {}),
}


@pytest.mark.parametrize("program", HEADERS)
def test_headers_of_other_programs_say_how_a_file_was_made(tmp_path: Path, program: str) -> None:
    header, base, training = HEADERS[program]
    write_dialect(tmp_path / "a.safetensors", TINY, "1 diffusers", blocks_only=True, header=header)
    report = inspected(tmp_path / "a.safetensors")
    assert report.base_model == base
    assert training.items() <= report.training.items()
    assert "seed" not in report.training
    assert report.header == header


def test_a_pipeline_is_told_component_by_component(tiny_folder: Path, tiny_klein_folder: Path) -> None:
    for folder, flavour in ((tiny_folder, "tiny"), (tiny_klein_folder, "tiny-klein")):
        found = {report.components[0].component: report for report in inspect_files(folder)}
        assert found.keys() == {"transformer", "vae", "text_encoder"}
        for report in found.values():
            (component,) = report.components
            assert flavour in component.flavours
            assert component.problem == ""
            assert sum(component.formats.values()) == component.bytes > 0.9 * report.bytes


def test_an_all_in_one_file_is_told_apart(tiny_folder: Path, tmp_path: Path) -> None:
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.mistral3_24b.transformer.",
    }
    tensors = {
        f"{prefix}{name}": tensor
        for component, prefix in prefixes.items()
        for file in (tiny_folder / component).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    report = inspected(tmp_path / "all.safetensors")
    assert [component.component for component in report.components] == list(prefixes)
    assert all("tiny" in component.flavours for component in report.components)
    assert sum(component.tensors for component in report.components) == len(tensors)


def test_a_gguf_file_has_its_types_told(tmp_path: Path) -> None:
    tensors = {f"{unit.bfl}.weight": torch.zeros(unit.rows, unit.columns, dtype=torch.float16) for unit in units(TINY)}
    tensors["single_blocks.0.norm.query_norm.scale"] = torch.ones(TINY.head_dim)
    types = {
        name: "Q8_0" for name in tensors if name.startswith(("double_blocks", "single_blocks")) and "norm" not in name
    }
    write_gguf(tmp_path / "a.gguf", tensors, types)
    report = inspected(tmp_path / "a.gguf")
    (component,) = report.components
    assert report.what == "transformer of FLUX.2 tiny"
    assert component.layout == "BFL"
    assert component.formats["Q8_0"] == sum(tensors[name].numel() // 32 * 34 for name in types)
    assert component.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_what_is_of_another_model_is_said(tmp_path: Path) -> None:
    flux1 = {"double_blocks.0.img_mod.lin.weight": torch.ones(2, 2)}
    for tensors, what in ((flux1, "transformer of FLUX.1"), ({"a": torch.ones(1)}, "not a FLUX.2 file: 1 tensor")):
        save_file(tensors, tmp_path / "a.safetensors")
        assert inspected(tmp_path / "a.safetensors").what.startswith(what)


def test_a_transformer_without_all_tensors_is_told(tmp_path: Path) -> None:
    save_file({"double_stream_modulation_img.lin.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    (component,) = inspected(tmp_path / "a.safetensors").components
    assert (component.flavours, component.problem) == ([], "required tensors are missing")


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_to_q"
    foreign = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    save_file(foreign, tmp_path / "a.safetensors")
    write_dialect(tmp_path / "b.safetensors", TINY, "1 diffusers", blocks_only=True)
    (tmp_path / "c.safetensors").write_bytes(b"cut")
    other, own, cut = inspect_files(tmp_path)
    assert "names a layer of FLUX.2" in other.what
    assert own.adapter is not None
    assert (cut.path, cut.bytes) == (str(tmp_path / "c.safetensors"), 3)
    assert "no safetensors header" in cut.what
    for name, error in (("a", CheckpointError), ("c", AccessError)):
        with pytest.raises(error):
            inspect_files(tmp_path / f"{name}.safetensors")


def test_the_case_of_an_ending_does_not_matter(tmp_path: Path) -> None:
    write_dialect(tmp_path / "A.SAFETENSORS", TINY, "1 diffusers", blocks_only=True)
    assert inspected(tmp_path).adapter is not None


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_dialect(path, TINY, "1 diffusers", blocks_only=True)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-10], b"GGUF", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(AccessError):
            inspect_files(path)
    tensors = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="NaN"):
        inspect_files(path)
    for missing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(AccessError):
            inspect_files(missing)
