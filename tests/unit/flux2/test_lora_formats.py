"""LoRA files of four formats: exact, there and back with their bits, and refused before anything is lost."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.file_faults import files_of_at_most
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraFormat, LoraOptions
from simpletuner.flux2 import lora_formats
from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.export import read_lora, save_lora
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.lora import PRESETS, Adapter, attach, linears
from simpletuner.flux2.lora_formats import (
    LORA_FORMATS,
    folded,
    header_in,
    lora_modules,
    lora_tensors,
    lost_layer_messages,
    lost_layers,
    write_adapter,
)
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
OTHERS: tuple[LoraFormat, ...] = ("comfyui", "bfl", "kohya")
CUSTOM: dict[str, tuple[str, ...]] = {
    "with outer layers": ("to_q", "add_v_proj", "norm_out.linear", "linear_1", "single_stream_modulation.linear"),
    "one of three": ("to_k",),
    "every Linear": tuple(linears(Flux2Transformer(SPEC))),
}


def trained(rank: int = 4, alpha: float | None = None, **options: object) -> Adapter:
    adapter = attach(Flux2Transformer(SPEC), LoraOptions(lora_rank=rank, lora_alpha=alpha, **options), seed=2)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def own_file(path: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    save_lora(path, trained(**options), metadata={"run": "1f2e", "comment": "a “cat”"}, dtype=dtype)  # type: ignore[arg-type]
    return path


def converted(source: Path, to: LoraFormat, header: Mapping[str, str] | None = None) -> Path:
    file = read_adapter(source)
    target = source.with_name(f"{source.stem}-{to}.safetensors")
    write_adapter(target, lora_modules(file), to, file.header if header is None else header)
    return target


def modules_of(adapter: Adapter) -> dict[str, LowRank]:
    return {name: LowRank(*layer.expanded()) for name, layer in adapter.layers.items()}


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype for key in expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("target", PRESETS)
def test_diffusers_format_is_what_a_checkpoint_holds(tmp_path: Path, target: str) -> None:
    """Bit for bit, and the file too: this format changes nothing."""
    adapter = trained(flux_lora_target=target)
    assert_same_tensors(lora_tensors(modules_of(adapter), "diffusers"), adapter.expanded())
    own = own_file(tmp_path / "own.safetensors", flux_lora_target=target)
    assert converted(own, "diffusers").read_bytes() == own.read_bytes()


@pytest.mark.parametrize(
    ("options", "rank", "alpha", "dtype"),
    [
        ({"flux_lora_target": "all"}, 1, None, torch.float32),
        ({"flux_lora_target": "attention"}, 4, 6.5, torch.bfloat16),
        ({"flux_lora_target": "mlp"}, 6, 3.0, torch.float32),
        ({"flux_lora_target": "tiny"}, 4, None, torch.float32),
        ({"peft_lora_target_modules": CUSTOM["with outer layers"]}, 4, 6.5, torch.bfloat16),
        ({"peft_lora_target_modules": CUSTOM["one of three"]}, 6, 3.0, torch.float32),
        ({"peft_lora_target_modules": CUSTOM["every Linear"]}, 1, None, torch.float32),
    ],
    ids=[*PRESETS, *CUSTOM],
)
def test_our_own_file_comes_back_with_its_bits(
    tmp_path: Path, options: dict[str, object], rank: int, alpha: float | None, dtype: torch.dtype
) -> None:
    """From each format, and through all of them one after the other; of a run that starts from it, every number."""
    own = own_file(tmp_path / "own.safetensors", dtype, rank=rank, alpha=alpha, **options)
    chained = own
    for to in OTHERS:
        there = converted(own, to)
        assert load_file(there).keys().isdisjoint(load_file(own))
        assert converted(there, "diffusers").read_bytes() == own.read_bytes()
        chained = converted(chained, to)
        started, expected = read_lora(there), read_lora(own)
        assert replace(started, path=own, layers={}, unused=0) == replace(expected, layers={}, unused=0)
        for name, layer in expected.layers.items():
            assert torch.equal(started.layers[name].a, layer.a)
            assert torch.equal(started.layers[name].b, layer.b)
            assert started.layers[name].scale == layer.scale
    assert converted(chained, "diffusers").read_bytes() == own.read_bytes()


@pytest.mark.parametrize("to", OTHERS)
def test_without_its_header_a_file_still_has_its_tensors(tmp_path: Path, to: LoraFormat) -> None:
    """Tools that resave a file lose the header; the zeros remain."""
    own = own_file(tmp_path / "own.safetensors", flux_lora_target="attention")
    there = converted(own, to)
    save_file(load_file(there), there)
    assert_same_tensors(load_file(converted(there, "diffusers")), load_file(own))


@pytest.mark.parametrize("to", OTHERS)
def test_the_header_goes_along(tmp_path: Path, to: LoraFormat) -> None:
    """All of it, but diffusers must not find PEFT's settings there: its ranks are not this file's."""
    own = own_file(tmp_path / "own.safetensors")
    before, after = header_of(own), header_of(converted(own, to))
    assert "lora_adapter_metadata" not in after
    assert after.pop("simpletuner.lora_adapter_metadata") == before.pop("lora_adapter_metadata")
    assert json.loads(after.pop("simpletuner.fused_ranks"))["double_blocks.0.txt_attn.qkv"] == [4, 4, 4]
    assert after == before


def test_peft_settings_of_other_ranks_are_written_anew() -> None:
    """After a resize or a merge, an old header's are not those of the file, whose ranks a loader believes."""
    modules = {
        "proj_out": LowRank(torch.ones(2, 3), torch.ones(4, 2)),
        "x_embedder": LowRank(torch.ones(5, 3), torch.ones(4, 5)),
    }
    names = {"transformer.target_modules": list(modules)}
    rank_2 = {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }
    for old in ("", "{", "[]", json.dumps(rank_2 | names), json.dumps({"r": 5})):
        settings = json.loads(header_in("diffusers", modules, {"lora_adapter_metadata": old})["lora_adapter_metadata"])
        assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 2
        assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == {"x_embedder": 5}
    of_these = json.dumps(
        {**rank_2, "transformer.rank_pattern": {"x_embedder": 5}, "transformer.alpha_pattern": {"x_embedder": 5}}
    )
    header = {"lora_adapter_metadata": of_these}
    assert header_in("diffusers", modules, header) == {"format": "pt", **header}


