"""Map tensor names between layouts: BFL's and diffusers' for the transformer, three layouts for the text encoder."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def _whole(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _thirds(tensor: Tensor) -> Sequence[Tensor]:
    """The rows of query, key and value in a fused projection."""
    return tensor.chunk(3)


def _halves_swapped(tensor: Tensor) -> Sequence[Tensor]:
    """Reorder the last modulation from BFL's (shift, scale) to diffusers' (scale, shift)."""
    shift, scale = tensor.chunk(2)
    return (torch.cat([scale, shift]),)


def as_matrix(tensor: Tensor) -> Sequence[Tensor]:
    """A 1×1 convolution as a matrix. BFL's VAE stores the projections of its attention as such convolutions."""
    return (tensor.reshape(_matrix_shape(tuple(tensor.shape))),)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


@dataclass(frozen=True)
class RenamedTensor:
    """Diffusers' names for a BFL tensor, and the function that splits the tensor into them."""

    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = _whole

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parts that a tensor of `shape` is split into."""
        if self.split is as_matrix:
            return (_matrix_shape(shape),)
        if len(self.names) == 1:
            return (shape,)
        return ((shape[0] // len(self.names), *shape[1:]),) * len(self.names)


_LAST_MODULATION = "final_layer.adaLN_modulation.1"
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_FROM_TOP = {diffusers: bfl for bfl, diffusers in _TOP.items()}
_FROM_DOUBLE = {diffusers: bfl for bfl, diffusers in _DOUBLE.items()}
_FROM_SINGLE = {diffusers: bfl for bfl, diffusers in _SINGLE.items()}
_DIFFUSERS_BLOCK = re.compile(r"(single_|)transformer_blocks\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes of a transformer's names in ComfyUI's files."""


def _bare(name: str, prefixes: Sequence[str] = _PREFIXES) -> str:
    """`name` without the first of `prefixes` that it has."""
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


def from_bfl(name: str) -> RenamedTensor | None:
    """Diffusers' names for the tensor `name` of a BFL file; None if BFL has no such tensor.

    A ComfyUI prefix (`model.diffusion_model.` or `diffusion_model.`) is ignored.
    """
    module, _, leaf = _bare(name).rpartition(".")
    if leaf not in ("weight", "scale"):  # the norms' weights are called scale
        return None
    if module == _LAST_MODULATION:
        return RenamedTensor(("norm_out.linear.weight",), _halves_swapped)
    if module in _TOP:
        return RenamedTensor((f"{_TOP[module]}.weight",))
    block = _BLOCK.fullmatch(module)
    if block is None:
        return None
    kind, index, part = block.groups()
    if kind == "single":
        return (
            RenamedTensor((f"single_transformer_blocks.{index}.{_SINGLE[part]}.weight",)) if part in _SINGLE else None
        )
    group = f"transformer_blocks.{index}"
    if part in _FUSED:
        return RenamedTensor(tuple(f"{group}.{name}.weight" for name in _FUSED[part]), _thirds)
    return RenamedTensor((f"{group}.{_DOUBLE[part]}.weight",)) if part in _DOUBLE else None


@dataclass(frozen=True)
class BflModule:
    """Location of a diffusers module's weight in BFL's layout."""

    name: str
    """Name of BFL's module, without a prefix."""
    part: int = 0
    """Index of this module's rows if `parts` modules are fused: query, key or value."""
    parts: int = 1
    swaps_halves: bool = False
    """Whether the two halves of the rows are swapped."""


def to_bfl(module: str) -> BflModule | None:
    """Location of `module` (diffusers' name without `.weight`) in BFL's layout; None if BFL has no such module.

    The inverse of `from_bfl`.
    """
    if module == "norm_out.linear":
        return BflModule(_LAST_MODULATION, swaps_halves=True)
    if module in _FROM_TOP:
        return BflModule(_FROM_TOP[module])
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        return None
    kind, index, inner_name = match.groups()
    if kind == "single_":
        return BflModule(f"single_blocks.{index}.{_FROM_SINGLE[inner_name]}") if inner_name in _FROM_SINGLE else None
    if inner_name in _FROM_DOUBLE:
        return BflModule(f"double_blocks.{index}.{_FROM_DOUBLE[inner_name]}")
    for fused, parts in _FUSED.items():
        if inner_name in parts:
            return BflModule(f"double_blocks.{index}.{fused}", parts.index(inner_name), len(parts))
    return None


