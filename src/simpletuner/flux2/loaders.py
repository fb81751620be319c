"""What diffusers and ComfyUI make of an adapter file as it lies, known from its keys: as diffusers 0.42 and ComfyUI
0.19 read them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from simpletuner.flux2.dialects import prefix_of

AdapterLoader = Literal["diffusers", "ComfyUI"]
ADAPTER_LOADERS: tuple[AdapterLoader, ...] = ("diffusers", "ComfyUI")

_BFL = re.compile(
    r"(double|single)_blocks|(img|txt|time|guidance)_in\b|(img|txt|time|guidance)_in_|final_layer|\w+_modulation\w*\.lin\b"
)
_HUNYUAN = re.compile(r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\b")
_PEFT = (".lora_A.weight", ".lora_B.weight")
_OLD_DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight")

_OUTER_MODULATIONS = (
    "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear",
    "single_stream_modulation.linear",
)
_GUIDANCE = "time_guidance_embed.guidance_embedder."
_LAST = "norm_out.linear"


@dataclass(frozen=True)
class LoaderVerdict:
    """What a loader makes of a file."""

    refusal: str = ""
    """Why it loads nothing; empty where it loads."""
    dropped: tuple[str, ...] = ()
    """Linears, by diffusers' names, that it leaves out, at most with a line in its log."""
    wrong: tuple[str, ...] = ()
    """Linears to which it applies something else than was trained."""


@dataclass(frozen=True)
class _KeyStyle:
    """How the keys of a file are spelled."""

    prefix: str
    is_bfl: bool
    sides: str
    """Of the two matrices' suffixes: "peft", "old", "kohya", "lokr", "loha" or "other"."""
    has_alpha: bool
    is_hunyuan: bool


def loader_verdicts(keys: Iterable[str], modules: Iterable[str]) -> dict[AdapterLoader, LoaderVerdict]:
    """What each loader makes of a file with `keys`, all of one adapter, that adapts `modules` (diffusers' names)."""
    keys, modules = list(keys), list(modules)
    style = _style(keys)
    if style is None:
        mixed = LoaderVerdict("its keys mix several layouts, which this program reads key by key")
        return dict.fromkeys(ADAPTER_LOADERS, mixed)
    return {"diffusers": _diffusers(style, modules), "ComfyUI": _comfyui(style, modules)}


def _style(keys: list[str]) -> _KeyStyle | None:
    """How `keys` are spelled; None where they are spelled in several ways."""
    spellings = set()
    is_bfl = False
    for key in keys:
        prefix = prefix_of(key)
        is_bfl |= _BFL.match(key.removeprefix(prefix)) is not None
        if not key.endswith(".alpha"):
            spellings.add((prefix, _sides(key)))
    if len(spellings) != 1:
        return None
    ((prefix, sides),) = spellings
    has_alpha = any(key.endswith(".alpha") for key in keys)
    return _KeyStyle(prefix, is_bfl, sides, has_alpha, any(map(_HUNYUAN.search, keys)))


def _sides(key: str) -> str:
    for name, endings in {"peft": _PEFT, "old": _OLD_DIFFUSERS, "kohya": _KOHYA}.items():
        if key.endswith(endings):
            return name
    leaf = key.rpartition(".")[2]
    return "lokr" if leaf.startswith("lokr_") else "loha" if leaf.startswith("hada_") else "other"


def _comfyui(style: _KeyStyle, modules: list[str]) -> LoaderVerdict:
    """It looks every key up in a list of names, whatever follows the name."""
    if style.is_bfl and style.prefix in ("diffusion_model.", "lora_unet_"):
        # Not in its list, which has `img_attn.qkv`.
        lost = [name for name in modules if style.is_hunyuan and _is_double_attention(name)]
        return LoaderVerdict(dropped=tuple(lost))
    if not style.is_bfl and style.prefix in ("transformer.", "", "lora_transformer_", "lycoris_"):
        lost = [name for name in modules if name.startswith("time_guidance_embed.") or name in _OUTER_MODULATIONS]
        return LoaderVerdict(dropped=tuple(lost))
    return LoaderVerdict("it knows none of these names")


def _is_double_attention(name: str) -> bool:
    return name.startswith("transformer_blocks.") and ".attn." in name


def _diffusers(style: _KeyStyle, modules: list[str]) -> LoaderVerdict:
    """It converts whole files, by what their keys begin with."""
    unknown = LoaderVerdict("it warns that the file has no layers for its model, and goes on without them")
    refused = LoaderVerdict("it refuses the file as an invalid adapter")
    if style.sides == "loha":
        return LoaderVerdict("it cannot read LoHa")
    if style.is_hunyuan:
        return refused
    outer = [name for name in modules if "transformer_blocks." not in name]
    if style.is_bfl:
        if style.prefix == "lora_unet_":
            if style.sides == "lokr":
                return refused
            names = (_GUIDANCE, *_OUTER_MODULATIONS, _LAST)
            return LoaderVerdict(dropped=tuple(name for name in outer if name.startswith(names)))
        if style.prefix in ("diffusion_model.", "base_model.model."):
            if style.sides not in ("peft", "lokr"):
                return unknown if style.sides == "kohya" else refused
            if style.has_alpha and style.sides != "lokr":
                return LoaderVerdict("it refuses the file's alpha keys")
            return LoaderVerdict(wrong=(_LAST,) if _LAST in outer else ())
        return refused if style.has_alpha and style.prefix == "" else unknown
    if style.prefix == "transformer." and style.sides in ("peft", "old", "lokr"):
        return LoaderVerdict("it refuses the file's alpha keys") if style.has_alpha else LoaderVerdict()
    if style.prefix == "transformer." and style.sides == "other":
        return LoaderVerdict("it reads such endings of keys in part, as far as old files of its own had them")
    if style.sides == "lokr":
        if style.prefix == "":
            return LoaderVerdict()
        return refused if outer or style.prefix != "lycoris_" else LoaderVerdict()
    if style.prefix in ("base_model.model.", "diffusion_model.") and style.sides == "peft":
        return refused if outer else LoaderVerdict()
    return unknown
