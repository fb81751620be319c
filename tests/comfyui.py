"""What ComfyUI makes of a LoRA file for FLUX.2: which keys it takes, and what they add to each weight.

Written from its rules (ComfyUI 0.19: `comfy/lora.py`, `flux_to_diffusers` of `comfy/utils.py`, and
`comfy/weight_adapter/lora.py`) and from nothing of this program, whose tests use it as the reference. A key that no
rule names is logged by ComfyUI as "lora key not loaded", and the file is used without it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SUFFIXES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
"""Of the larger factor [out, rank] and of the smaller [rank, in], in the order in which they are looked for."""


@dataclass(frozen=True)
class ComfyModel:
    """A FLUX.2 transformer as ComfyUI holds it: sizes alone."""

    hidden: int
    double: int
    single: int
    context: int
    guidance: bool

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each matrix, by BFL's name."""
        d = self.hidden
        shapes = {
            "img_in": (d, 128),
            "txt_in": (d, self.context),
            "time_in.in_layer": (d, 256),
            "time_in.out_layer": (d, d),
            "double_stream_modulation_img.lin": (6 * d, d),
            "double_stream_modulation_txt.lin": (6 * d, d),
            "single_stream_modulation.lin": (3 * d, d),
            "final_layer.linear": (128, d),
            "final_layer.adaLN_modulation.1": (2 * d, d),
        }
        if self.guidance:
            shapes |= {"guidance_in.in_layer": (d, 256), "guidance_in.out_layer": (d, d)}
        for index in range(self.double):
            for stream in ("img", "txt"):
                block = f"double_blocks.{index}.{stream}"
                shapes |= {
                    f"{block}_attn.qkv": (3 * d, d),
                    f"{block}_attn.proj": (d, d),
                    f"{block}_mlp.0": (6 * d, d),
                    f"{block}_mlp.2": (d, 3 * d),
                }
        for index in range(self.single):
            shapes |= {
                f"single_blocks.{index}.linear1": (9 * d, d),
                f"single_blocks.{index}.linear2": (d, 4 * d),
            }
        return shapes


@dataclass(frozen=True)
class Target:
    """Which rows of which matrix a key's delta is added to."""

    weight: str
    start: int
    rows: int
    swaps_halves: bool = False
    is_known: bool = True
    """Whether ComfyUI has this diffusers name in its table."""


def diffusers_targets(model: ComfyModel) -> dict[str, Target]:
    """Where each Linear of diffusers' transformer lies in BFL's matrices."""
    d, shapes = model.hidden, model.shapes()

    def whole(weight: str, *, is_known: bool = True) -> Target:
        return Target(weight, 0, shapes[weight][0], is_known=is_known)

    embed = "time_guidance_embed"
    found = {
        "x_embedder": whole("img_in"),
        "context_embedder": whole("txt_in"),
        "proj_out": whole("final_layer.linear"),
        "norm_out.linear": Target("final_layer.adaLN_modulation.1", 0, 2 * d, swaps_halves=True),
        f"{embed}.timestep_embedder.linear_1": whole("time_in.in_layer", is_known=False),
        f"{embed}.timestep_embedder.linear_2": whole("time_in.out_layer", is_known=False),
    }
    if model.guidance:
        found[f"{embed}.guidance_embedder.linear_1"] = whole("guidance_in.in_layer", is_known=False)
        found[f"{embed}.guidance_embedder.linear_2"] = whole("guidance_in.out_layer", is_known=False)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        found[f"{name}.linear"] = whole(f"{name}.lin", is_known=False)
    for index in range(model.double):
        ours, block = f"transformer_blocks.{index}", f"double_blocks.{index}"
        for at, letter in enumerate("qkv"):
            found[f"{ours}.attn.to_{letter}"] = Target(f"{block}.img_attn.qkv", at * d, d)
            found[f"{ours}.attn.add_{letter}_proj"] = Target(f"{block}.txt_attn.qkv", at * d, d)
        found |= {
            f"{ours}.attn.to_out.0": whole(f"{block}.img_attn.proj"),
            f"{ours}.attn.to_add_out": whole(f"{block}.txt_attn.proj"),
            f"{ours}.ff.linear_in": whole(f"{block}.img_mlp.0"),
            f"{ours}.ff.linear_out": whole(f"{block}.img_mlp.2"),
            f"{ours}.ff_context.linear_in": whole(f"{block}.txt_mlp.0"),
            f"{ours}.ff_context.linear_out": whole(f"{block}.txt_mlp.2"),
        }
    for index in range(model.single):
        ours, block = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        found[f"{ours}.attn.to_qkv_mlp_proj"] = whole(f"{block}.linear1")
        found[f"{ours}.attn.to_out"] = whole(f"{block}.linear2")
    return found


def _key_map(model: ComfyModel) -> Iterator[tuple[str, Target]]:
    """The modules that a key may begin with."""
    for name, (rows, _) in model.shapes().items():
        target = Target(name, 0, rows)
        yield f"lora_unet_{name.replace('.', '_')}", target
        yield f"diffusion_model.{name}", target
    for name, target in diffusers_targets(model).items():
        if target.is_known:
            flat = name.replace(".", "_")
            for key in (f"transformer.{name}", f"lycoris_{flat}", f"lora_transformer_{flat}", name):
                yield key, target


Term = tuple[Tensor, Tensor, float]
"""Factors of what is added to a matrix, fp64: up [rows, rank], down [rank, columns], and their scale."""


@dataclass(frozen=True)
class LoadedByComfy:
    """What a file does in ComfyUI."""

    terms: dict[str, list[Term]] = field(default_factory=dict)
    """By BFL's name of the matrix; up has all of its rows, zeros where the key is not about them."""
    unloaded: set[str] = field(default_factory=set)
    """Keys of the file that nothing reads."""


def load(tensors: Mapping[str, Tensor], model: ComfyModel) -> LoadedByComfy:
    """Read the tensors of a file; headers are not looked at.

    Raises:
        ValueError: factors that do not have the shape of their weight (ComfyUI logs an error and goes on without them).
    """
    loaded = LoadedByComfy(unloaded=set(tensors))
    shapes = model.shapes()
    for module, target in _key_map(model):
        pair = next(((up, down) for up, down in SUFFIXES if module + up in tensors), None)
        if pair is None:
            continue
        up, down = tensors[module + pair[0]].double(), tensors[module + pair[1]].double()
        loaded.unloaded.difference_update(module + suffix for suffix in pair)
        scale = 1.0
        if f"{module}.alpha" in tensors:
            scale = float(tensors[f"{module}.alpha"]) / down.shape[0]
            loaded.unloaded.discard(f"{module}.alpha")
        rows, columns = shapes[target.weight]
        if (up.shape[0], down.shape[1]) != (target.rows, columns):
            raise ValueError(f"{module} is {up.shape[0]} × {down.shape[1]} instead of {target.rows} × {columns}")
        if target.swaps_halves:
            up = torch.cat(up.chunk(2)[::-1])
        all_rows = up.new_zeros(rows, up.shape[1])
        all_rows[target.start : target.start + target.rows] = up
        loaded.terms.setdefault(target.weight, []).append((all_rows, down, scale))
    return loaded