@pytest.mark.parametrize("to", LORA_FORMATS)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"attn.to_q": 8}},
        {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 2}},
    ],
    ids=["rsLoRA", "an ending", "an ending's rank"],
)
def test_a_scale_in_the_header_is_folded_once(tmp_path: Path, to: LoraFormat, settings: dict[str, object]) -> None:
    """Though r = lora_alpha there: the header that says the scale does not stay with the file that has it folded in."""
    key = "transformer.transformer_blocks.0.attn.to_q"
    header = {"r": 4, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}} | settings
    text = json.dumps({f"transformer.{name}": value for name, value in header.items()})
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 32), f"{key}.lora_B.weight": torch.randn(32, 4)}
    save_file(tensors, tmp_path / "in.safetensors", {"lora_adapter_metadata": text})
    (expected,) = lora_modules(read_adapter(tmp_path / "in.safetensors")).values()
    assert expected.scale != 1
    there = converted(tmp_path / "in.safetensors", to)
    (found,) = lora_modules(read_adapter(converted(there, "diffusers"))).values()
    assert (found.scale, found.rank) == (1, 4)
    assert torch.equal(found.b, folded(expected).b)


@pytest.mark.parametrize("to", LORA_FORMATS)
@pytest.mark.parametrize("scale", [0.5, 0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_folded_to_1e_5(tmp_path: Path, to: LoraFormat, scale: float, dtype: torch.dtype) -> None:
    """In fp32 where the file's own dtype would round the product; a power of two needs none."""
    modules = {
        name: replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype), scale=scale)
        for name, factors in modules_of(trained(flux_lora_target="tiny")).items()
    }
    write_adapter(tmp_path / "lora.safetensors", modules, to, {})
    found = lora_modules(read_adapter(tmp_path / "lora.safetensors"))
    assert found.keys() == modules.keys()
    for name, factors in modules.items():
        expected = factors.b.double() @ factors.a.double() * scale
        own = found[name].b.double() @ found[name].a.double() * found[name].scale
        assert (own - expected).abs().max() <= 1e-5 * expected.abs().max()
    ups = [
        tensor
        for key, tensor in load_file(tmp_path / "lora.safetensors").items()
        if "lora_B" in key or "lora_up" in key
    ]
    widened = {tensor.dtype for tensor in ups} - {dtype}
    assert widened == ({torch.float32} if dtype != torch.float32 and scale != 0.5 else set())


