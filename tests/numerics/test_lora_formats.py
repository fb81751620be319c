"""Every LoRA format in every loader: exact, or said by `lost_layers`. Weights of the base take no memory."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import comfyui
from torch import Tensor

from simpletuner.base.quiet import quiet_import
from simpletuner.config.flavours import DEV, KLEIN_4B, KLEIN_9B, TINY, TINY_KLEIN, TransformerSpec
from simpletuner.config.options.lora import LoraFormat
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.lora import PRESETS, full_range, linears, preset_ranges
from simpletuner.flux2.lora_formats import LORA_FORMATS, header_in, lora_tensors, lost_layers
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.transformer import Flux2Transformer

PROBES = 2
"""Random inputs of each Linear. ΔW of real widths is never made: equal products mean equal matrices."""
MANY = "many blocks"
FLAVOURS = {
    "tiny": replace(TINY, double_blocks=1, single_blocks=1),
    "tiny-klein": replace(TINY_KLEIN, double_blocks=1, single_blocks=1),
    "dev": replace(DEV, double_blocks=1, single_blocks=1),
    "klein-9b": replace(KLEIN_9B, double_blocks=1, single_blocks=1),
    "klein-4b": replace(KLEIN_4B, double_blocks=1, single_blocks=1),
    MANY: replace(TINY, heads=1, context_dim=8, double_blocks=12, single_blocks=11),
}
"""One block of each kind, at the real widths too; and numbers of blocks with two digits."""
OUTER = "custom"
"""Every Linear, those outside the blocks too, with other ranks here and there."""
CELLS = [
    *((flavour, target) for flavour in FLAVOURS if flavour != MANY for target in (*PRESETS, OUTER)),
    (MANY, "all"),
]
QUICK = (("tiny", "all"), ("tiny", "attention"), ("tiny", OUTER), ("tiny-klein", OUTER))


def adapter(spec: TransformerSpec, target: str, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    with torch.device("meta"):
        transformer = Flux2Transformer(spec)
    places = {name: full_range(linear) for name, linear in linears(transformer).items()}
    if target != OUTER:
        places = preset_ranges(transformer, PRESETS[target])
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears(transformer).items()}
    generator = torch.Generator().manual_seed(7)
    modules = {}
    for at, (name, place) in enumerate(places.items()):
        rows, columns = shapes[name]
        rank = 2 if target != OUTER else 1 + at % 4
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        live_a, live_b = a[:, slice(*place.columns)], b[slice(*place.rows)]
        live_a.copy_(torch.randn(live_a.shape, generator=generator))
        live_b.copy_(torch.randn(live_b.shape, generator=generator))
        modules[name] = LowRank(a.to(dtype), b.to(dtype))
    return modules


def probe(columns: int) -> Tensor:
    return torch.randn(columns, PROBES, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)


def effect(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """ΔW of the probes."""
    return b.double() @ (a.double() @ probe(a.shape[1])) * scale


def assert_effects(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], lost: Mapping[str, str]) -> None:
    """Each module as `lost` says of it: dropped, wrong, or to 1e-5 where it is not named."""
    for name in found.keys() | expected.keys():
        own = found.get(name, torch.zeros(1))
        wanted = expected.get(name, torch.zeros(1))
        if lost.get(name) == "dropped":
            assert not own.any(), name
        elif lost.get(name) == "wrong":
            assert own.any(), name
            assert (own - wanted).abs().max() > 1e-2 * wanted.abs().max(), name
        else:
            assert (own - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What diffusers' loader says: a missing or unexpected key is only a warning there."""
    with quiet_import():
        import peft.tuners.lora  # noqa: F401
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")
    return caplog


def in_diffusers(path: Path, spec: TransformerSpec) -> dict[str, Tensor]:
    """What diffusers applies of a file, by module."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

    config = {key: value for key, value in transformer_to_diffusers(spec).items() if key != "_class_name"}
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**config)
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.zeros(1).expand(parameter.shape)  # PEFT wants it on a device; it takes 4 bytes
            setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
    kind: Any = Flux2Pipeline if spec.guidance_embeds else Flux2KleinPipeline
    pipe = kind(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one", low_cpu_mem_usage=True)
    return {
        name: effect(module.lora_A["one"].weight, module.lora_B["one"].weight, module.scaling["one"])
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "lora_A") and "one" in module.lora_A
    }


def in_comfyui(path: Path, spec: TransformerSpec) -> tuple[dict[str, Tensor], set[str]]:
    """What ComfyUI applies of a file, by diffusers' module, and the keys that it does not load."""
    model = comfyui.ComfyModel(
        spec.hidden, spec.double_blocks, spec.single_blocks, spec.context_dim, spec.guidance_embeds
    )
    loaded = comfyui.load(load_file(path), model)
    outputs = {
        weight: sum(scale * (up @ (down @ probe(down.shape[1]))) for up, down, scale in terms)
        for weight, terms in loaded.terms.items()
    }
    found = {}
    for name, target in comfyui.diffusers_targets(model).items():
        if target.weight in outputs:
            rows = outputs[target.weight][target.start : target.start + target.rows]
            found[name] = torch.cat(rows.chunk(2)[::-1]) if target.swaps_halves else rows
    return found, loaded.unloaded


def saved(path: Path, modules: Mapping[str, LowRank], lora_format: LoraFormat) -> Path:
    save_file(lora_tensors(modules, lora_format), path, header_in(lora_format, modules, {"ss_comment": "kept"}))
    return path


@pytest.mark.parametrize(
    ("flavour", "target"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
@torch.no_grad()
def test_each_format_is_exact_in_each_loader_or_its_losses_are_said(
    tmp_path: Path, said: pytest.LogCaptureFixture, flavour: str, target: str
) -> None:
    spec = FLAVOURS[flavour]
    modules = adapter(spec, target)
    expected = {name: effect(factors.a, factors.b) for name, factors in modules.items()}
    path = tmp_path / "lora.safetensors"
    for lora_format in LORA_FORMATS:
        lost = lost_layers(modules, lora_format)
        saved(path, modules, lora_format)
        said.clear()
        assert_effects(in_diffusers(path, spec), expected, lost["diffusers"])
        assert bool(said.records) == ("dropped" in lost["diffusers"].values())
        found, unloaded = in_comfyui(path, spec)
        assert_effects(found, expected, lost["ComfyUI"])
        assert bool(unloaded) == ("dropped" in lost["ComfyUI"].values())
        if target != OUTER:
            assert lost["diffusers"] == {}
            assert (lost["ComfyUI"] == {}) == (lora_format != "bfl")