NamingLayout = Literal["diffusers", "bfl"]
"""The project whose names a file uses for a transformer's modules."""


def _flattened(names: Iterable[str]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in names}


_FLAT_OUTER: Mapping[str, tuple[NamingLayout, str]] = {
    **{flat: ("bfl", name) for flat, name in _flattened([*_TOP, _LAST_MODULATION]).items()},
    **{flat: ("diffusers", name) for flat, name in _flattened([*_FROM_TOP, "norm_out.linear"]).items()},
}
_FLAT_BLOCKS: Mapping[str, tuple[NamingLayout, Mapping[str, str]]] = {
    "double_blocks": ("bfl", _flattened([*_DOUBLE, *_FUSED])),
    "single_blocks": ("bfl", _flattened(_SINGLE)),
    "transformer_blocks": (
        "diffusers",
        _flattened([*_FROM_DOUBLE, *(part for parts in _FUSED.values() for part in parts)]),
    ),
    "single_transformer_blocks": ("diffusers", _flattened(_FROM_SINGLE)),
}
_FLAT_BLOCK = re.compile(rf"({'|'.join(_FLAT_BLOCKS)})_(\d+)_(.+)")


def known_module(name: str) -> tuple[NamingLayout, str] | None:
    """The layout that has a module `name`, and the module's dotted name in it; None if no layout has it.

    Underscores may replace all dots, as in kohya's files, or some, as in HunyuanVideo's `img_attn_qkv`.
    """
    flat = name.replace(".", "_")
    if flat in _FLAT_OUTER:
        return _FLAT_OUTER[flat]
    block = _FLAT_BLOCK.fullmatch(flat)
    if block is None:
        return None
    group, index, flat_name = block.groups()
    layout, dotted_names = _FLAT_BLOCKS[group]
    return (layout, f"{group}.{index}.{dotted_names[flat_name]}") if flat_name in dotted_names else None


def renamed_shapes(shapes: Mapping[str, tuple[int, ...]], renaming: "TensorRenaming") -> dict[str, tuple[int, ...]]:
    """`shapes` under the names of `renaming`, with fused tensors split; tensors unknown to it are left out."""
    by_new_name: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        renamed = renaming(name)
        if renamed is not None:
            by_new_name.update(zip(renamed.names, renamed.shapes(shape), strict=True))
    return by_new_name


def from_diffusers(name: str) -> RenamedTensor:
    """Diffusers' name for the tensor `name` of a file that uses these names, with or without ComfyUI's prefix."""
    return RenamedTensor((_bare(name),))


TensorRenaming = Callable[[str], RenamedTensor | None]
"""Maps a file's tensor name to diffusers' names; None for an unknown tensor."""


def transformer_renaming(names: Iterable[str]) -> TensorRenaming:
    """The renaming for a transformer file with tensors `names`: BFL's or diffusers'."""
    blocks = ("double_blocks.", "single_blocks.")
    return from_bfl if any(_bare(name).startswith(blocks) for name in names) else from_diffusers


ALL_LAYERS = 10_000
"""A layer count above that of any text encoder."""
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")


def text_encoder_name(name: str, layers: int) -> str | None:
    """MistralModel's name (transformers) for the tensor `name` of a Mistral-3 or Mistral checkpoint.

    None for tensors that text encoding does not need: vision tower, head, final norm, and layers after the first
    `layers`.
    """
    name = _bare(name, _TEXT_PREFIXES)
    if name == "embed_tokens.weight":
        return name
    match = re.match(r"layers\.(\d+)\.", name)
    return name if match and int(match[1]) < layers else None


def text_encoder_renaming(layers: int | None = None) -> TensorRenaming:
    """The renaming for a text encoder file, limited to the first `layers` if given; see `text_encoder_name`."""

    def renaming(name: str) -> RenamedTensor | None:
        model_name = text_encoder_name(name, ALL_LAYERS if layers is None else layers)
        return None if model_name is None else RenamedTensor((model_name,))

    return renaming
