"""Writers of adapter files as other programs write them, from a table of their own of both layouts' names.

`write_dialect` writes random factors for a transformer's Linears and returns ΔW of each, computed here by hand.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec

LAST_MODULATION = "final_layer.adaLN_modulation.1"
"""Its two halves lie the other way round in diffusers' norm_out.linear."""

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}


@dataclass(frozen=True)
class WrittenUnit:
    """One Linear of BFL's layout, and the Linears that diffusers cuts its rows into."""

    bfl: str
    diffusers: tuple[str, ...]
    rows: int
    columns: int

    @property
    def is_outer(self) -> bool:
        """Whether it lies outside the blocks."""
        return "_blocks." not in self.bfl


def units(spec: TransformerSpec) -> Iterator[WrittenUnit]:
    """Every Linear of a transformer, the blocks' first."""
    width = spec.hidden
    inner = spec.mlp_hidden
    shapes = {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "0": (2 * inner, width),
        "2": (width, inner),
        "linear1": (3 * width + 2 * inner, width),
        "linear2": (width, width + inner),
    }
    for block in range(spec.double_blocks):
        for bfl, names in _DOUBLE.items():
            own = tuple(f"transformer_blocks.{block}.{name}" for name in names)
            yield WrittenUnit(f"double_blocks.{block}.{bfl}", own, *shapes[bfl.rpartition(".")[2]])
    for block in range(spec.single_blocks):
        for bfl, name in _SINGLE.items():
            own = (f"single_transformer_blocks.{block}.{name}",)
            yield WrittenUnit(f"single_blocks.{block}.{bfl}", own, *shapes[bfl])
    embedders = {"time_in": "timestep_embedder"}
    if spec.guidance_embeds:
        embedders["guidance_in"] = "guidance_embedder"
    for bfl, name in embedders.items():
        own = f"time_guidance_embed.{name}.linear_"
        yield WrittenUnit(f"{bfl}.in_layer", (f"{own}1",), width, spec.timestep_channels)
        yield WrittenUnit(f"{bfl}.out_layer", (f"{own}2",), width, width)
    yield WrittenUnit("img_in", ("x_embedder",), width, spec.in_channels)
    yield WrittenUnit("txt_in", ("context_embedder",), width, spec.context_dim)
    for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        yield WrittenUnit(f"{name}.lin", (f"{name}.linear",), parts * width, width)
    yield WrittenUnit("single_stream_modulation.lin", ("single_stream_modulation.linear",), 3 * width, width)
    yield WrittenUnit(LAST_MODULATION, ("norm_out.linear",), 2 * width, width)
    yield WrittenUnit("final_layer.linear", ("proj_out",), spec.in_channels, width)


@dataclass(frozen=True)
class DialectRow:
    """How one program spells the keys of a LoRA."""

    prefix: str
    names: Literal["diffusers", "bfl"]
    sides: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    """What follows a Linear's name: of the matrix that reads the input, and of the one that writes the output."""
    has_alpha: bool = False
    flat: bool = False
    """Whether dots in names are underscores."""
    respelled: Callable[[str], str] = str
    """What else is done to a name."""


def _hunyuan(name: str) -> str:
    """HunyuanVideo's spelling, which musubi-tuner's converter gives FLUX.2's attention."""
    return re.sub(r"(img|txt)_attn\.(qkv|proj)", r"\1_attn_\2", name)


_KOHYA_SIDES = (".lora_down.weight", ".lora_up.weight")
_OLD_SIDES = (".lora.down.weight", ".lora.up.weight")
_DEFAULT_SIDES = (".lora_A.default.weight", ".lora_B.default.weight")

ROWS: dict[str, DialectRow] = {
    "1 diffusers": DialectRow("transformer.", "diffusers"),
    "1b diffusers with alpha": DialectRow("transformer.", "diffusers", has_alpha=True),
    "2 ai-toolkit, diffusion-pipe": DialectRow("diffusion_model.", "bfl"),
    "2b OneTrainer for ComfyUI": DialectRow("diffusion_model.", "bfl", has_alpha=True),
    "3 PEFT on BFL's model": DialectRow("base_model.model.", "bfl"),
    "3b PEFT on diffusers' model": DialectRow("base_model.model.", "diffusers"),
    "4 musubi-tuner": DialectRow("lora_unet_", "bfl", _KOHYA_SIDES, has_alpha=True, flat=True),
    "5 mixed tools": DialectRow("diffusion_model.", "bfl", _KOHYA_SIDES, has_alpha=True),
    "5b mixed tools without alpha": DialectRow("diffusion_model.", "bfl", _KOHYA_SIDES),
    "6 OneTrainer original": DialectRow("", "bfl", has_alpha=True),
    "7 DiffSynth": DialectRow("", "diffusers", _DEFAULT_SIDES),
    "8 OneTrainer legacy": DialectRow("transformer.", "diffusers", _KOHYA_SIDES, has_alpha=True),
    "9 OneTrainer mixture": DialectRow("lora_transformer_", "diffusers", _KOHYA_SIDES, has_alpha=True, flat=True),
    "10 diffusers under ComfyUI's prefix": DialectRow("diffusion_model.", "diffusers"),
    "11 LyCORIS": DialectRow("lycoris_", "diffusers", _KOHYA_SIDES, has_alpha=True, flat=True),
    "12 old diffusers": DialectRow("transformer.", "diffusers", _OLD_SIDES),
    "13 whole checkpoint's prefix": DialectRow("model.diffusion_model.", "bfl"),
    "13b unet": DialectRow("unet.", "bfl"),
    "13c lora_unet with diffusers' names": DialectRow(
        "lora_unet_", "diffusers", _KOHYA_SIDES, has_alpha=True, flat=True
    ),
    "MUS converted": DialectRow("diffusion_model.", "bfl", has_alpha=True, respelled=_hunyuan),
    "lycoris with BFL's names": DialectRow("lycoris_", "bfl", _KOHYA_SIDES, has_alpha=True, flat=True),
    "no .weight": DialectRow("diffusion_model.", "bfl", (".lora_A", ".lora_B")),
    "_lora.up": DialectRow("transformer.", "diffusers", ("_lora.down.weight", "_lora.up.weight")),
    "lora_linear_layer": DialectRow(
        "transformer.", "diffusers", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    ),
}
"""The rows of the list of LoRA dialects, and further spellings that ComfyUI reads."""