def test_a_scale_of_1_folds_to_the_same_object() -> None:
    factors = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    assert folded(factors) is factors


def test_kohyas_alpha_is_the_rank_of_the_file() -> None:
    """Of a fused matrix the sum of its parts': alpha/rank is 1 for all readers."""
    tensors = lora_tensors(modules_of(trained(rank=5)), "kohya")
    alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {5.0, 15.0}
    assert all(alpha == tensors[key.replace(".alpha", ".lora_down.weight")].shape[0] for key, alpha in alphas.items())


def test_what_flux_has_not_is_refused() -> None:
    for to in LORA_FORMATS:
        with pytest.raises(ValueError, match="no Linear transformer_blocks"):
            lora_tensors({"transformer_blocks.0.attn.to_z": LowRank(torch.ones(1, 2), torch.ones(2, 1))}, to)


def test_losses_are_those_of_the_layers_that_are_there() -> None:
    presets = [name for target in PRESETS for name in trained(flux_lora_target=target).layers]
    for to in LORA_FORMATS:
        lost = lost_layers(presets, to)
        assert lost["diffusers"] == {}
        assert set(lost["ComfyUI"]) == (set(presets) if to == "bfl" else set())
        assert lost_layer_messages(presets, to).keys() == ({"ComfyUI"} if to == "bfl" else set())
    every = CUSTOM["every Linear"]
    counts = {to: {loader: len(names) for loader, names in lost_layers(every, to).items()} for to in LORA_FORMATS}
    assert counts == {
        "diffusers": {"diffusers": 0, "ComfyUI": 7},
        "comfyui": {"diffusers": 1, "ComfyUI": 0},
        "bfl": {"diffusers": 1, "ComfyUI": len(every)},
        "kohya": {"diffusers": 6, "ComfyUI": 0},
    }
    assert lost_layer_messages(every, "diffusers") == {
        "ComfyUI": "In the diffusers format, ComfyUI leaves out 7 of this LoRA's 25 layers, such as "
        "time_guidance_embed.timestep_embedder.linear_1. It reads all layers in the comfyui or kohya format."
    }


def test_comfyui_reads_every_layer_of_kohyas_format_alone() -> None:
    """Also where a file has no other layer, such as a modulation's, that tells whose names it has."""
    for name in CUSTOM["every Linear"]:
        assert lost_layers([name], "kohya")["ComfyUI"] == lost_layers([name], "comfyui")["ComfyUI"] == {}


@pytest.mark.parametrize("to", LORA_FORMATS)
def test_a_file_that_reads_back_differently_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: LoraFormat
) -> None:
    """The compared factors are those that a reader finds, in diffusers' names, not the written tensors."""
    modules = modules_of(trained(flux_lora_target="tiny"))
    path = tmp_path / "lora.safetensors"
    path.write_text("what was there")
    first = next(iter(modules))

    def wrong(own: Path) -> object:
        file = read_adapter(own)
        return replace(file, modules=file.modules | {first: replace(modules[first], b=modules[first].b * 2)})

    def lacking(own: Path) -> object:
        file = read_adapter(own)
        return replace(file, modules={name: file.modules[name] for name in file.modules if name != first})

    def left_over(own: Path) -> object:
        return replace(read_adapter(own), unread={"one.more": "unknown"})

    for reader in (wrong, lacking, left_over):
        monkeypatch.setattr(lora_formats, "read_adapter", reader)
        with pytest.raises(DiskError, match="reads back differently"):
            write_adapter(path, modules, to, {})
        assert path.read_text() == "what was there"
        assert list(tmp_path.iterdir()) == [path]

    def interrupted(_: Path) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_formats, "read_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(path, modules, to, {})
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_adapter(path, modules, to, {})
    assert read_adapter(path).modules.keys() == modules.keys()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_text("what was there")
    with files_of_at_most(10_000), pytest.raises(DiskError):
        write_adapter(path, modules_of(trained()), "kohya", {})
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lokr_is_no_lora(tmp_path: Path) -> None:
    key = "diffusion_model.single_blocks.0.linear2"
    path = tmp_path / "lokr.safetensors"
    save_file({f"{key}.lokr_w1": torch.ones(4, 4), f"{key}.lokr_w2": torch.ones(8, 32)}, path)
    with pytest.raises(CheckpointError, match="LoKr or LoHa factors for 1 layers"):
        lora_modules(read_adapter(path))
