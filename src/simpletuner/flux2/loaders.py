"""What diffusers and ComfyUI make of an adapter file as it lies, known from its keys: as diffusers 0.42 and ComfyUI
0.19 read them.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from simpletuner.flux2.dialects import prefix_of
from simpletuner.flux2.names import to_bfl

AdapterLoader = Literal["diffusers", "ComfyUI"]
ADAPTER_LOADERS: tuple[AdapterLoader, ...] = ("diffusers", "ComfyUI")

_BFL = re.compile(r"(double|single)_blocks|(img|txt|time|guidance)_in(\b|_)|final_layer|\w+_modulation\w*[._]lin\b")
_HUNYUAN = re.compile(r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\b")
_PEFT = (".lora_A.weight", ".lora_B.weight")
_OLD_DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_LINEAR_LAYER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
_COMFYUI_SUFFIXES = (
    ".lora_up.weight",
    "_lora.up.weight",
    ".lora_B.weight",
    ".lora.up.weight",
    ".lora_B",
    ".lora_linear_layer.up.weight",
    ".lora_B.default.weight",
    ".lokr_w1",
    ".lokr_w1_b",
    ".hada_w1_b",
)
"""What follows a Linear's name in the keys that ComfyUI reads: one tensor of each kind and spelling of an adapter."""

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
    unknown: str = ""
    """Why it cannot be said what it loads; empty where the other fields say it."""
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
    """Of the two matrices' suffixes: "peft", "old", "kohya", "linear_layer", "lokr", "loha" or "other"."""
    has_alpha: bool
    is_hunyuan: bool


def loader_verdicts(
    keys: Iterable[str],
    modules: Iterable[str],
    *,
    unread: Mapping[str, str] = MappingProxyType({}),
    header_scaled: Collection[str] = (),
) -> dict[AdapterLoader, LoaderVerdict]:
    """What each loader makes of a file with `keys`, all of one adapter, that adapts `modules` (diffusers' names).

    Args:
        unread: the file's other keys, each with what it is, as in `AdapterFile.unread`.
        header_scaled: those of `modules` whose scale the header alone has, as in `AdapterFile.header_scaled`.
    """
    keys, modules = list(keys), list(modules)
    return {"diffusers": _diffusers(keys, modules, unread), "ComfyUI": _comfyui(keys, modules, header_scaled)}


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
    spellings = {"peft": _PEFT, "old": _OLD_DIFFUSERS, "kohya": _KOHYA, "linear_layer": _LINEAR_LAYER}
    for name, endings in spellings.items():
        if key.endswith(endings):
            return name
    leaf = key.rpartition(".")[2]
    return "lokr" if leaf.startswith("lokr_") else "loha" if leaf.startswith("hada_") else "other"


def _comfyui(keys: Iterable[str], modules: list[str], header_scaled: Collection[str]) -> LoaderVerdict:
    """It looks every key up in a list of names, and reads no header."""
    keys = set(keys)
    dropped = tuple(
        name
        for name in modules
        if keys.isdisjoint(known + suffix for known in _comfyui_names(name) for suffix in _COMFYUI_SUFFIXES)
    )
    if len(dropped) == len(modules):
        return LoaderVerdict("it knows none of these names")
    wrong = tuple(name for name in modules if name in header_scaled and name not in dropped)
    return LoaderVerdict(dropped=dropped, wrong=wrong)


def _comfyui_names(module: str) -> Iterator[str]:
    """The names under which ComfyUI's list has a Linear (`module` in diffusers' names)."""
    bfl = to_bfl(module)
    if bfl is not None:
        yield f"diffusion_model.{bfl.name}"
        yield f"lora_unet_{bfl.name.replace('.', '_')}"
    if not module.startswith("time_guidance_embed.") and module not in _OUTER_MODULATIONS:
        flat = module.replace(".", "_")
        yield from (f"transformer.{module}", module, f"lora_transformer_{flat}", f"lycoris_{flat}")


def _diffusers(keys: list[str], modules: list[str], unread: Mapping[str, str]) -> LoaderVerdict:
    """It converts whole files, by what some of their keys begin with."""
    style = _style(keys)
    if style is None:
        return LoaderVerdict(
            unknown="it reads a file by what some of its keys begin with, and this one mixes several layouts"
        )
    verdict = _diffusers_alone(style, modules)
    refused = None if verdict.refusal or verdict.unknown else _refused_key(style, unread)
    return verdict if refused is None else LoaderVerdict(f"it takes no file with a key such as {refused}")


def _refused_key(style: _KeyStyle, unread: Mapping[str, str]) -> str | None:
    """The first of the `unread` keys with which diffusers loads none of the file; None where it does."""
    if style.sides == "kohya":  # It leaves out the keys that it does not know.
        return None
    for key, kind in unread.items():
        if key.endswith(_KOHYA):  # It takes the whole file for one of kohya's.
            is_accepted = False
        elif style.prefix == "transformer.":
            is_accepted = any(word in key for word in ("lora", "lokr", "dora_scale"))
        else:  # It converts the names that it knows. It removes dora_scale before, so a DoRA loads as a LoRA.
            is_accepted = kind == "dora" and "magnitude" not in key
        if not is_accepted:
            return key
    return None


def _diffusers_alone(style: _KeyStyle, modules: list[str]) -> LoaderVerdict:
    """What it makes of a file that holds nothing but the adapter."""
    no_layers = LoaderVerdict("it warns that the file has no layers for its model, and goes on without them")
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
                return no_layers if style.sides == "kohya" else refused
            if style.has_alpha and style.sides != "lokr":
                return LoaderVerdict("it refuses the file's alpha keys")
            return LoaderVerdict(wrong=(_LAST,) if _LAST in outer else ())
        return refused if style.has_alpha and style.prefix == "" else no_layers
    if style.prefix == "transformer." and style.sides in ("peft", "old", "lokr"):
        return LoaderVerdict("it refuses the file's alpha keys") if style.has_alpha else LoaderVerdict()
    if style.prefix == "transformer." and style.sides == "linear_layer":
        return refused
    if style.prefix == "transformer." and style.sides == "other":
        return LoaderVerdict(unknown="of keys that end so, it reads those that old files of its own had")
    if style.sides == "lokr":
        if style.prefix == "":
            return LoaderVerdict()
        return refused if outer or style.prefix != "lycoris_" else LoaderVerdict()
    if style.prefix in ("base_model.model.", "diffusion_model.") and style.sides == "peft":
        return refused if outer else LoaderVerdict()
    return no_layers