MIXTURE = ("1 diffusers", "2 ai-toolkit, diffusion-pipe", "3 PEFT on BFL's model")
"""Row 14: what fal's files mix."""

DrawnAdapter = tuple[dict[str, Tensor], Tensor]
"""Tensors by what follows the Linear's name, and ΔW in fp64."""
DrawAdapter = Callable[[DialectRow, int, int, int, float, torch.Generator], DrawnAdapter]
"""Of (row, rows, columns, rank, alpha, generator)."""


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def draw_lora(
    row: DialectRow, rows: int, columns: int, rank: int, alpha: float, generator: torch.Generator
) -> DrawnAdapter:
    """A LoRA's two matrices. ΔW = alpha/rank · B · A, with alpha = rank where the dialect has none."""
    a, b = _normal(generator, rank, columns) / columns**0.5, _normal(generator, rows, rank) * 0.3
    scale = alpha / rank if row.has_alpha else 1.0
    return {row.sides[0]: a, row.sides[1]: b}, b.double() @ a.double() * scale


def draw_loha(
    row: DialectRow, rows: int, columns: int, rank: int, alpha: float, generator: torch.Generator
) -> DrawnAdapter:
    """A LoHa's four matrices. ΔW = alpha/rank · (w1_a · w1_b) ∘ (w2_a · w2_b), in the files' own names."""
    tensors = {}
    for name in ("w1", "w2"):
        tensors[f".hada_{name}_a"] = _normal(generator, rows, rank) * 0.5
        tensors[f".hada_{name}_b"] = _normal(generator, rank, columns) * 0.5
    first, second = (tensors[f".hada_{name}_a"].double() @ tensors[f".hada_{name}_b"].double() for name in ("w1", "w2"))
    return tensors, first * second * (alpha / rank if row.has_alpha else 1.0)


def draw_lokr(
    row: DialectRow, rows: int, columns: int, rank: int, alpha: float, generator: torch.Generator
) -> DrawnAdapter:
    """A LoKr whose w1 is whole and whose w2 is a product of rank `rank`. ΔW = alpha/rank · kron(w1, w2_a · w2_b)."""
    rows1, columns1 = 4, 2
    w1 = _normal(generator, rows1, columns1)
    a, b = _normal(generator, rows // rows1, rank) * 0.3, _normal(generator, rank, columns // columns1) * 0.3
    scale = alpha / rank if row.has_alpha else 1.0
    return {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b}, torch.kron(w1.double(), a.double() @ b.double()) * scale


def spelled(row: DialectRow, name: str) -> str:
    """The key of a Linear `name` of the row's layout, without what follows it."""
    name = row.respelled(name)
    return row.prefix + (name.replace(".", "_") if row.flat else name)


def write_dialect(
    path: Path,
    spec: TransformerSpec,
    *rows: str,
    draw: DrawAdapter = draw_lora,
    ranks: Sequence[int] = (4,),
    blocks_only: bool = False,
    dtype: torch.dtype = torch.float32,
    also: Mapping[str, Tensor] | None = None,
    header: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write an adapter of every Linear of `spec`, and return its ΔW in fp64 by diffusers' names.

    Args:
        rows: of `ROWS`; where there are several, they take turns from Linear to Linear.
        ranks: taken in turn likewise.
        blocks_only: leave out the Linears outside the blocks.
        dtype: the file's. ΔW is that of the rounded factors, except for LoHa and LoKr.
        also: tensors that are written beside.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    drawn = 0
    for place, unit in enumerate(units(spec)):
        if blocks_only and unit.is_outer:
            continue
        row = ROWS[rows[place % len(rows)]]
        is_bfl = row.names == "bfl"
        for name in (unit.bfl,) if is_bfl else unit.diffusers:
            rank = ranks[drawn % len(ranks)]
            alpha = rank * (0.5, 1.5, 1.0)[drawn % 3]
            drawn += 1
            height = unit.rows if is_bfl else unit.rows // len(unit.diffusers)
            factors, delta = draw(row, height, unit.columns, rank, alpha, generator)
            if dtype != torch.float32 and draw is draw_lora:
                factors = {suffix: tensor.to(dtype).float() for suffix, tensor in factors.items()}
                a, b = (factors[side].double() for side in row.sides)
                delta = b @ a * (alpha / rank if row.has_alpha else 1.0)
            key = spelled(row, name)
            tensors |= {f"{key}{suffix}": tensor.to(dtype) for suffix, tensor in factors.items()}
            if row.has_alpha:
                tensors[f"{key}.alpha"] = torch.tensor(alpha).to(dtype)
            if not is_bfl:
                deltas[name] = delta
            elif unit.bfl == LAST_MODULATION:
                shift, scale = delta.chunk(2)
                deltas[unit.diffusers[0]] = torch.cat([scale, shift])
            else:
                deltas |= dict(zip(unit.diffusers, delta.chunk(len(unit.diffusers)), strict=True))
    save_file(tensors | dict(also or {}), path, dict(header or {}))
    return deltas
